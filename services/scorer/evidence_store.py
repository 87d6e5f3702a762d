"""What a judge may look at: runs, rewards of record and hindsight. It only reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.scorer.judge import Hindsight
from shared.database import Pool
from shared.trajectories import RunKey, Trajectory, load


class EvidenceStore:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def trajectories(self, keys: Sequence[RunKey]) -> dict[RunKey, Trajectory]:
        return await load(self.pool, keys)

    async def rewards(self, keys: Sequence[RunKey]) -> dict[RunKey, float]:
        """Rewards of record; a run that has none is absent."""
        rows = await self.pool.fetch(
            """select k.agent_id, k.trajectory_id, r.reward
                 from unnest($1::text[], $2::text[]) as k (agent_id, trajectory_id),
                      lateral (select reward from rewards
                                where agent_id = k.agent_id and trajectory_id = k.trajectory_id limit 1) r""",
            [agent_id for agent_id, _ in keys],
            [trajectory_id for _, trajectory_id in keys],
        )
        return {(row["agent_id"], row["trajectory_id"]): row["reward"] for row in rows}

    async def hindsight(self, window_id: str, keys: Sequence[RunKey]) -> Hindsight:
        """What the judge may know and the agents could not."""
        row = await self.pool.fetchrow(
            """select (select facts from settlements where window_id = $1 and state = 'settled'
                        order by revision desc limit 1) as facts,
                      (select coalesce(jsonb_agg(data -> 'data' order by occurred_at, sequence), '[]')
                         from outcomes where kind = 'knowledge' and window_id = $1 and agent_id is null) as known,
                      (select coalesce(jsonb_agg(jsonb_build_array(o.agent_id, o.trajectory_id, o.kind, o.data)
                                                 order by o.occurred_at, o.sequence), '[]')
                         from outcomes o join unnest($2::text[], $3::text[]) as k (agent_id, trajectory_id)
                        using (agent_id, trajectory_id)) as about""",
            window_id,
            [agent_id for agent_id, _ in keys],
            [trajectory_id for _, trajectory_id in keys],
        )
        assert row is not None  # of scalar subqueries there is always one
        runs: dict[RunKey, list[dict[str, Any]]] = {key: [] for key in keys}
        for agent_id, trajectory_id, kind, data in row["about"]:
            fact = (
                {"knowledge": data["data"]}
                if kind == "knowledge"
                else {"name": data["name"], "value": data["value"], "note": data.get("note")}
            )
            runs[(agent_id, trajectory_id)].append(fact)
        return Hindsight(row["facts"] or {}, row["known"], runs)
