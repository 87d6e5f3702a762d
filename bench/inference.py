"""How fast ``inference`` answers: short chats with the demo's model, the service as it runs, asked over HTTP.

``--clients`` ask one after the other for replies of at most ``--tokens`` tokens, as the demo's agents do. By turns:

- ``answers_per_s``, ``median_ms``, ``p99_ms``: whole replies
- ``stream_*``: the same streamed; ``first_ms`` is the median until the first chunk
- ``mixed_*``: every fourth client asks for ``--long`` tokens; the figures are of the short replies beside them
- ``other_*``: the service of another checkout (``--other DIR``), by turns with this one on the same machine
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from examples.market.base import cached
from examples.market.words import NEWS, SYMBOLS
from services.local.embedded import NatsServer
from services.local.processes import free_port
from shared.artifacts import DirectoryStore

HERE = Path(__file__).parents[1]


@dataclass
class Load:
    """Who asks, and what: ``long`` tokens of every fourth, ``tokens`` of the others."""

    clients: int
    seconds: float
    tokens: int
    long: int = 0
    stream: bool = False
    taken_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)

    async def put(self, url: str, sha256: str) -> dict[str, float]:
        until = time.perf_counter() + self.seconds
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as http:
            await asyncio.gather(*(self._client(http, url, sha256, number, until) for number in range(self.clients)))
        ordered = sorted(self.taken_ms)
        found = {
            "answers_per_s": round(len(ordered) / self.seconds, 1),
            "median_ms": round(statistics.median(ordered), 1),
            "p99_ms": round(ordered[int(len(ordered) * 0.99)], 1),
        }
        return found | ({"first_ms": round(statistics.median(self.first_ms), 1)} if self.stream else {})

    async def _client(self, http: aiohttp.ClientSession, url: str, sha256: str, number: int, until: float) -> None:
        slow = bool(self.long) and number % 4 == 0
        body: dict[str, Any] = {"model": sha256, "max_tokens": self.long if slow else self.tokens, "logprobs": True}
        body |= {"stream": self.stream, "return_token_ids": True}
        body |= {"repetition_penalty": 10} if slow else {}  # its end stands in the prompt: it is not drawn soon
        asked = 0
        while (started := time.perf_counter()) < until:
            asked += 1
            text = f"{sorted(SYMBOLS)[asked % len(SYMBOLS)]} {sorted(NEWS)[number % len(NEWS)]}"
            async with http.post(url, json={**body, "messages": [{"role": "user", "content": text}]}) as response:
                if self.stream:
                    await response.content.readline()
                    self.first_ms.append((time.perf_counter() - started) * 1e3)
                said = await response.read()
                if response.status != 200:
                    raise SystemExit(f"the service answered {response.status}: {said[:300]!r}")
            if not slow:
                self.taken_ms.append((time.perf_counter() - started) * 1e3)


@contextmanager
def serving(checkout: Path, nats_url: str, artifacts: Path, log: Path) -> Iterator[str]:
    """The address of a checkout's service, in a process of its own."""
    port = free_port()
    given = {"nats_url": nats_url, "artifacts_dir": str(artifacts), "http_port": str(port), "log_level": "WARNING"}
    environment = {**os.environ, **{f"RATCHET_{name.upper()}": value for name, value in given.items()}}
    with log.open("ab") as errors:
        started = subprocess.Popen(
            [sys.executable, "-m", "services.inference"],
            env={**environment, "RATCHET_DEVICE": "cpu", "PYTHONPATH": str(checkout)},
            cwd=checkout,
            stdout=errors,
            stderr=errors,
        )
        try:
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            started.terminate()
            started.wait(60)


async def warm(url: str, sha256: str) -> None:
    """Wait until the service has the model and has answered."""
    body = {"model": sha256, "max_tokens": 4, "messages": [{"role": "user", "content": "hold"}]}
    deadline = time.monotonic() + 120
    async with aiohttp.ClientSession() as http:
        while time.monotonic() < deadline:
            try:
                async with http.post(url, json=body) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)
    raise SystemExit("the service did not answer within two minutes")


async def measure(given: argparse.Namespace, home: Path) -> dict[str, Any]:
    store = DirectoryStore(home / "artifacts")
    sha256 = store.put(cached(HERE / ".ratchet/bench", 1)).sha256
    nats = NatsServer(home / "nats")
    nats.start()
    checkouts = {"": HERE} | ({"other_": given.other} if given.other else {})
    found: dict[str, Any] = {"clients": given.clients, "tokens": given.tokens, "long": given.long}
    try:
        with ExitStack() as stack:
            urls = {
                name: stack.enter_context(
                    serving(checkout, nats.url_of("inference"), store.root, home / f"{name}inference.log")
                )
                for name, checkout in checkouts.items()
            }
            for url in urls.values():
                await warm(url, sha256)
                await Load(given.clients, given.seconds / 4, given.tokens).put(url, sha256)
            for kind, more in (("", {}), ("stream_", {"stream": True}), ("mixed_", {"long": given.long})):
                for name, url in urls.items():
                    figures = await Load(given.clients, given.seconds, given.tokens, **more).put(url, sha256)
                    found |= {f"{name}{kind}{figure}": value for figure, value in figures.items()}
    finally:
        nats.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each figure")
    parser.add_argument("--tokens", type=int, default=4, help="of a short reply, at most")
    parser.add_argument("--long", type=int, default=64, help="of a long reply, at most")
    parser.add_argument("--other", type=Path, help="another checkout, measured beside this one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as home:
        found = asyncio.run(measure(given, Path(home)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
