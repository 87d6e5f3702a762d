"""What commands print: JSON for programs on stdout, tables for people, progress on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from shared.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

WIDE = 160  # characters
WORDS = 12  # characters that a column of words is given at the least
GAP, EDGES = 3, 2  # characters between two columns of a table, and at its two sides
NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
LONGEST_BITS = 14_000  # about 4,200 decimals: Python refuses to write out more than 4,300

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Policy = Annotated[str, typer.Option("--policy", "-p", help="The line of models that is meant.")]


def plain(value: Any) -> Any:
    """What JSON has no type for, as JSON: times in RFC 3339, ids and decimals as text and numbers."""
    match value:
        case datetime():
            return _utc(value).isoformat().replace("+00:00", "Z")
        case date() | UUID():
            return str(value)
        case Decimal():
            return float(value)
        case bytes():
            return value.hex()
        case Mapping():
            return dict(value)
        case set() | frozenset() | tuple():
            return list(value)
    raise TypeError(f"{type(value).__name__} has no JSON form here")


def _utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:  # a zone at the edge of the calendar
        return value.replace(tzinfo=UTC)


def json_text(value: Any, *, indent: int | None = None, ascii_only: bool = True) -> str:
    """``value`` as JSON that any reader takes, whatever an agent sent.

    What JSON has no number for stands there as the text ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``, as protobuf's
    JSON has it; half a surrogate pair becomes U+FFFD, as in the SDK.
    """

    def written(what: Any) -> str:
        apart = (",", ":") if indent is None else None
        return json.dumps(
            what, default=plain, indent=indent, ensure_ascii=ascii_only, allow_nan=False, separators=apart
        )

    try:
        text = written(value)
        text.encode()
    except (ValueError, TypeError):
        return written(sayable(value))
    return written(sayable(value)) if "\\ud" in text else text  # a pair stays one, half a pair is mended


def sayable(value: Any) -> Any:
    """A copy made of what JSON can say. A number longer than Python writes out in decimals is in hexadecimal."""
    from ratchet_sdk.values import mended, told_apart

    match value:
        case str():
            return mended(value)
        case None | bool():
            return value
        case float():
            return value if math.isfinite(value) else NOT_FINITE[str(value)]
        case int():
            return value if value.bit_length() < LONGEST_BITS else hex(value)
        case Mapping():
            named = ((key if isinstance(key, str) else shown(key), item) for key, item in value.items())
            return told_apart((mended(key), sayable(item)) for key, item in named)
        case list() | tuple():
            return [sayable(item) for item in value]
    return sayable(plain(value))


def instant(option: str, given: str | None) -> datetime | None:
    """A time that was given, in UTC where it has no zone. Raises ConfigurationError."""
    if given is None:
        return None
    try:
        read = datetime.fromisoformat(given)
    except ValueError as error:
        raise ConfigurationError(f"{option} {given[:40]!r} is no time; one looks like 2026-11-20T10:00") from error
    return read.replace(tzinfo=UTC) if read.tzinfo is None else read.astimezone(UTC)


def print_json(value: Any, *, err: bool = False) -> None:
    """One indented document; text of agents stays escaped, so that a terminal shows no control codes."""
    (sys.stderr if err else sys.stdout).write(json_text(value, indent=2) + "\n")


def console(*, err: bool = False) -> Console:
    from rich.console import Console

    made = Console(stderr=err, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDE  # a file or a pipe has no edge to wrap at
    return made


def fitting(needs: Sequence[int], room: int) -> list[int]:
    """The places of the columns that are shown in ``room`` characters: each whole or not at all, leftmost first.

    ``needs``: the characters that each takes at the least. What is too wide makes way for narrower ones to its right;
    the first stays in any case, for it says what a row is about.
    """
    places: list[int] = []
    left = room - EDGES
    for place, need in enumerate(needs):
        taken = need + (GAP if places else 0)
        if taken <= left or not places:
            places.append(place)
            left -= taken
    return places


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    right: Sequence[str] = (),
    wrap: Sequence[str] = (),
    bold: Sequence[str] = (),
) -> RenderableType:
    """A table of plain text: nothing that an agent wrote is taken for markup or a control code.

    ``right``: columns of numbers; ``wrap``: columns of words, which take what room is left. No cell is ever cut: where
    the terminal is too narrow whole columns go, from the right, and a line below says how many.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    cells = [[Text(shown(cell)) for cell in row] for row in rows]
    needs = []
    for place, column in enumerate(columns):
        widest = max([len(column), *(row[place].cell_len for row in cells)])
        needs.append(min(widest, max(len(column), WORDS)) if column in wrap else widest)
    room = console().width
    places = fitting(needs, room)
    made = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (columns[place] for place in places):
        made.add_column(
            column,
            justify="right" if column in right else "left",
            style="bold" if column in bold else "",
            overflow="fold",
            no_wrap=column not in wrap and len(places) > 1,
        )
    for row in cells:
        made.add_row(*(row[place] for place in places))
    hidden = [column for place, column in enumerate(columns) if place not in places]
    if not hidden:
        return made
    said = f"{len(hidden)} column{'s' if len(hidden) > 1 else ''} hidden at {room} columns"
    told = f"{said}: widen the terminal or use --json ({', '.join(hidden)})"
    return Group(made, Text(told, style="dim"))


def shown(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        case datetime():
            return _utc(value).strftime("%Y-%m-%d %H:%M:%S")
    try:
        return printable(str(value))
    except ValueError:  # an integer with more digits than Python writes out
        return printable(str(sayable(value)))


def printable(text: str) -> str:
    """Agents' text for a terminal: no escape sequence, no character that moves the cursor or the reading order."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def progress() -> Progress:
    """A progress bar on stderr that vanishes where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console(err=True),
    )


class Task:
    """A line of the progress bar; call it with how much further it came, or have it say what it waits for."""

    def __init__(self, bar: Progress, words: str, total: int) -> None:
        self._bar, self._words = bar, words
        self._made = bar.add_task(words, total=total)

    def __call__(self, further: int) -> None:
        self._bar.advance(self._made, further)

    def say(self, why: str) -> None:
        self._bar.update(self._made, description=f"{self._words} ({why})" if why else self._words)


def task(bar: Progress, words: str, total: int) -> Task:
    return Task(bar, words, total)
