"""``python -m examples.judge``: a judge's endpoint that costs nothing, for trying `ratchet judge` and for measuring."""

from __future__ import annotations

import argparse
import asyncio
import contextlib

from examples.judge.reading import JUDGES
from examples.judge.standin import BEHAVIOURS, StandIn, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8099, help="0 lets the system choose")
    parser.add_argument(
        "--judge", choices=sorted(JUDGES), default="by-worth", help="how it scores; none is to be trusted"
    )
    parser.add_argument("--behave", choices=sorted(BEHAVIOURS), default="straight", help="how it answers")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="how long it takes to answer")
    given = parser.parse_args()
    endpoint = StandIn(
        judge=JUDGES[given.judge],
        always=BEHAVIOURS[given.behave],
        latency_s=given.latency_ms / 1000,
        keep_bodies=False,
    )

    def ready(port: int) -> None:
        print(f"RATCHET_JUDGE_BASE_URL=http://127.0.0.1:{port}/v1", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(endpoint, given.port, ready))


if __name__ == "__main__":
    main()
