"""What recording costs an agent: microseconds on the caller's side for one step, while a real broker takes the events.

A step is entered, told of a provider, a model call and an action, and left; its event is queued. Publishing goes on in
between, in the same loop, as it does in an agent. ``import_ms``: ``import ratchet_sdk`` in a fresh interpreter, with
what the SDK brings and nothing else; ``import_beside_aiohttp_ms``: where aiohttp is installed too, which the NATS
client then imports at once for its websockets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

from ratchet_sdk import Recorder

from services.local.embedded import NatsServer
from shared.bus import Bus
from shared.streams import provision

MESSAGES = [{"role": "system", "content": "you trade"}, {"role": "user", "content": "iron is up by two; " * 20}]
REPLY = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "buy"}}
IMPORTS = 7


async def measured(nats_url: str, steps: int) -> list[float]:
    """Seconds of each step, in runs of fifty; the loop gets its turn between two steps, as an agent's does."""
    bus = Bus(nats_url, name="bench")
    await bus.connect()
    await provision(bus)
    await bus.close()
    taken = []
    async with Recorder(nats_url, "bench", queue_max=steps + 1000, spool_dir="") as recorder:
        for _ in range(steps // 50):
            async with recorder.trajectory(scenario_id="bench") as run:
                for number in range(50):
                    begun = time.perf_counter()
                    async with run.step(environment={"price": number}) as step:
                        step.provider_access("prices", query={"of": "iron"}, data={"iron": number})
                        step.llm_call(messages=MESSAGES, response=REPLY, model="bench")
                        step.action("buy", parameters={"of": "iron"}, success=True, result={"order": number})
                    taken.append(time.perf_counter() - begun)
                    await asyncio.sleep(0)
        if unsent := await recorder.flush(60):
            raise SystemExit(f"{unsent} events were not accepted")
    return taken


ALONE = "import sys; sys.modules['aiohttp'] = None; import ratchet_sdk"
BESIDE_AIOHTTP = "import ratchet_sdk"


def import_ms(code: str) -> float:
    """The median of a few fresh interpreters, less what an empty one takes."""

    def run(code: str) -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - begun

    runs = [run(code) - run("pass") for _ in range(IMPORTS)]
    return median(runs) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as home:
        server = NatsServer(Path(home))
        server.start()
        try:
            taken = asyncio.run(measured(server.url, given.steps))
        finally:
            server.stop()
    found = {
        "steps": len(taken),
        "step_p50_us": round(median(taken) * 1e6, 1),
        "step_p99_us": round(quantiles(taken, n=100)[98] * 1e6, 1),
        "import_ms": round(import_ms(ALONE)),
        "import_beside_aiohttp_ms": round(import_ms(BESIDE_AIOHTTP)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
