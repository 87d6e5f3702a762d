"""What the demo's report stands on: every statement asked once, and what they say, typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from services.demo import report_sql
from services.demo.report_domain import Claim, Measured, Version, claim

BASE = "v0"


class Rows(Protocol):
    def rows(self, statement: str, **variables: Any) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Report:
    """Everything that the page shows. ``after`` are the measured version's window differences to the base."""

    totals: dict[str, Any]
    versions: list[Version]
    labels: list[dict[str, Any]]
    rewards: list[dict[str, Any]]
    oracle: list[dict[str, Any]]
    decisions: list[dict[str, Any]]
    after: list[dict[str, Any]]
    claim: Claim
    options: Mapping[str, Any]
    restarts: Mapping[str, int]
    seconds: float
    made_at: datetime

    @property
    def oracle_mean(self) -> float | None:
        return sum(row["reward"] for row in self.oracle) / len(self.oracle) if self.oracle else None


def gather(
    source: Rows,
    *,
    sabotaged: str | None,
    options: Mapping[str, Any],
    restarts: Mapping[str, int],
    seconds: float,
) -> Report:
    """Ask every statement of ``report_sql`` and judge what they say."""
    versions = [version_of(row) for row in source.rows(report_sql.VERSIONS)]
    after = {
        version.version: source.rows(report_sql.AFTER_PROMOTION, version=version.version)
        for version in versions
        if version.was_trained and version.passed_its_test
    }
    found = claim(versions, {name: [row["difference"] for row in rows] for name, rows in after.items()}, sabotaged)
    return Report(
        totals=source.rows(report_sql.TOTALS)[0],
        versions=versions,
        labels=source.rows(report_sql.LABELS),
        rewards=source.rows(report_sql.REWARDS_BY_WINDOW),
        oracle=source.rows(report_sql.ORACLE_BY_WINDOW),
        decisions=source.rows(report_sql.DECISIONS),
        after=after.get(found.measured_version or "", []),
        claim=found,
        options=options,
        restarts=restarts,
        seconds=seconds,
        made_at=datetime.now(UTC),
    )


def version_of(row: Mapping[str, Any]) -> Version:
    """A row of ``report_sql.VERSIONS``."""
    measured = None
    if row["lower"] is not None:
        measured = Measured(row["paired_windows"], row["difference"], row["lower"], row["upper"])
    return Version(
        version=row["version"],
        parent=row["parent"],
        method=row["method"],
        batch_groups=row["batch_groups"],
        batch_trained=row["batch_trained"] if row["batch_id"] else None,
        note=row["note"],
        state=row["state"],
        share=row["share"] or 0.0,
        reason=row["reason"],
        control=row["control"],
        decided_at=row["decided_at"],
        evidence=row["evidence"] or {},
        windows=row["windows"] or 0,
        runs=int(row["runs"] or 0),
        reward=None if row["reward"] is None else float(row["reward"]),
        difference=measured,
    )
