"""What a run's calls can carry, whoever is the parent: their tokens, their words, or why neither. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ratchet_sdk.sampling import END, NEUTRAL

# Below this, servers draw the most probable token, or take another temperature than was asked (vLLM's _MAX_TEMP).
MIN_TEMPERATURE = 0.01
# What leaves the distribution of each token alone wherever it is said; "auto" and "none" constrain nothing.
PLAIN = frozenset(
    [*END, "parallel_tool_calls", "prediction", "guided_decoding_backend", "guided_whitespace_pattern", "xtc_threshold"]
) - {"min_tokens"}
IDLE: Mapping[str, Sequence[Any]] = {  # values by which each of the others changes nothing
    "top_k": (-1, 0),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "mirostat": (0,),
    "min_tokens": (0,),
    "best_of": (1,),
    "tool_choice": ("auto", "none"),
    "function_call": ("auto", "none"),
    "response_format": ({"type": "text"},),
}


# what was recorded ------------------------------------------------------------------------------
@dataclass(frozen=True)
class CallRecord:
    """One model call as recorded. ``logprobs`` are of ``token_ids`` under the distribution that was sampled from.

    That is the model's own at ``temperature``: log_softmax(logits / temperature), which our inference server records,
    and vLLM with ``--logprobs-mode processed_logprobs``. ``sampling`` is how it was drawn, whole; None where only
    ``temperature`` and ``top_p`` are known. ``witnessed``: the gateway saw it.
    ``fault`` says why its tokens cannot be read. ``broken_chain``: ``messages`` lack what came before them.
    """

    messages: list[dict[str, Any]]
    response: dict[str, Any] | None
    tools: list[dict[str, Any]] | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    temperature: float | None = None
    top_p: float | None = None
    model_version: str | None = None
    sampling: dict[str, Any] | None = None
    witnessed: bool = False
    fault: str | None = None
    broken_chain: bool = False

    @property
    def reply(self) -> dict[str, Any] | None:
        return (self.response or {}).get("message")

    @property
    def asked(self) -> dict[str, Any]:
        """How it was sampled, by the names of the request."""
        known = {"temperature": self.temperature, "top_p": self.top_p}
        return {**{name: value for name, value in known.items() if value is not None}, **(self.sampling or {})}

    @property
    def sampled_at(self) -> float:
        """The temperature that logits were divided by; 1 where none is recorded, as servers take it."""
        value: Any = self.asked.get("temperature")
        return float(value) if _is_number(value) else 1.0

    def has_exact_tokens(self) -> bool:
        """Ids of prompt and reply, and as many finite logprobs as reply tokens."""
        return (
            bool(self.prompt_token_ids)
            and bool(self.token_ids)
            and len(self.logprobs or []) == len(self.token_ids or [])
            and all(math.isfinite(value) for value in self.logprobs or [])
        )


# how it was sampled -------------------------------------------------------------------------------
def departures(sampling: Mapping[str, Any]) -> list[str]:
    """Why a sampling is not the model's own distribution at a temperature above 0, and what to send instead.

    Empty where it is. Whatever truncates, bends or constrains the distribution departs from it, and so does a name that
    is not known here; what only says where a reply ends does not.
    """
    return [found for name, value in sampling.items() if (found := _departure(name, value)) is not None]


def _departure(name: str, value: Any) -> str | None:
    if name == "temperature":
        plain = _is_number(value) and value >= MIN_TEMPERATURE
    elif name in NEUTRAL or name in IDLE:
        plain = any(value == idle and type(value) is not bool for idle in IDLE.get(name, (NEUTRAL.get(name),)))
    else:
        plain = name in PLAIN or not value
    if plain or value is None:
        return None
    said = f"{name[:40]} {value:g}" if _is_number(value) else name[:40]
    return f"sampled with {said}: " + (f"send {name} {NEUTRAL[name]:g}" if name in NEUTRAL else "leave it out")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


# what it comes to -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reading:
    """What a run can carry, read once from its bodies; no parent and no setting plays a part.

    ``no_gradient`` says why its tokens cannot be trained on by gradient, ``no_imitation`` why its words cannot be
    imitated; None where they can. ``versions`` answered it, None among them where a call names none. ``witnessed``: the
    gateway saw each call whose tokens count.
    """

    versions: frozenset[str | None] = frozenset()
    has_tokens: bool = False
    witnessed: bool = False
    no_gradient: str | None = None
    no_imitation: str | None = None

    @property
    def kind(self) -> str:
        """In one word, for a metric: what it carries at best."""
        if self.no_gradient is None:
            return "tokens" if self.witnessed else "unwitnessed_tokens"
        return "words" if self.no_imitation is None else "nothing"


NOTHING = "no model call of it is stored"
UNSTORED = "its events are no longer stored, or cannot be read"
UNANSWERED = "a reply of it was not recorded"
BROKEN_CHAIN = "a call of it extends one that is not recorded: what the model was asked is not known whole"
PROMPTLESS = "a call of it has a reply and no messages: what the model was asked is not known"
NO_TOKENS = "its calls have no token ids and logprobs: call a server that gives them, through the gateway"


def unreadable(reason: str) -> Reading:
    return Reading(no_gradient=reason, no_imitation=reason)


def reading(calls: Sequence[CallRecord]) -> Reading:
    """What the calls of a run come to.

    A call without a reply has no tokens of the model's and takes none away from the others: so no policy escapes its
    grade by a call that breaks. What is imitated is whole.
    """
    answered = [call for call in calls if call.reply is not None]
    if not answered:
        return unreadable(UNANSWERED if calls else NOTHING)
    return Reading(
        versions=frozenset(call.model_version for call in answered),
        has_tokens=any(call.token_ids is not None or call.logprobs is not None or call.fault for call in answered),
        witnessed=all(call.witnessed for call in answered),
        no_gradient=_no_gradient(answered),
        no_imitation=UNANSWERED if len(answered) < len(calls) else _no_imitation(answered),
    )


def _no_imitation(calls: Sequence[CallRecord]) -> str | None:
    if any(call.broken_chain for call in calls):
        return BROKEN_CHAIN
    return None if all(call.messages for call in calls) else PROMPTLESS


def _no_gradient(calls: Sequence[CallRecord]) -> str | None:
    if fault := next((call.fault for call in calls if call.fault), None):
        return fault
    if all(call.token_ids is None and call.logprobs is None for call in calls):
        return NO_TOKENS
    if not all(call.has_exact_tokens() for call in calls):
        return "a call of it lacks token ids or finite logprobs"
    if found := dict.fromkeys(departure for call in calls for departure in departures(call.asked)):
        return f"it was {'; '.join(found)}"[:300]
    return None
