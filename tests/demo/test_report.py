"""The report: from rows to numbers, page and picture, on a small database whose numbers are known."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from services.demo import report, report_facts, report_sql
from services.demo.progress import Watcher
from services.demo.report_domain import t_interval
from services.demo.screen import Screen, against, one_line

START = datetime(2026, 11, 20, 10, tzinfo=UTC)
WINDOWS = 14
PROMOTED_AT = START + timedelta(seconds=4 * 4)  # window 4 is the first that begins after it
HOSTILE = "<script>alert('v1')</script>"


def lift(window: int) -> float:
    return 0.3 + 0.02 * (window % 3)


@pytest.fixture
def canned(database_url: str) -> Iterator[Watcher]:
    """Three versions, fourteen windows: v1 earns ``lift`` more than v0 in each scenario, v2 was rolled back."""
    with psycopg.connect(database_url, autocommit=True) as c:
        for name in ("a" * 64, "b" * 64, "c" * 64):
            c.execute(
                "insert into artifacts (sha256, uri, size_bytes, files) values (%s, 'file:///x', 1, '{}')", [name]
            )
        for number in (1, 2):
            c.execute(
                "insert into batches (batch_id, policy, parent_version, method, state, lease_until, groups,"
                " trajectories) values (%s, 'default', %s, 'grpo', 'trained', now(), 9, 72)",
                [f"b{number}", f"v{number - 1}"],
            )
        models = ((0, None, None, "base", "a"), (1, "v0", "b1", "grpo", "b"), (2, "v1", "b2", "grpo", "c"))
        for number, parent, batch, method, letter in models:
            c.execute(
                "insert into models (policy, version, number, parent, batch_id, method, artifact_sha256, note)"
                " values ('default', %s, %s, %s, %s, %s, %s, %s)",
                [f"v{number}", number, parent, batch, method, letter * 64, HOSTILE if number == 1 else None],
            )
        rows = (
            ("v0", "superseded", 0.25, "first version", "{}", START),
            (
                "v1",
                "promoted",
                0.75,
                "its reward is higher",
                '{"n": 4, "mean": 0.3, "lower": 0.1, "upper": 0.5}',
                PROMOTED_AT,
            ),
            ("v2", "rolled_back", 0.0, "worse", '{"n": 5, "mean": -0.3}', START + timedelta(seconds=30)),
        )
        for version, state, share, reason, evidence, decided in rows:
            c.execute(
                "insert into deployments (policy, version, state, share, reason, evidence, control, decided_at)"
                " values ('default', %s, %s, %s, %s, %s, 'v0', %s)",
                [version, state, share, reason, evidence, decided],
            )
        for window in range(WINDOWS):
            _window(c, window)
    watcher = Watcher(database_url)
    yield watcher
    watcher.close()


def _window(c: psycopg.Connection[Any], window: int) -> None:
    starts = START + timedelta(seconds=4 * window)
    window_id = f"w{window:02d}"
    c.execute(
        "insert into windows (window_id, starts_at, ends_at, length_s, state, trajectories)"
        " values (%s, %s, %s, 4, 'closed', 4)",
        [window_id, starts, starts + timedelta(seconds=4)],
    )
    c.execute(
        "insert into outcomes (source, event_id, kind, occurred_at, sequence, name, value, data)"
        " values ('market', gen_random_uuid(), 'metric', %s, %s, 'oracle_reward', 0.5, '{}')",
        [starts + timedelta(seconds=3), window],
    )
    for scenario in ("iron", "gold"):
        noise = 0.4 if scenario == "iron" else -0.4  # shared by both arms, and gone from their difference
        for version, reward in (("v0", noise), ("v1", noise + lift(window))):
            run = f"{window_id}-{scenario}-{version}"
            c.execute(
                "insert into trajectories (agent_id, trajectory_id, policy, window_id, scenario_id, started_at,"
                " first_sequence) values ('agent', %s, 'default', %s, %s, %s, 1)",
                [run, window_id, scenario, starts],
            )
            c.execute(
                "insert into assignments (agent_id, trajectory_id, policy, window_id, scenario_id, version, reward,"
                " counted) values ('agent', %s, 'default', %s, %s, %s, %s, %s)",
                [run, window_id, scenario, version, reward, reward],
            )


def gathered(canned: Watcher) -> report_facts.Report:
    options = {"windows": WINDOWS, "agents": 2, "seed": 7, "window_s": 4, "judge": "outcome"}
    return report_facts.gather(canned, sabotaged=None, options=options, restarts={"recorder": 1}, seconds=61.0)


def test_the_numbers_are_those_of_the_rows(canned: Watcher) -> None:
    found = gathered(canned)
    assert found.claim.closed
    assert found.claim.measured_version == "v1"
    expected = t_interval([lift(window) for window in range(4, WINDOWS)])
    assert expected is not None
    assert found.claim.measured is not None
    assert vars(found.claim.measured) == pytest.approx(vars(expected))
    base, first, second = found.versions
    assert (base.windows, base.runs, base.difference) == (WINDOWS, 2 * WINDOWS, None)
    assert base.reward == pytest.approx(0.0)
    assert first.difference is not None
    assert vars(first.difference) == pytest.approx(vars(t_interval([lift(w) for w in range(WINDOWS)])))
    assert (second.windows, second.reward, second.difference) == (0, None, None)
    assert found.oracle_mean == pytest.approx(0.5)
    assert found.totals["trajectories"] == 4 * WINDOWS


def test_sql_alone_finds_the_measure_again(canned: Watcher) -> None:
    """The statement that docs give to the reader says what the report says."""
    [row] = canned.rows(report_sql.MEASURE, version="v1")
    measured = gathered(canned).claim.measured
    assert measured is not None
    assert row["windows"] == measured.n
    for name in ("lower", "upper"):
        assert float(row[name]) == pytest.approx(getattr(measured, name), abs=1e-6)
    assert float(row["difference"]) == pytest.approx(measured.mean)


def test_every_statement_runs(canned: Watcher) -> None:
    for statement in report_sql.STATEMENTS.values():
        canned.rows(statement, version="v1")


def test_the_page_is_whole_and_trusts_no_text(canned: Watcher, tmp_path: Path) -> None:
    found = gathered(canned)
    report.write(found, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "The loop closed." in page
    assert "data:image/png;base64," in page
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert "recorder: 1 times" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "the page must need nothing else"
    for statement in report_sql.STATEMENTS.values():
        assert statement in html.unescape(page)


def test_a_demo_that_was_ended_at_once_has_a_report_too(database_url: str, tmp_path: Path) -> None:
    watcher = Watcher(database_url)
    found = report_facts.gather(watcher, sabotaged="v2", options={"seed": 1}, restarts={}, seconds=1.0)
    watcher.close()
    report.write(found, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "The loop did not close." in page
    assert "0 of 2 versions were trained" in page
    assert not found.claim.closed


def test_the_end_on_the_screen_and_as_json(
    canned: Watcher, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    monkeypatch.setenv("COLUMNS", "200")
    found = gathered(canned)
    report.tell(found, tmp_path, as_json=False)
    screen = capsys.readouterr().out
    assert "rolled back: worse" in screen
    assert "The loop closed: v1 earns" in screen
    report.tell(found, tmp_path, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["closed"] is True
    assert told["versions"][1]["against_base"]["n"] == WINDOWS
    assert told["totals"]["trajectories"] == 4 * WINDOWS


def test_progress_is_what_the_database_says_and_stays_when_it_is_away(
    canned: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = canned.progress()
    assert (progress.closed, progress.trajectories, progress.batches) == (WINDOWS, 4 * WINDOWS, 2)
    assert [version.version for version in progress.versions] == ["v0", "v1", "v2"]
    assert progress.versions[1].reward is not None
    assert against(progress.versions[1]) == "+0.300 [+0.100, +0.500] in 4 windows"
    assert "v1 promoted 75%" in one_line(progress)
    monkeypatch.setenv("COLUMNS", "160")
    screen = Screen(WINDOWS, 2, quiet=True)
    screen.show(progress, {"recorder": 2})
    with screen.console.capture() as captured:
        screen.console.print(screen.picture())
    assert "started again: recorder 2x" in captured.get()
    assert "rolled back: worse" in captured.get()
    canned.close()
    canned._url = "postgresql://nobody@127.0.0.1:1/nowhere"
    assert canned.progress() == progress


def test_docs_give_the_statements_that_the_report_runs() -> None:
    told = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    for name, statement in report_sql.STATEMENTS.items():
        assert f"## {name}\n\n```sql\n{statement};\n```\n" in told
