"""The oracle sees what it is there to see: each wrong that a fault could do, by its name and alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.faults.oracle import Buried, Key, Sent, Stored, Verdict, judge

KEYS = [Key("a", str(number)) for number in range(4)]
LEDGER = [
    *(Sent(key, f"sha-{key.event_id}", acknowledged=True) for key in KEYS),
    Sent(Key("a", "unheard"), "sha-unheard"),
    Sent(Key("a", "-"), "sha-bad", acknowledged=True, bad=True),
    Sent(Key("a", "-"), "sha-unheard-bad", bad=True),
]
ROWS = [Stored(key, f"sha-{key.event_id}", f"sha-{key.event_id}") for key in KEYS]
LETTERS = [Buried("a", "sha-bad")]
FIRST, *OTHERS = ROWS


def test_what_is_as_it_must_be_holds() -> None:
    assert judge(LEDGER, ROWS, LETTERS).holds


def test_what_was_never_acknowledged_may_be_kept_or_not() -> None:
    late = Stored(Key("a", "unheard"), "sha-unheard", "sha-unheard")
    assert judge(LEDGER, [*ROWS, late], [*LETTERS, Buried("a", "sha-unheard-bad")]).holds


def test_what_was_sent_again_is_one_event() -> None:
    assert judge([*LEDGER, replace(LEDGER[0], acknowledged=False)], ROWS, LETTERS).holds


@pytest.mark.parametrize(
    ("stored", "buried", "verdict"),
    [
        pytest.param(OTHERS, LETTERS, Verdict(lost=frozenset({FIRST.key})), id="lost"),
        pytest.param([*ROWS, FIRST], LETTERS, Verdict(repeated=frozenset({FIRST.key})), id="repeated"),
        pytest.param(
            [replace(FIRST, rows=2), *OTHERS], LETTERS, Verdict(repeated=frozenset({FIRST.key})), id="two steps"
        ),
        pytest.param(
            [replace(FIRST, rows=0), *OTHERS], LETTERS, Verdict(repeated=frozenset({FIRST.key})), id="no step"
        ),
        pytest.param(
            [replace(FIRST, sha256="?", claimed="?"), *OTHERS],
            LETTERS,
            Verdict(altered=frozenset({FIRST.key})),
            id="altered before it was hashed",
        ),
        pytest.param(
            [replace(FIRST, sha256="?"), *OTHERS], LETTERS, Verdict(altered=frozenset({FIRST.key})), id="altered since"
        ),
        pytest.param(
            [replace(FIRST, claimed="?"), *OTHERS], LETTERS, Verdict(altered=frozenset({FIRST.key})), id="wrong hash"
        ),
        pytest.param(
            [*ROWS, Stored(Key("b", "0"), "sha-0", "sha-0")],
            LETTERS,
            Verdict(unknown=frozenset({Key("b", "0")})),
            id="of another agent",
        ),
        pytest.param(ROWS, [], Verdict(unburied=frozenset(LETTERS)), id="a bad one vanished"),
        pytest.param(ROWS, LETTERS * 2, Verdict(wrongly_buried=frozenset(LETTERS)), id="buried twice"),
        pytest.param(
            OTHERS,
            [*LETTERS, Buried("a", "sha-0")],
            Verdict(lost=frozenset({FIRST.key}), wrongly_buried=frozenset({Buried("a", "sha-0")})),
            id="a good one buried",
        ),
    ],
)
def test_it_catches(stored: list[Stored], buried: list[Buried], verdict: Verdict) -> None:
    found = judge(LEDGER, stored, buried)
    assert found == verdict
    assert not found.holds


def test_it_says_how_many_and_names_one() -> None:
    assert str(judge(LEDGER, [], LETTERS)) == "4 lost (Key(agent_id='a', event_id='0'))"
