"""Spans as the peers take them: traces of 50, each span with about as many bytes of text as an event of ours.

The scripts in this folder run in venvs of their own, which bench/peers.py makes, and import nothing of Ratchet. Each
takes the number of spans, their bytes and where to keep them, and prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from secrets import randbits
from typing import NamedTuple

AT_ONCE = 100
OF_A_TRACE = 50
TEXT = (
    "the price of iron rose by 2.4 % since noon while tea fell on news that rain delayed two ships and nobody knows"
    " whether the buyer who asked for 120 tons will wait ; my balance is 981.50 , so I could buy some now or hold"
)
WORDS = TEXT.split()


class SpanMade(NamedTuple):
    trace: int
    span: int
    start_ns: int
    text: str


def made(count: int, size_bytes: int) -> list[list[SpanMade]]:
    """In batches of 100."""
    spans, trace = [], 0
    for number in range(count):
        if number % OF_A_TRACE == 0:
            trace = randbits(128) | 1
        words = " ".join(WORDS[(number * 31 + place * place) % len(WORDS)] for place in range(size_bytes // 3))
        spans.append(SpanMade(trace, randbits(64) | 1, time.time_ns(), words[:size_bytes]))
    return list(batched(spans))


def batched(spans: list[SpanMade]) -> Iterator[list[SpanMade]]:
    return (spans[start : start + AT_ONCE] for start in range(0, len(spans), AT_ONCE))


def arguments() -> tuple[int, int, str]:
    count, size_bytes, where = sys.argv[1:4]
    return int(count), int(size_bytes), where


def tell(version: str, count: int, seconds: float, kept: int) -> None:
    """``kept`` is what was counted where it is kept, after the clock had stopped."""
    print(json.dumps({"version": version, "events": count, "per_s": round(count / seconds), "lost": count - kept}))
