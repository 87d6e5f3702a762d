"""What the demo's screen shows, asked of the database several times a second."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.rows import dict_row

from services.demo import report_sql
from services.demo.report_domain import Measured, t_interval

SHOWN_STATE = """
select (select count(*) from windows where state = 'closed' and trajectories > 0)   as closed,
       (select count(distinct s.window_id) from settlements s join windows w using (window_id)
         where s.state = 'settled' and w.trajectories > 0)                            as settled,
       (select count(*) from trajectories where policy = :'policy')                   as trajectories,
       (select count(*) from groups where state in ('scored', 'tie'))                 as groups,
       (select count(*) from groups where state = 'tie')                              as ties,
       (select judge from groups where judge is not null order by judged_at desc limit 1) as judge,
       (select count(*) from batches where state = 'trained')                         as batches,
       (select batch_id from batches where state = 'claimed' limit 1)                 as training,
       (select count(distinct window_id) from assignments)                            as measured"""

SHOWN_VERSIONS = """
select m.version, d.state, d.share, d.reason, d.evidence
  from models m left join deployments d using (policy, version)
 where m.policy = :'policy'
 order by m.number"""


@dataclass(frozen=True)
class Running:
    """A version as it stands. ``reward`` is its mean reward of record with the interval over windows."""

    version: str
    state: str
    share: float
    reason: str | None
    evidence: Mapping[str, Any]
    windows: int
    mean: float | None
    reward: Measured | None


@dataclass(frozen=True)
class Progress:
    closed: int = 0
    settled: int = 0
    trajectories: int = 0
    groups: int = 0
    ties: int = 0
    judge: str | None = None
    batches: int = 0
    training: str | None = None
    measured: int = 0
    versions: list[Running] = field(default_factory=list)


class Watcher:
    """One connection to the demo's database, opened again after a restart. Reads only."""

    def __init__(self, url: str, policy: str = "default") -> None:
        self._url = url
        self._policy = policy
        self._connection: psycopg.Connection[dict[str, Any]] | None = None
        self._last = Progress()

    def rows(self, statement: str, **variables: Any) -> list[dict[str, Any]]:
        """Run one of the report's statements. Raises psycopg.Error."""
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.connect(self._url, autocommit=True, connect_timeout=5, row_factory=dict_row)
        query = report_sql.for_psycopg(statement).encode()
        return self._connection.execute(query, {"policy": self._policy, **variables}).fetchall()

    def progress(self) -> Progress:
        """How far it is; what was last seen where the database does not answer."""
        try:
            [state] = self.rows(SHOWN_STATE)
            rewards: dict[str, list[tuple[int, float]]] = defaultdict(list)
            for row in self.rows(report_sql.REWARDS_BY_WINDOW):
                rewards[row["version"]].append((row["runs"], row["reward"]))
            versions = [self._running(row, rewards[row["version"]]) for row in self.rows(SHOWN_VERSIONS)]
            self._last = Progress(**state, versions=versions)
        except psycopg.Error:
            self.close()
        return self._last

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @staticmethod
    def _running(row: dict[str, Any], rewards: list[tuple[int, float]]) -> Running:
        runs = sum(count for count, _ in rewards)
        return Running(
            row["version"],
            row["state"] or "trained",
            row["share"] or 0.0,
            row["reason"],
            row["evidence"] or {},
            len(rewards),
            sum(count * reward for count, reward in rewards) / runs if runs else None,
            t_interval([reward for _, reward in rewards]),
        )
