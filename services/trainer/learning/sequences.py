"""What goes through the model: a run's calls put together so that each token is seen once. Pure, as the rules are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from services.trainer.domain import CallRecord


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of one sequence; ``own[i]`` where the agent's model drew ``ids[i]``, with its recorded logprob.

    ``temperatures[i]`` is what its logits were divided by; empty where all were drawn, or are learned, at 1.
    """

    ids: tuple[int, ...]
    own: tuple[bool, ...]
    logprobs: tuple[float, ...]
    temperatures: tuple[float, ...] = ()

    @property
    def tempered(self) -> bool:
        return any(temperature != 1 for temperature in self.temperatures)


def unfit(tokens: TokenSequence, vocabulary: int, context: int) -> str | None:
    """Why a sequence cannot go through the parent, or None."""
    if len(tokens.ids) > context:
        return f"its {len(tokens.ids)} tokens are over the model's context of {context}"
    if strange := next((token for token in tokens.ids if not 0 <= token < vocabulary), None):
        return f"its token id {strange} is outside the parent's vocabulary of {vocabulary}"
    if any(not math.isfinite(value) for value in tokens.logprobs):
        return "a logprob of it is not finite"
    return None


def token_sequences(calls: Sequence[CallRecord]) -> list[TokenSequence]:
    """Each call's prompt and reply; a call whose prompt begins with all that came before continues that sequence.

    So a conversation of n turns costs its length once, and each reply token is trained on once. A call without a reply
    drew no token that is known.
    """
    found: list[_Growing] = []
    for call in calls:
        if call.reply is None:
            continue
        prompt, reply = call.prompt_token_ids or [], call.token_ids or []
        before = next((s for s in reversed(found) if prompt[: len(s.ids)] == s.ids), None)
        if before is not None:
            found.remove(before)
        found.append(growing := before or _Growing())
        new = len(prompt) - len(growing.ids)
        growing.ids = [*prompt, *reply]
        growing.own += [False] * new + [True] * len(reply)
        growing.logprobs += [0.0] * new + (call.logprobs or [])
        growing.temperatures += [1.0] * new + [call.sampled_at] * len(reply)
    return [TokenSequence(tuple(s.ids), tuple(s.own), tuple(s.logprobs), tuple(s.temperatures)) for s in found]


@dataclass(eq=False)
class _Growing:
    """A sequence that calls still continue: what each adds is put to its end, and nothing copied for each turn."""

    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Conversation:
    """Messages of one conversation; ``own`` are the indices of those that the agent's model wrote."""

    messages: tuple[dict[str, Any], ...]
    own: frozenset[int]
    tools: list[dict[str, Any]] | None


def conversations(calls: Sequence[CallRecord]) -> list[Conversation]:
    """The calls of a run as whole conversations: a call whose prompt extends what came before continues it.

    Each recorded reply is the agent's own exactly once; assistant messages that no recorded call wrote are context.
    """
    found: list[Conversation] = []
    for call in calls:
        prompt = tuple(call.messages)
        before = next((c for c in reversed(found) if prompt[: len(c.messages)] == c.messages), None)
        if before is not None:
            found.remove(before)
        own = before.own if before else frozenset[int]()
        reply = {"role": "assistant", **(call.reply or {})}
        found.append(Conversation((*prompt, reply), own | {len(prompt)}, call.tools))
    return found
