"""``python -m examples.market``: the market and its agents as one process, for a number of windows.

Windows are the system's: window 0 is the one that begins at ``--begin``, so that a process that is started again
goes on with the window that it is. Agents decide early in a window; what they earned is published before it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from examples.market.agents import Order, Trader
from examples.market.market import facts
from examples.market.words import SYMBOLS
from examples.market.world import World, closing, earned, opening
from shared.errors import ConfigurationError
from shared.settings import Settings, load
from shared.windows import Window, window_at

log = logging.getLogger("market")

AGENTS_ARRIVE_WITHIN = 0.35  # of a window, one after the other
CLOSES_BEFORE_END = 0.1  # of a window: when the last prices and all rewards go out


class MarketSettings(Settings):
    gateway_url: str = Field("http://127.0.0.1:8100/v1", description="where agents' model calls go")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.market", description=__doc__)
    parser.add_argument("--windows", type=int, default=10, help="how many windows to trade in")
    parser.add_argument("--begin", type=float, help="start of window 0, seconds since 1970; default: the next one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--policy", default="default")
    parser.add_argument("--symbols", type=int, default=len(SYMBOLS), help="how many are traded, the question last")
    parser.add_argument("--in-words", action="store_true", help="ask in plain English, for a model that reads it")
    parser.add_argument(
        "--credentials",
        type=Path,
        required=True,
        help="a directory with NAME.key for each agent (`ratchet agents key NAME --file`), and NAME.nk where "
        "the broker asks for one; they are the agents",
    )
    return parser.parse_args()


def who(credentials: Path) -> dict[str, tuple[str, Path | None]]:
    """The agents' names, each with its key for the gateway and, where it has some, its credentials at the broker.

    Raises ConfigurationError for a directory without a key.
    """
    found = {}
    for path in sorted(credentials.glob("*.key")):
        seed = path.with_suffix(".nk")
        found[path.stem] = path.read_text().strip(), seed if seed.exists() else None
    if not found:
        raise ConfigurationError(f"{credentials} holds no NAME.key; make some with `ratchet agents key NAME --file`")
    return found


def plan(begin: float | None, windows: int, length_s: int, now: float) -> list[tuple[int, Window]]:
    """The windows still to be traded in, with their numbers. One that is half over already is left out."""
    first = window_at(datetime.fromtimestamp(now if begin is None else begin, UTC), length_s)
    if begin is None:
        first = first.next()
    coming = []
    window = first
    for number in range(windows):
        if window.starts_at.timestamp() + length_s / 2 > now:
            coming.append((number, window))
        window = window.next()
    return coming


async def run_window(
    world: World, traders: list[Trader], symbols: Sequence[str], seed: int, number: int, window: Window
) -> None:
    """One window: prices, decisions, and before its end what became of them. Late orders are settled when they come."""
    start, end = window.starts_at.timestamp(), window.ends_at.timestamp()
    moment = f"w{number:04d}"
    situations = [facts(seed, number, symbol) for symbol in symbols]
    orders: list[Order] = []

    async def arrive(place: int, trader: Trader) -> None:
        await until(start + window.length_s * AGENTS_ARRIVE_WITHIN * place / len(traders))
        if trader.busy:  # on a machine that is too slow, the backlog must not grow from window to window
            log.warning("%s is still busy with an earlier window and sits window %d out", trader.agent_id, number)
            return
        await trader.trade(moment, situations, orders.append)

    await until(start)
    await world.publish(opening(situations))
    trading = asyncio.gather(*(arrive(place, trader) for place, trader in enumerate(traders)))
    await until(end - window.length_s * CLOSES_BEFORE_END)
    in_time = list(orders)
    await world.publish([*closing(window.window_id, moment, situations), *earned(in_time, situations)])
    await trading
    late = [order for order in orders if order not in in_time]
    await world.publish(earned(late, situations))
    log.info("window %d of seed %d: %d orders, %d of them late", number, seed, len(orders), len(late))


async def until(instant: float) -> None:
    await asyncio.sleep(max(0.0, instant - time.time()))


async def main() -> None:
    asked = arguments()
    settings = load(MarketSettings)
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(World(settings.nats_url))
        traders = []
        for agent_id, (key, credentials) in who(asked.credentials).items():
            trader = Trader(
                agent_id,
                nats_url=settings.nats_url,
                gateway_url=settings.gateway_url,
                key=key,
                policy=asked.policy,
                credentials=credentials,
                in_words=asked.in_words,
            )
            traders.append(await stack.enter_async_context(trader))
        symbols = SYMBOLS[-asked.symbols :]
        windows = plan(asked.begin, asked.windows, settings.window_s, time.time())
        running = [asyncio.create_task(run_window(world, traders, symbols, asked.seed, *each)) for each in windows]
        loop = asyncio.get_running_loop()
        for ending in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(ending, lambda: [task.cancel() for task in running])
        for result in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        asyncio.run(main())
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
