"""The demo's report: what SQL says, as a page, a picture, a table on the screen or JSON."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.demo import report_sql
from services.demo.report_domain import INTERVAL_WINDOWS, MEASURE_WINDOWS, Measured, Version
from services.demo.report_facts import BASE, Report
from services.demo.report_picture import draw


def write(report: Report, directory: Path) -> None:
    """``report.png`` and ``report.html``, which holds the picture and needs nothing else."""
    from jinja2 import Environment, FileSystemLoader

    draw(report, directory / "report.png")
    picture = base64.b64encode((directory / "report.png").read_bytes()).decode()
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters |= {"signed": signed, "interval": interval, "verdict": verdict}
    page = environment.get_template("report_page.jinja").render(
        report=report,
        picture=picture,
        statements=report_sql.STATEMENTS,
        measure_windows=MEASURE_WINDOWS,
        interval_windows=INTERVAL_WINDOWS,
        base=BASE,
    )
    (directory / "report.html").write_text(page)


def tell(report: Report, directory: Path, *, as_json: bool) -> None:
    """The end on the screen: a table of versions and the verdict, or one JSON document."""
    if as_json:
        sys.stdout.write(json.dumps(as_plain(report, directory), indent=2, allow_nan=False) + "\n")
        return
    from services.terminal.output import console, table

    screen = console()
    screen.print(table("Versions", VERSION_COLUMNS, version_rows(report.versions), right=VERSION_COLUMNS[4:8]))
    screen.print(headline(report), markup=False)
    screen.print(f"Report: {directory / 'report.html'}", markup=False, soft_wrap=True)


VERSION_COLUMNS = (
    "version",
    "parent",
    "trained on",
    "state",
    "share",
    "windows",
    "runs",
    "reward",
    "against v0 [95 %]",
)


def version_rows(versions: Sequence[Version]) -> list[tuple[str, ...]]:
    return [
        (
            version.version,
            version.parent or "-",
            trained_on(version),
            verdict(version),
            f"{version.share:.0%}",
            str(version.windows),
            str(version.runs),
            signed(version.reward),
            interval(version.difference),
        )
        for version in versions
    ]


def trained_on(version: Version) -> str:
    if version.batch_trained is None:
        return version.method
    return f"{version.batch_trained} runs of {version.batch_groups} groups, {version.method}"


def verdict(version: Version) -> str:
    """State and reason in words."""
    match version.state:
        case None:
            return "trained"
        case "rolled_back":
            return f"rolled back: {version.reason}"
        case "refused" | "held":
            return version.reason or version.state
        case "canary":
            return "on trial"
    return f"{version.state}: {version.reason}" if version.reason else version.state


def headline(report: Report) -> str:
    """The claim in one sentence, or what is missing for it."""
    if not report.claim.closed:
        return "The loop did not close: " + "; ".join(report.claim.missing) + "."
    measured = report.claim.measured
    assert measured is not None
    return (
        f"The loop closed: {report.claim.measured_version} earns {measured.mean:+.3f} a run more than the concurrent "
        f"base, 95 % interval [{measured.lower:+.3f}, {measured.upper:+.3f}] over {measured.n} windows."
    )


def signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def interval(measured: Measured | None) -> str:
    if measured is None:
        return "-"
    return f"{measured.mean:+.3f} [{measured.lower:+.3f}, {measured.upper:+.3f}]"


def as_plain(report: Report, directory: Path) -> dict[str, Any]:
    """The report as JSON, for programs."""
    measured = report.claim.measured
    return {
        "closed": report.claim.closed,
        "missing": report.claim.missing,
        "version": report.claim.measured_version,
        "difference": None if measured is None else vars(measured),
        "versions": [
            {
                "version": v.version,
                "parent": v.parent,
                "method": v.method,
                "state": v.state,
                "reason": v.reason,
                "trained_runs": v.batch_trained,
                "windows": v.windows,
                "runs": v.runs,
                "reward": v.reward,
                "against_base": None if v.difference is None else vars(v.difference),
            }
            for v in report.versions
        ],
        "totals": report.totals,
        "oracle": report.oracle_mean,
        "options": dict(report.options),
        "restarts": dict(report.restarts),
        "seconds": round(report.seconds, 1),
        "directory": str(directory),
    }
