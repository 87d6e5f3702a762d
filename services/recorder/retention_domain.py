"""What is not kept: runs that were forgotten, and days that outlived their policy. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta

from services.recorder.domain import Received, RunKey, day_of

EVERY_OTHER = ""  # the row of those policies that have none of their own
AHEAD_DAYS = 2  # partitions exist for today and so many days after it


# what comes in --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sifted:
    """A batch after the gate. ``keep``: to store, without a body where the run is forgotten; ``dead`` by sequence."""

    keep: list[Received]
    dead: dict[int, str]


@dataclass(frozen=True)
class Gate:
    """What a batch has to pass: forgotten runs among its own, and by policy the last day that is gone."""

    forgotten: frozenset[RunKey] = frozenset()
    gone_through: Mapping[str, date] = field(default_factory=dict)

    def gone(self, item: Received) -> bool:
        last = last_day_of(self.gone_through, item.event.policy)
        return last is not None and day_of(item.event.event_id) <= last

    def sift(self, events: Sequence[Received]) -> Sifted:
        """An event of a forgotten run is kept as a tombstone, without its body; once its day is gone, not at all.

        Any other event of a day that is gone may have been stored before, which nobody can tell: it is dead.
        """
        keep, dead = [], {}
        for item in events:
            if item.run in self.forgotten:
                if not self.gone(item):
                    keep.append(item._replace(packed=None))
            elif self.gone(item):
                dead[item.sequence] = (
                    f"its event_id is of {day_of(item.event.event_id)}, which is past its retention;"
                    " what was stored of that day is gone, and could be stored twice"
                )
            else:
                keep.append(item)
        return Sifted(keep, dead)

    def shown(self, dead: Mapping[int, str], events: Iterable[Received]) -> dict[int, str]:
        """The dead letters of a batch without those of forgotten runs: a dead letter keeps what was sent."""
        forgotten = {item.sequence for item in events if item.run in self.forgotten}
        return {sequence: why for sequence, why in dead.items() if sequence not in forgotten}


# how long days live -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Lives:
    """Days that bodies are kept, by policy; 0 keeps them for ever."""

    days: int
    by_policy: Mapping[str, int]

    @property
    def bounded(self) -> bool:
        return self.days > 0 or any(days > 0 for days in self.by_policy.values())

    @property
    def longest_days(self) -> int:
        """The longest bounded life."""
        return max(0, self.days, *self.by_policy.values())

    def gone_through(self, today: date) -> dict[str, date | None]:
        """By policy the last day that is gone: ``today - days - 1``, so that every event is kept ``days`` whole days.

        None where a policy of its own is kept for ever.
        """
        of = {**({EVERY_OTHER: self.days} if self.days else {}), **self.by_policy}
        return {policy: today - timedelta(days=days + 1) if days else None for policy, days in of.items()}


def last_day_of(gone_through: Mapping[str, date], policy: str) -> date | None:
    return gone_through.get(policy, gone_through.get(EVERY_OTHER))


def partitions_wanted(today: date, in_default: Iterable[date], oldest: date) -> list[date]:
    """Days that get a partition: today, the next ones, and those that lie in the default partition and may expire.

    An id from the far past or future makes none: its row stays in the default partition, and expires by its arrival.
    """
    last = today + timedelta(days=AHEAD_DAYS)
    ahead = {today + timedelta(days=n) for n in range(AHEAD_DAYS + 1)}
    return sorted(ahead | {day for day in in_default if oldest <= day <= last})


@dataclass(frozen=True)
class Drop:
    """Every policy of the day has expired: the partition goes whole."""


@dataclass(frozen=True)
class Erase:
    """Some of the day's policies have expired; the others' bodies stay."""

    policies: tuple[str, ...]


@dataclass(frozen=True)
class Keep:
    pass


Fate = Drop | Erase | Keep


def fate(day: date, policies: Iterable[str], gone_through: Mapping[str, date]) -> Fate:
    """What becomes of a day's partition, from the policies of the runs that have bodies in it."""
    present = set(policies)
    expired = {p for p in present if (last := last_day_of(gone_through, p)) is not None and day <= last}
    if expired == present:
        return Drop()
    return Erase(tuple(sorted(expired))) if expired else Keep()
