"""What commands print is JSON for every reader, and a line for every person, whatever an agent sent."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.terminal.output import json_text, plain, print_json, shown

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(),
    st.sampled_from((1, -1)).map(lambda sign: sign * 10**5000),
    st.text(alphabet=st.characters(exclude_categories=())),  # half a surrogate pair among the rest
    st.datetimes(timezones=st.sampled_from((UTC, timezone(timedelta(hours=14)), timezone(timedelta(hours=-12))))),
    st.decimals().filter(lambda number: not number.is_snan()),  # Postgres has none
    st.uuids(),
    st.binary(max_size=8),
    st.frozensets(st.floats(), max_size=3),
)
keys = st.one_of(st.text(alphabet=st.characters(exclude_categories=())), st.integers(), st.floats(), st.none())
values = st.recursive(
    odd, lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(keys, inner), max_leaves=8
)


def strict(text: str) -> Any:
    """As a reader that takes only what RFC 8259 has."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text.encode("utf-8").decode("utf-8"), parse_constant=refuse)


@given(values)
def test_any_value_is_json_that_every_reader_takes(value: Any) -> None:
    for ascii_only in (True, False):
        said = strict(json_text(value, ascii_only=ascii_only))
        json.dumps(said, ensure_ascii=False).encode()  # no half of a pair is left
    assert isinstance(shown(value), str)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_what_json_can_say_stays_as_it_is(value: Any) -> None:
    assert strict(json_text(value)) == value == strict(json_text(value, indent=2, ascii_only=False))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, "NaN"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        (Decimal("NaN"), "NaN"),
        ("Sale \ud83d", "Sale \ufffd"),
        ("Sale " + "\ud83d" + "\ude00", "Sale \U0001f600"),
        ("Sale \U0001f600", "Sale \U0001f600"),
        (2**60, 2**60),
        (datetime.max.replace(tzinfo=timezone(-timedelta(hours=1))), "9999-12-31T23:59:59.999999Z"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ],
)
def test_each_odd_value_has_its_word(value: Any, said: Any) -> None:
    assert strict(json_text({"x": [value]})) == {"x": [said]}


def test_a_terminal_shows_no_control_code(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"\x1b[2J": math.nan, "é": "\u202e"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"\x1b[2J": "NaN", "é": "\u202e"}


def test_what_has_no_json_form_is_a_fault_of_ours() -> None:
    with pytest.raises(TypeError, match="object has no JSON form"):
        plain(object())
