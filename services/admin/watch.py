"""Who is there and does its work: asked over the broker, so that a process that hangs is seen by its silence."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.errors import NotFoundError
from pydantic import BaseModel, ValidationError

from services.admin import domain
from services.admin.domain import Lag, Presence, Replica
from shared import subjects
from shared.bus import Bus
from shared.errors import RatchetError

NEEDED = ("recorder", "outcome_tracker", "scorer", "trainer", "deployer", "gateway")  # without them the loop stands
ASKED = (*NEEDED, "inference", "admin")
PATIENCE_S = 3.0  # a replica that is alive answers within two
LINGER_S = 0.2  # for more replicas of a service that has answered
LOOK_S = 3.0
SECOND_LOOK_S = 1.0  # who asks for messages has been given one by then
NOBODY = "503"


class Answer(BaseModel):
    service: str
    replica: str
    name: str
    faults: list[str] = []


def _now() -> datetime:
    return datetime.now(UTC)


async def watched(bus: Bus) -> Watch:
    """For who looks once: with what the admin service remembers, and a second look at consumers that are behind."""
    watch = Watch(bus)
    with contextlib.suppress(RatchetError):
        watch.remember((await bus.command("admin", "seen", timeout_s=PATIENCE_S))["replicas"])
    await watch.look()
    if any(row["pending"] or row["unacknowledged"] for row in watch.consumers()):
        await asyncio.sleep(SECOND_LOOK_S)
        await watch.look_at_consumers()
    return watch


class Watch:
    """Remembers which replicas answered and where the consumers stood, so that it can say who fell silent and since."""

    def __init__(self, bus: Bus, now: Callable[[], datetime] = _now) -> None:
        self._bus = bus
        self._now = now
        self._known: dict[str, Replica] = {}
        self._silent: set[str] = set()
        self._connected: set[str] = set()
        self._lags: dict[str, Lag] = {}
        self._before: dict[str, Lag] = {}
        self._looked_at: datetime | None = None
        self._looking = asyncio.Lock()

    def remember(self, replicas: Iterable[dict[str, Any]]) -> None:
        """Take over what another watch knows, as ``seen`` gave it."""
        for row in replicas:
            heard_at = datetime.fromisoformat(row["heard_at"])
            self._known[row["token"]] = Replica(row["service"], row["token"], row["name"], heard_at)

    def seen(self) -> list[dict[str, Any]]:
        return [{**asdict(one), "heard_at": one.heard_at.isoformat()} for one in self._known.values()]

    async def fresh(self) -> None:
        """Look, unless that was done a moment ago."""
        async with self._looking:
            if self._looked_at is None or (self._now() - self._looked_at).total_seconds() > 2 * LOOK_S:
                await self.look()

    async def look(self) -> None:
        """Ask every service and look at every consumer. While the broker is away nobody answers; nothing is raised."""
        await asyncio.gather(self.look_at_consumers(), self._ask())
        self._looked_at = self._now()

    async def look_at_consumers(self) -> None:
        lags = await asyncio.gather(*(lag_of(self._bus, consumer) for consumer in subjects.CONSUMERS))
        self._before, self._lags = self._lags, {lag.consumer: lag for lag in lags}

    def services(self) -> list[Presence]:
        """What the last look says of each service; of those that one can do without, only where they are there."""
        found = []
        for service in ASKED:
            own = sorted((r for r in self._known.values() if r.service == service), key=lambda r: r.name)
            silent = [r for r in own if r.token in self._silent]
            answering = [r for r in own if r.token not in self._silent]
            said = domain.presence(service, answering, silent, connected=service in self._connected)
            if said.state != "absent" or service in NEEDED:
                found.append(said)
        return found

    def consumers(self) -> list[dict[str, Any]]:
        """Every durable consumer with its lag and a verdict, from the last two looks."""
        now = self._now()
        return [
            {
                **asdict(lag),
                "service": domain.service_of(name),
                "verdict": domain.verdict(lag, self._before.get(name), now),
            }
            for name, lag in self._lags.items()
        ]

    # inside -------------------------------------------------------------------------------------
    async def _ask(self) -> None:
        """All services at once; then, each by itself, the replicas that answered before and did not now.

        The broker says at once where nobody listens: who is gone is forgotten, and only who is connected is silent.
        """
        asked = {service: subjects.ready(service) for service in ASKED}
        heard, nobody = await self._gather(asked)
        lost = {token: one for token, one in self._known.items() if token not in heard}
        if lost:
            again, gone = await self._gather({t: subjects.ready(one.service, t) for t, one in lost.items()})
            heard |= again
            for token in gone:
                del self._known[token]
        self._known |= heard
        self._silent = set(self._known) - set(heard)
        self._connected = set(ASKED) - nobody if self._bus.nc.is_connected else set()

    async def _gather(self, asked: dict[str, str]) -> tuple[dict[str, Replica], set[str]]:
        """Who answered, by token, and where nobody listens, by the names in ``asked`` (name -> subject)."""
        heard: dict[str, Replica] = {}
        nobody: set[str] = set()
        if not self._bus.nc.is_connected:
            return heard, nobody
        inbox = self._bus.nc.new_inbox()
        answers = await self._bus.nc.subscribe(f"{inbox}.*")
        for name, subject in asked.items():
            await self._bus.nc.publish(subject, b"", reply=f"{inbox}.{name}")
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        try:
            while (left := deadline - asyncio.get_running_loop().time()) > 0:
                there = nobody | {one.service for one in heard.values()} | set(heard)
                if set(asked) <= nobody:
                    break
                message = await answers.next_msg(timeout=min(left, LINGER_S) if set(asked) <= there else left)
                if (message.headers or {}).get("Status") == NOBODY:
                    nobody.add(message.subject.rpartition(".")[2])
                elif answer := _answer(message.data):
                    heard[answer.replica] = Replica(
                        answer.service, answer.replica, answer.name, self._now(), tuple(answer.faults)
                    )
        except (NatsTimeoutError, NatsError):
            pass
        finally:
            await answers.unsubscribe()
        return heard, nobody


def _answer(data: bytes) -> Answer | None:
    try:
        return Answer.model_validate_json(data)
    except ValidationError:  # of another release
        return None


async def lag_of(bus: Bus, consumer: subjects.Consumer) -> Lag:
    try:
        info = await bus.js.consumer_info(consumer.stream, consumer.durable, timeout=3)
    except NotFoundError:
        return Lag(consumer.durable, consumer.stream, 0, 0, 0, 0, "it does not exist; run `ratchet migrate`")
    except (NatsError, OSError, TimeoutError) as error:
        return Lag(consumer.durable, consumer.stream, 0, 0, 0, 0, f"JetStream did not answer: {error!r}")
    places = [place for place in (info.delivered, info.ack_floor) if place and place.last_active]
    return Lag(
        consumer.durable,
        consumer.stream,
        info.num_pending or 0,
        info.num_ack_pending or 0,
        info.num_redelivered or 0,
        info.num_waiting or 0,
        floor=info.ack_floor.stream_seq if info.ack_floor else 0,
        active_at=max((place.last_active.astimezone(UTC) for place in places if place.last_active), default=None),
        ack_wait_s=consumer.ack_wait_s,
    )
