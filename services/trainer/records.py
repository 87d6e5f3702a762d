"""From a stored run to what the rules read."""

from __future__ import annotations

from services.trainer.reading_domain import CallRecord
from shared.trajectories import Call, Trajectory


def records_of(trajectory: Trajectory) -> tuple[CallRecord, ...]:
    """A run's calls in their order. Token ids and logprobs are taken as they came, never made up."""
    return tuple(record_of(call) for call in trajectory.calls)


def record_of(call: Call) -> CallRecord:
    tokens = call.tokens
    return CallRecord(
        messages=call.messages,
        response=call.call.response if call.reply is not None else None,
        tools=call.call.tools,
        prompt_token_ids=tokens.prompt_ids,
        token_ids=tokens.ids,
        logprobs=tokens.logprobs,
        temperature=call.call.temperature,
        top_p=call.call.top_p,
        model_version=call.call.model_version,
        sampling=call.call.sampling,
        witnessed=call.witnessed,
        fault=tokens.fault,
        broken_chain=call.broken_chain,
    )
