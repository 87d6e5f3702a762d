"""Pull sources: files and an endpoint, each giving facts of a range, what is bad in it, or why it cannot be read."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.responses import RedirectResponse, Response

from services.outcome_tracker import source_http
from services.outcome_tracker.pull_domain import Bad, Good, Pulled
from services.outcome_tracker.pulling import Source
from services.outcome_tracker.source_csv import CsvSource
from services.outcome_tracker.source_http import HttpSource
from services.outcome_tracker.source_parquet import ParquetSource
from shared.errors import GiveUpError, RetryLaterError
from tests.outcome_tracker.endpoint import StandIn, answered, hangs, refused, stand_in
from tests.outcome_tracker.world import ENDS, STARTS

ROWS: list[dict[str, Any]] = [
    {"kind": "price", "occurred_at": "2026-11-20T10:00:00Z", "symbol": "IRON", "price": 2.0, "volume": 3.0},
    {"kind": "price", "occurred_at": "2026-11-20T10:59:59Z", "symbol": "IRON", "price": 4.0, "news": "up, again"},
    {"kind": "price", "occurred_at": "2026-11-20T11:00:00Z", "symbol": "IRON", "price": 100.0},
    {"kind": "price", "occurred_at": "2026-11-20T09:59:59Z", "symbol": "IRON", "price": 100.0},
    {"kind": "metric", "occurred_at": "2026-11-20T12:30:00+02:00", "name": "index", "value": 7.5},
    {"kind": "metric", "occurred_at": "2026-11-20T10:30:00Z", "name": "index", "value": float("nan")},
    {"kind": "price", "occurred_at": "2026-11-20T10:30:00Z", "symbol": "IRON", "price": 1.0, "volume": -1.0},
    {"kind": "rumour", "occurred_at": "2026-11-20T10:30:00Z"},
    {"kind": "metric", "occurred_at": "2026-11-20T10:30:00", "name": "index", "value": 1.0},
]
COLUMNS = ("kind", "occurred_at", "symbol", "price", "volume", "news", "name", "value")


def csv_of(rows: list[dict[str, Any]]) -> str:
    lines = [",".join(f'"{row.get(name, "")}"' for name in COLUMNS) for row in rows]
    return "\n".join([",".join(COLUMNS), *lines]) + "\n"


def nested(row: dict[str, Any]) -> dict[str, Any]:
    head = {name: row[name] for name in ("kind", "occurred_at")}
    return {**head, row["kind"]: {name: value for name, value in row.items() if name not in head}}


async def read(source: Source, begin: datetime = STARTS, end: datetime = ENDS) -> list[Pulled]:
    return [one async for batch in source.pull(begin, end) for one in batch]


@pytest.fixture
def endpoint() -> Iterator[StandIn]:
    with stand_in() as made:
        yield made


@pytest.fixture(params=["csv", "csv.gz", "parquet", "http"])
def source(request: pytest.FixtureRequest, tmp_path: Path, endpoint: StandIn) -> Source:
    """The same rows, whatever they come from."""
    path = tmp_path / f"facts.{request.param}"
    match request.param:
        case "csv":
            path.write_text("\ufeff" + csv_of(ROWS))
        case "csv.gz":
            path.write_bytes(gzip.compress(csv_of(ROWS).encode()))
        case "parquet":
            pq.write_table(pa.Table.from_pylist(ROWS, pa.schema([(n, _type(n)) for n in COLUMNS])), path)
            return ParquetSource("iron", str(path))
        case "http":
            endpoint.always = lambda query: answered([nested(row) for row in ROWS])
            return HttpSource("iron", endpoint.url)
    return CsvSource("iron", str(path))


def _type(column: str) -> pa.DataType:
    return pa.float64() if column in ("price", "volume", "value") else pa.string()


async def test_every_source_gives_the_facts_of_the_range_and_says_what_is_bad(source: Source) -> None:
    found = await read(source)
    assert [(one.row.kind, one.row.name, one.row.value) for one in found if isinstance(one, Good)] == [
        ("price", "IRON", 2.0),
        ("price", "IRON", 4.0),
        ("metric", "index", 7.5),
    ]
    said = [one.reason for one in found if isinstance(one, Bad)]
    for reason in ("finite", "greater than or equal to 0", "'rumour'", "a time with its zone"):
        assert sum(reason in one for one in said) == 1, reason
    assert len(said) == 4
    assert len({one.where for one in found if isinstance(one, Bad)}) == 4
    assert await read(source) == await read(source)
    again = {one.row.event_id for one in await read(source) if isinstance(one, Good)}
    assert again == {one.row.event_id for one in found if isinstance(one, Good)}


async def test_a_time_may_be_a_time_in_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.parquet"
    row = {"kind": "metric", "occurred_at": STARTS, "name": "m", "value": 1.0}
    pq.write_table(pa.Table.from_pylist([row] * 5000), path, row_group_size=1000)
    found = await read(ParquetSource("m", str(path)))
    assert len(found) == 5000
    assert len({one.row.event_id for one in found if isinstance(one, Good)}) == 1, "one row, however often"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.csv", None, "cannot be read"),
        ("empty.csv", b"", "has no column kind and no occurred_at"),
        ("other.csv", b"occurred_at,price\n", "has no column kind"),
        ("cut.csv.gz", gzip.compress(csv_of(ROWS).encode() * 100)[:-50], "cannot be read"),
        ("not.csv.gz", b"kind,occurred_at\n", "cannot be read"),
        ("none.parquet", None, "cannot be read"),
        ("not.parquet", b"PAR1 or so", "cannot be read"),
    ],
)
async def test_a_file_that_is_none_says_why(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    kind = ParquetSource if name.endswith("parquet") else CsvSource
    with pytest.raises(GiveUpError, match=reason):
        await read(kind("x", str(path)))


async def test_a_row_with_too_many_cells_is_bad_alone(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(
        "kind,occurred_at,name,value\nmetric,2026-11-20T10:00:00Z,m,1,2,3\nmetric,2026-11-20T10:00:00Z,m,1\n"
    )
    wide, right = await read(CsvSource("x", str(path)))
    assert isinstance(wide, Bad)
    assert (wide.where, "more cells" in wide.reason) == ("facts.csv line 2", True)
    assert isinstance(right, Good)


async def test_without_pyarrow_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(GiveUpError, match=r"pip install 'ratchet\[parquet\]'"):
        await read(ParquetSource("x", str(tmp_path / "facts.parquet")))


# an endpoint ------------------------------------------------------------------------------------
def metrics(count: int) -> list[dict[str, Any]]:
    times = [(STARTS + timedelta(seconds=n)).isoformat() for n in range(count)]
    return [{"kind": "metric", "occurred_at": at, "metric": {"name": "m", "value": n}} for n, at in enumerate(times)]


async def test_an_endpoint_is_asked_page_by_page(endpoint: StandIn) -> None:
    endpoint.facts, endpoint.page = metrics(25), 10
    found = await read(HttpSource("x", endpoint.url, token="secret"))
    assert [one.row.value for one in found if isinstance(one, Good)] == list(range(25))
    assert [query["from"] for query in endpoint.asked] == [endpoint.facts[n]["occurred_at"] for n in (0, 10, 20)]
    assert {(query["to"], query["market"]) for query in endpoint.asked} == {(ENDS.isoformat(), "iron")}
    assert set(endpoint.authorizations) == {"Bearer secret"}


async def test_what_lies_beyond_a_page_is_left_to_the_next_one(endpoint: StandIn) -> None:
    """An endpoint that says ``next`` and still sends more than it should: nothing is read twice."""
    facts = metrics(4)
    endpoint.script = [lambda query: answered(facts, next=facts[2]["occurred_at"]), lambda query: answered(facts)]
    found = await read(HttpSource("x", endpoint.url))
    assert [one.row.value for one in found if isinstance(one, Good)] == [0, 1, 2, 3]


async def test_a_busy_endpoint_is_asked_again_when_it_says(endpoint: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[str | None, int]] = []

    def noted(header: str | None, attempt: int, now: datetime, *, most_s: float) -> float:
        waits.append((header, attempt))
        return 0.0

    monkeypatch.setattr(source_http, "retry_after_s", noted)
    endpoint.facts = metrics(1)
    endpoint.script = [refused(429, **{"Retry-After": "7"}), refused(503), hangs]
    assert len(await read(HttpSource("x", endpoint.url, timeout_s=0.2))) == 1
    assert waits == [("7", 0), (None, 1), (None, 2)]
    endpoint.always = refused(500)
    with pytest.raises(RetryLaterError, match="it answered 500, 4 times"):
        await read(HttpSource("x", endpoint.url))
    assert len(endpoint.asked) == 8


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (refused(404), "it answered 404"),
        (lambda query: RedirectResponse("http://127.0.0.1:1/elsewhere"), "it answered 307"),
        (lambda query: Response("<html>"), "did not answer with JSON"),
        (lambda query: Response('{"facts": {}}'), "must answer with"),
        (lambda query: Response("7"), "must answer with"),
        (lambda query: answered([], next=STARTS.isoformat()), "goes no further"),
        (lambda query: answered([], next="later"), "a time with its zone"),
        (lambda query: Response(b"[" + b" " * source_http.MAX_BYTES + b"]"), "with over 16,777,216 bytes"),
    ],
)
async def test_an_answer_that_is_none_says_why(endpoint: StandIn, answer: Any, reason: str) -> None:
    endpoint.always = answer
    with pytest.raises(GiveUpError, match=reason):
        await read(HttpSource("x", endpoint.url))
    assert len(endpoint.asked) == 1


async def test_a_list_of_facts_will_do_and_what_is_no_object_in_it_is_bad(endpoint: StandIn) -> None:
    endpoint.always = lambda query: Response(
        '[7, {"kind": "metric", "occurred_at": "2026-11-20T10:00:00Z", "metric": NaN}]'
    )
    first, second = await read(HttpSource("x", endpoint.url))
    assert isinstance(first, Bad)
    assert isinstance(second, Bad)
    assert "a JSON object" in first.reason


async def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_http, "retry_after_s", lambda *of, most_s: 0.0)
    with pytest.raises(RetryLaterError, match="cannot be pulled now"):
        await read(HttpSource("x", "http://127.0.0.1:1/facts"))
