"""The stream of outcomes: where it ends, how far we have stored it, and the way in for what we pull ourselves."""

from __future__ import annotations

from nats.errors import Error as NatsError

from services.outcome_tracker.pull_domain import Bad, Good
from services.outcome_tracker.settling_domain import Mark, Position
from shared import subjects
from shared.bus import Bus, header_safe
from shared.errors import RetryLaterError
from shared.streams import ack_floor, stream_end


class OutcomeStream:
    """The end is read first: what the floor has then reached is at least what the end demands."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def position(self) -> Position:
        end = await stream_end(self.bus, subjects.TRACKER_OUTCOMES.stream)
        floor = await ack_floor(self.bus, subjects.TRACKER_OUTCOMES)
        return Position(Mark(end.created, end.sequence), floor)


class OutcomeDoor:
    """What is pulled comes in where the world's facts do."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def publish(self, fact: Good) -> None:
        """The message id bears the content: a row that changed under its own id has to be seen, not dropped."""
        message_id = f"{fact.row.source}:{fact.row.event_id}:{fact.sha256}"
        await self.bus.publish(subjects.outcomes(fact.row.source), fact.data, message_id)

    async def bury(self, source: str, bad: Bad) -> bool:
        """The stream of dead letters knows an id for a day: a row that is read again and again lies there once."""
        headers = {
            "Nats-Msg-Id": f"dead:pulled:{source}:{bad.key}",
            "Ratchet-Reason": header_safe(f"{bad.where}: {bad.reason}"),
            "Ratchet-Subject": subjects.outcomes(source),
        }
        try:
            ack = await self.bus.js.publish(f"dead.{subjects.TRACKER_OUTCOMES.durable}", bad.data, headers=headers)
        except (NatsError, OSError, TimeoutError) as error:
            raise RetryLaterError(f"a bad row of {source} could not be kept: {error!r}") from error
        return not ack.duplicate
