"""Tables at any width: a number that was cut is a wrong number, and an id that was cut names nothing."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from services.terminal.output import EDGES, GAP, fitting, table

WIDTHS = (60, 80, 100, 160)
WINDOW = "2026-11-20T10:00:04~4s"
COLUMNS = ("window", "state", "agents", "runs", "words", "outcomes", "quality", "last seen")
ROW = (WINDOW, "settled", 1_234_567, 89_101_112, "several words that may be broken over lines " * 3, 42, "97%", "12:00")
LONG = "run-" + "0123456789abcdef" * 6


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 200))
def test_columns_are_whole_and_the_leftmost_go_first(needs: list[int], room: int) -> None:
    places = fitting(needs, room)
    assert places == sorted(set(places))
    assert places[0] == 0
    taken = sum(needs[place] for place in places) + GAP * (len(places) - 1) + EDGES
    assert taken <= room or places == [0]
    for place in set(range(len(needs))) - set(places):  # it did not fit beside those to its left that are shown
        before = [needs[p] + GAP for p in places if p < place]
        assert sum(before) + needs[place] + EDGES > room
    assert set(places) <= set(fitting(needs, room + GAP + max(needs))) or len(places) < len(needs)


def printed(monkeypatch: pytest.MonkeyPatch, width: int, *arguments: object, **more: object) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(table(*arguments, **more))  # type: ignore[arg-type]  # as given
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_no_id_and_no_number_is_cut_at_any_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    lines = printed(monkeypatch, width, "", COLUMNS, [ROW], right=("agents", "runs"), wrap=("words",))
    assert all(len(line) <= width for line in lines)
    whole = " ".join(line.strip() for line in lines)
    assert "…" not in whole
    assert WINDOW in whole
    shown = [column for column in COLUMNS if f" {column} " in f" {lines[1]} "]
    for column, cell in zip(COLUMNS, ROW, strict=True):
        if column in shown and column != "words":
            assert str(cell) in whole
    hidden = len(COLUMNS) - len(shown)
    assert (f"hidden at {width} columns: widen the terminal or use --json" in whole) == bool(hidden)
    if hidden:
        assert f"{hidden} column" in whole
    assert shown == list(COLUMNS) or width < 160


@pytest.mark.parametrize("width", WIDTHS)
def test_an_id_that_is_wider_than_the_terminal_goes_over_lines_and_stays_whole(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    lines = printed(monkeypatch, width, "", ("run", "state"), [(LONG, "open")])
    assert LONG in "".join(line.strip() for line in lines).replace("open", "")


def test_wide_characters_count_as_they_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, 60, "", ("agent", "runs", "seen"), [("漢" * 24, 12_345, "2026-11-20 10:00:00")])
    assert "漢" * 24 in "\n".join(lines)
    assert "1 column hidden at 60 columns: widen the terminal or use --json (seen)" in " ".join(
        line.strip() for line in lines
    )
