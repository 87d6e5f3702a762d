"""From a stored run to what the rules read."""

from __future__ import annotations

from services.trainer.domain import CallRecord
from shared.trajectories import Call, Trajectory


def records_of(trajectory: Trajectory) -> tuple[CallRecord, ...]:
    """A run's calls in their order. Token ids and logprobs are taken as they came, never made up."""
    return tuple(record_of(call) for call in trajectory.calls)


def record_of(call: Call) -> CallRecord:
    response = call.call.response or {}
    entries = (response.get("logprobs") or {}).get("content")
    return CallRecord(
        messages=call.messages,
        response=call.call.response,
        tools=call.call.tools,
        prompt_token_ids=call.call.prompt_token_ids,
        token_ids=_integers(response.get("token_ids")),
        logprobs=_logprobs(entries),
        temperature=call.call.temperature,
        top_p=call.call.top_p,
        model_version=call.call.model_version,
    )


def _integers(value: object) -> list[int] | None:
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return value
    return None


def _logprobs(entries: object) -> list[float] | None:
    """One number a token; what is no number becomes NaN, which no rule takes for a logprob."""
    if not isinstance(entries, list):
        return None
    values = [entry.get("logprob") if isinstance(entry, dict) else None for entry in entries]
    return [float(value) if isinstance(value, (int, float)) else float("nan") for value in values]
