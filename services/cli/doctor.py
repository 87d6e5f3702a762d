"""`ratchet doctor`: every part an installation stands on, each with a verdict and what mends it."""

from __future__ import annotations

import typer

from services.terminal.output import AsJson, console, print_json, table

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(as_json: AsJson = False) -> None:
    """Look at configuration, broker, streams, consumers, database, artifacts, judge, training, data quality."""
    from dataclasses import asdict

    from services.cli import checks
    from services.terminal import session

    found = session.run(checks.examine())
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        rows = [(f.verdict, f.part, f.detail, f.mend or "") for f in found]
        columns = ("verdict", "part", "what was found", "what mends it")
        console().print(table("", columns, rows, wrap=columns[2:], bold=columns[:1]))
        worst = [verdict for verdict in ("fail", "warn") if any(f.verdict == verdict for f in found)]
        console().print(_summary(worst), style=STYLES[worst[0]] if worst else STYLES["ok"])
    if any(finding.verdict == "fail" for finding in found):
        raise typer.Exit(1)


def _summary(worst: list[str]) -> str:
    match worst:
        case ["fail", *_]:
            return "Something is broken: mend what says fail, then look again."
        case ["warn"]:
            return "It works; what says warn wants a look."
        case _:
            return "All is well."
