"""Runs as text that a judge reads: each value escaped on a line of its own, cut to what fits. Pure.

Everything that agents, tools or the world wrote is JSON on one line, with angle brackets and invisible characters
escaped: no text of theirs can hold a newline, hence none of the lines that fence it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from shared.trajectories import Trajectory

LETTERS = b" abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
HIGH = bytes(range(128, 256))


def tokens_at_most(text: str) -> int:
    """More tokens than any usual tokenizer makes of a text: it errs upwards, for no vocabulary is at hand.

    A third of a token for each ASCII letter or space (words come to a quarter), one for every other ASCII character
    (some vocabularies have single digits alone), two thirds for each byte beyond (two for a Chinese character).
    """
    data = text.encode("utf-8", "surrogatepass")
    others = data.translate(None, LETTERS)
    ascii_others = others.translate(None, HIGH)
    return math.ceil((len(data) - len(others)) / 3 + len(ascii_others) + (len(others) - len(ascii_others)) * 2 / 3)


def cut(text: str, tokens: int) -> str:
    """A text of at most so many tokens, besides the two marks and the line that says what is missing in its middle.

    What follows that line begins with a mark: no text can place one of our labels at the start of a line.
    """
    whole = tokens_at_most(text)
    if whole <= tokens:
        return text
    fits, too_many = 0, len(text)
    while too_many - fits > 1:
        kept = (fits + too_many) // 2
        head, tail = _ends(text, kept)
        if tokens_at_most(head) + tokens_at_most(tail) <= tokens:
            fits = kept
        else:
            too_many = kept
    head, tail = _ends(text, fits)
    missing = whole - tokens_at_most(head) - tokens_at_most(tail)
    return f"{head}…\n(about {missing} tokens are left out here)\n…{tail}"


def _ends(text: str, kept: int) -> tuple[str, str]:
    return text[: kept - kept // 2], text[len(text) - kept // 2 :]


def fair_shares(sizes: Sequence[int], room: int) -> list[int]:
    """Room for each: what it needs where that is little, an equal part of the rest where it is not."""
    shares = [0] * len(sizes)
    left = max(0, room)
    ordered = sorted(range(len(sizes)), key=lambda n: sizes[n])
    for place, n in enumerate(ordered):
        shares[n] = min(sizes[n], left // (len(ordered) - place))
        left -= shares[n]
    return shares


def as_data(value: Any) -> str:
    """A value as one line of printable JSON without angle brackets."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    return text.replace("<", "\\u003c").replace(">", "\\u003e")


def transcript(run: Trajectory) -> list[str]:
    """A run as lines of data. Its own ``reward``, ``final`` and ``metrics`` are left out: they are the agent's word.

    Of a call that extends the one before, only what is new is written.
    """
    lines = []
    if run.started and run.started.goal:
        lines.append(f"goal: {as_data(run.started.goal)}")
    shown: list[dict[str, Any]] = []
    steps = {step.step: step for step in run.steps}
    for number in sorted({*steps, *(call.step for call in run.calls)}):
        step = steps.get(number)
        if step and step.environment:
            lines.append(f"step {number} environment: {as_data(step.environment)}")
        looked_up = step.provider_accesses if step else []
        lines += [f"step {number} looked up: {as_data(access.model_dump(exclude_none=True))}" for access in looked_up]
        for call in (call for call in run.calls if call.step == number):
            known = len(shown) if call.messages[: len(shown)] == shown else 0
            lines += [f"step {number} message: {as_data(message)}" for message in call.messages[known:]]
            lines.append(f"step {number} reply: {as_data(call.reply)}")
            shown = [*call.messages, *([call.reply] if call.reply else [])]
        if step and step.action:
            lines.append(f"step {number} action: {as_data(step.action.model_dump(exclude_none=True))}")
    return lines


def shared_beginning(transcripts: Sequence[list[str]]) -> list[str]:
    """The lines that all transcripts begin with."""
    together = list(takewhile(lambda lines: len(set(lines)) == 1, zip(*transcripts, strict=False)))
    return [lines[0] for lines in together]
