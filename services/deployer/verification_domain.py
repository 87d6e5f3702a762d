"""Whether what a server says is a reply, and whether its log probabilities are the trainer's own. No I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

LARGEST_FACTOR = 20  # of the tolerance: how far a single token may be off, where bf16 meets an unlikely one


def fault_of(reply: Any) -> str | None:
    """What is wrong with a chat completion; None where one can act on it."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return "its reply has no choice"
    message = choices[0].get("message")
    if not isinstance(message, dict):
        return "its reply has no message"
    content, calls = message.get("content"), message.get("tool_calls")
    if content is not None and not isinstance(content, str):
        return f"its reply's content is no text but {type(content).__name__}"
    if calls is not None and not isinstance(calls, list):
        return f"its reply's tool_calls are no list but {type(calls).__name__}"
    return None


def served(listed: Any, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> list[float | None] | None:
    """The log probabilities of ``token_ids`` in ``prompt_logprobs`` as vLLM lists them, None for each that is missing.

    One entry a token of prompt and reply: null, or by token id (as text) what is known of it. None for another shape.
    """
    asked = len(prompt_token_ids) + len(token_ids)
    if not isinstance(listed, list) or len(listed) != asked:
        return None
    found = []
    for entry, token in zip(listed[len(prompt_token_ids) :], token_ids, strict=True):
        known = entry.get(str(token)) if isinstance(entry, dict) else None
        logprob = known.get("logprob") if isinstance(known, dict) else None
        found.append(float(logprob) if isinstance(logprob, (int, float)) else None)
    return found


@dataclass(frozen=True)
class Compared:
    """``mean`` and ``largest`` of |trainer's - server's| over ``tokens``, in nats; ``missing`` have no finite pair."""

    tokens: int
    mean: float
    largest: float
    missing: int

    def disagreement(self, tolerance: float) -> str | None:
        """Why the server does not compute what the trainer does; None where they agree within ``tolerance`` a token."""
        if self.missing:
            return f"{self.missing} of {self.tokens + self.missing} log probabilities are missing or not finite"
        if self.mean > tolerance:
            return f"log probabilities differ by {self.mean:.3g} nats a token, {tolerance:g} may be"
        if self.largest > LARGEST_FACTOR * tolerance:
            return (
                f"a token's log probability differs by {self.largest:.3g} nats, {LARGEST_FACTOR * tolerance:g} may be"
            )
        return None

    def __str__(self) -> str:
        return f"{self.tokens} tokens: {self.mean:.2g} nats off on average, {self.largest:.2g} at most"


def compared(own: Sequence[float], theirs: Sequence[float | None]) -> Compared:
    """The trainer's log probabilities of some tokens against the server's, each (n,) in nats."""
    pairs = [
        (a, b) for a, b in zip(own, theirs, strict=True) if b is not None and math.isfinite(a) and math.isfinite(b)
    ]
    off = [abs(a - b) for a, b in pairs]
    return Compared(len(off), fmean(off) if off else 0.0, max(off, default=0.0), len(own) - len(off))
