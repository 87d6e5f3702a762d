"""The one oracle of all faults: what publishers put down in their ledgers against what is kept in the end.

Every acknowledged event is stored once, byte for byte, or it was a bad one: those, and no others, are dead letters.
An event without an acknowledgement may be stored or not, but never in part, altered or twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple


class Key(NamedTuple):
    agent_id: str
    event_id: str


@dataclass(frozen=True)
class Sent:
    """One line of a ledger. ``sha256`` is that of the JSON as it was sent; of a bad event, of the bytes on the wire."""

    key: Key
    sha256: str
    acknowledged: bool = False
    bad: bool = False


@dataclass(frozen=True)
class Stored:
    """One row of ``bodies``. ``sha256`` was computed again from the body, ``claimed`` is what stands beside it.

    ``rows``: how many rows of ``steps`` name the event; ``wanted`` is how many it should have.
    """

    key: Key
    sha256: str
    claimed: str
    rows: int = 1
    wanted: int = 1


@dataclass(frozen=True, order=True)
class Buried:
    """A dead letter: the agent of its subject, and the sha256 of its bytes."""

    agent_id: str
    sha256: str


@dataclass(frozen=True)
class Verdict:
    """What is wrong, each by its own name; all empty is as it must be."""

    lost: frozenset[Key] = frozenset()
    repeated: frozenset[Key] = frozenset()
    altered: frozenset[Key] = frozenset()
    unknown: frozenset[Key] = frozenset()  # nobody says to have sent it
    unburied: frozenset[Buried] = frozenset()  # bad and acknowledged, and no dead letter
    wrongly_buried: frozenset[Buried] = frozenset()  # a dead letter of a good event, or one too many

    @property
    def holds(self) -> bool:
        return self == Verdict()

    def __str__(self) -> str:
        """How many of each, and one of them."""
        wrongs = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(f"{len(found)} {name} ({min(found)})" for name, found in wrongs.items() if found)


def judge(ledger: Iterable[Sent], stored: Iterable[Stored], buried: Iterable[Buried]) -> Verdict:
    """An event that was sent several times stands in the ledger as often: it is acknowledged if once it was."""
    ledger, stored = list(ledger), list(stored)
    good = {sent.key: sent.sha256 for sent in ledger if not sent.bad}
    acknowledged = {sent.key for sent in ledger if sent.acknowledged and not sent.bad}
    bad = Counter(Buried(sent.key.agent_id, sent.sha256) for sent in ledger if sent.bad)
    due = Counter(Buried(sent.key.agent_id, sent.sha256) for sent in ledger if sent.bad and sent.acknowledged)
    letters = Counter(buried)
    bodies = Counter(row.key for row in stored)
    return Verdict(
        lost=frozenset(acknowledged - bodies.keys()),
        repeated=frozenset(
            {key for key, times in bodies.items() if times > 1} | {row.key for row in stored if row.rows != row.wanted}
        ),
        altered=frozenset(
            row.key for row in stored if row.sha256 != row.claimed or row.sha256 != good.get(row.key, row.sha256)
        ),
        unknown=frozenset(bodies.keys() - good.keys()),
        unburied=frozenset((due - letters).keys()),
        wrongly_buried=frozenset((letters - bad).keys()),
    )
