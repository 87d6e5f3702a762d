"""Just enough of a recorder for commands that wait for one: it stores runs by window and closes windows."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel
from ratchet_sdk.events import TrajectoryEnded, step_events

from shared import subjects
from shared.bus import Bus
from shared.database import Pool
from shared.delivery import Ack, Delivery, Disposition
from shared.windows import window_at


class CloseWindow(BaseModel):
    window_id: str


class TinyRecorder:
    def __init__(self, bus: Bus, pool: Pool, length_s: int = 3600) -> None:
        self.bus, self.pool, self.length_s = bus, pool, length_s
        self.closed: list[str] = []

    async def start(self) -> None:
        self.bus.consume_batches(subjects.RECORDER_STEPS, self.store)
        self.bus.on_command("recorder", "close_window", CloseWindow, self.close)
        await self.bus.broker.start()

    async def store(self, deliveries: Sequence[Delivery]) -> Sequence[Disposition]:
        for delivery in deliveries:
            event = step_events.validate_json(delivery.content())
            window = window_at(event.started_at, self.length_s)
            await self.pool.execute(
                """insert into windows (window_id, starts_at, ends_at, length_s) values ($1, $2, $3, $4)
                   on conflict do nothing""",
                window.window_id,
                window.starts_at,
                window.ends_at,
                window.length_s,
            )
            await self.pool.execute(
                """insert into trajectories (agent_id, trajectory_id, policy, window_id, scenario_id, started_at,
                                             status, first_sequence)
                   values ($1, $2, $3, $4, 's', $5, $6, $7)
                   on conflict (agent_id, trajectory_id) do update set status = excluded.status""",
                delivery.subject.split(".")[1],
                event.trajectory_id,
                event.policy,
                window.window_id,
                event.started_at,
                event.status if isinstance(event, TrajectoryEnded) else "open",
                delivery.sequence,
            )
        return [Ack() for _ in deliveries]

    async def close(self, request: CloseWindow) -> dict[str, object]:
        self.closed.append(request.window_id)
        await self.pool.execute(
            """update windows set state = 'closed', quality = 1, trajectories = 1, closed_at = now()
                where window_id = $1""",
            request.window_id,
        )
        return {"window_id": request.window_id}
