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
        facts = await self.pool.fetchval(
            """select facts from settlements where window_id = $1 and state = 'settled'
                order by revision desc limit 1""",
            window_id,
        )
        known = await self.pool.fetch(
            """select data from outcomes where kind = 'knowledge' and window_id = $1 and agent_id is null
                order by occurred_at, sequence""",
            window_id,
        )
        about = await self.pool.fetch(
            """select o.agent_id, o.trajectory_id, o.kind, o.data
                 from outcomes o join unnest($1::text[], $2::text[]) as k (agent_id, trajectory_id)
                using (agent_id, trajectory_id)
                order by o.occurred_at, o.sequence""",
            [agent_id for agent_id, _ in keys],
            [trajectory_id for _, trajectory_id in keys],
        )
        runs: dict[RunKey, list[dict[str, Any]]] = {key: [] for key in keys}
        for row in about:
            data = row["data"]
            fact = (
                {"knowledge": data["data"]}
                if row["kind"] == "knowledge"
                else {"name": data["name"], "value": data["value"], "note": data.get("note")}
            )
            runs[(row["agent_id"], row["trajectory_id"])].append(fact)
        return Hindsight(facts or {}, [row["data"]["data"] for row in known], runs)
