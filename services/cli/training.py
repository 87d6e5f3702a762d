"""Why no run is trainable and which batches failed, in the words of `windows`, `train` and `doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from services.cli import store

if TYPE_CHECKING:
    from shared.database import Pool

REASONS = 3


async def with_reasons(pool: Pool, told: dict[str, Any]) -> dict[str, Any]:
    """What a trainer said of a policy; where none answers, with ``left_out`` (reason -> runs) as it is stored."""
    if told["ready"] is None:
        return {**told, "left_out": await store.carry_nothing(pool, told["policy"])}
    return told


def left_out(told: Mapping[str, Any]) -> str | None:
    """Why runs carry nothing, the commonest reasons first; None where each carries something."""
    counts: dict[str, int] = told.get("left_out") or {}
    if not counts:
        return None
    first = sorted(counts.items(), key=lambda item: -item[1])[:REASONS]
    runs = sum(counts.values())
    return f"{runs} run{'s' * (runs != 1)} left out: {'; '.join(f'{why} ({n})' for why, n in first)}"


def failed(batch: store.Row) -> str:
    """A failed batch in a line, with how many failed in a row, or that one was trained since."""
    row = batch["in_a_row"]
    since = "" if row == 1 else f", the last of {row} in a row" if row else ", and one was trained since"
    return f"{batch['batch_id']} failed{since}: {batch['failure'] or 'no reason given'}"


def notes(ready: list[dict[str, Any]], failures: list[store.Row]) -> list[str]:
    """A line for the newest failed batch of each policy, and one for each policy whose runs carry nothing."""
    lines = [f"policy {batch['policy']}: {failed(batch)}" for batch in failures]
    waiting = [(one["policy"], left_out(one)) for one in ready if not one["ready"]]
    return lines + [f"policy {policy}: {why}" for policy, why in waiting if why]
