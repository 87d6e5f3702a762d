"""When a window is settled, what it lacks, and when a settlement is corrected. Pure.

Source of the rules: design, invariants 4 (outcomes have the same barrier) and 9.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from services.outcome_tracker.joined_domain import bounded

MAX_CORRECTION_WAIT_S = 86_400.0


# when -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Mark:
    """A place in the stream of outcomes, with the stream's creation time: one made anew counts from 1 again."""

    created: datetime
    sequence: int


@dataclass(frozen=True)
class Position:
    """The end of the stream now, and up to where we have stored it."""

    end: Mark
    floor: int


@dataclass(frozen=True)
class Wait:
    pass


@dataclass(frozen=True)
class TakeBarrier:
    mark: Mark


@dataclass(frozen=True)
class Settle:
    """``missing`` is what the barrier lacks, in words."""

    missing: tuple[str, ...] = ()


Move = Wait | TakeBarrier | Settle


def next_move(
    waited_s: float,
    barrier: Mark | None,
    position: Position,
    *,
    unread: bool,
    unmet: bool,
    min_s: float,
    max_s: float,
) -> Move:
    """What to do about a closed window that has waited ``waited_s``.

    waited < min: wait. Pull sources ``unread``: wait, so that what they hold lies before the barrier. No barrier yet:
    take the stream's end as it is now. Stored up to the barrier and nothing ``unmet`` of what its runs expect: settle.
    waited >= max: settle with what is there. A stream that was made anew can never reach the barrier: that alone is
    not waited for.
    """
    if waited_s < min_s or (unread and waited_s < max_s):
        return Wait()
    if barrier is None:
        return TakeBarrier(position.end)
    if unmet and waited_s < max_s:
        return Wait()
    if barrier.created != position.end.created:
        return Settle(("the barrier (the stream of outcomes was made anew)",))
    if position.floor >= barrier.sequence:
        return Settle()
    if waited_s >= max_s:
        return Settle((f"the barrier ({barrier.sequence - position.floor} outcomes are not read yet)",))
    return Wait()


# what is missing --------------------------------------------------------------------------------
def counted(what: str, runs: int) -> str:
    return f"{what} of {runs} run{'s' if runs != 1 else ''}"


def missing_facts(unmet: Mapping[str, int], unrewarded: int) -> tuple[str, ...]:
    """What is not there: of what runs expect (name -> runs that lack it), then rewards of record, expected or not."""
    named = [
        counted(name, runs) if name.startswith("fact:") else name
        for name, runs in sorted(unmet.items())
        if name != "reward"
    ]
    return bounded([*named, *([counted("reward", unrewarded)] if unrewarded else [])])


def not_pulled(sources: Iterable[str], pulled: Mapping[str, str | None]) -> tuple[str, ...]:
    """The configured sources that have not been read for a window, with the reason where there is one."""
    return bounded(
        [
            f"source {name} ({pulled.get(name) or 'not asked yet'})"
            for name in sorted(sources)
            if name not in pulled or pulled[name] is not None
        ]
    )


# corrections ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Content:
    """What is settled of a window. ``digests`` stand for the facts about its runs, which are not copied into it."""

    facts: dict[str, Any]
    outcomes: int
    missing: tuple[str, ...] = ()
    contradictions: tuple[str, ...] = ()
    digests: dict[str, str | None] = field(default_factory=dict)


def changed(before: Content, after: Content) -> tuple[str, ...]:
    """What a later look found different, by name. Nothing: the settlement stands as it is.

    That something is no longer missing is no change by itself: what came instead is.
    """
    found: list[str] = []
    for plural, kind in (("prices", "price"), ("resolutions", "resolution"), ("metrics", "metric")):
        old, new = before.facts.get(plural, {}), after.facts.get(plural, {})
        found += [f"{kind}:{name}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    found += [kind for kind, digest in sorted(after.digests.items()) if before.digests.get(kind) != digest]
    if before.contradictions != after.contradictions:
        found.append("contradictions")
    return bounded(found)


@dataclass(frozen=True)
class Correct:
    pass


@dataclass(frozen=True)
class TooLate:
    pass


def correction_wait_s(revision: int, after_s: float) -> float:
    """How long facts gather before the settlement of this revision is looked at again: twice as long each time."""
    return min(after_s * 2.0 ** min(revision - 1, 30), max(after_s, MAX_CORRECTION_WAIT_S))


def correction_move(
    revision: int, touched_s: float, age_s: float, *, forced: bool, after_s: float, within_s: float
) -> Wait | Correct | TooLate:
    """What to do about a settled window that new facts touched ``touched_s`` ago and that ended ``age_s`` ago."""
    if forced:
        return Correct()
    if age_s > within_s:
        return TooLate()
    return Correct() if touched_s >= correction_wait_s(revision, after_s) else Wait()
