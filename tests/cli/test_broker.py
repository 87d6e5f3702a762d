"""Least privilege at the broker: each user does its work, and whatever else it tries is refused by the real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.aio.client import Client
from ratchet_sdk import Recorder
from ratchet_sdk.events import message_id, uuid7

from services.admin.commands import subscribe
from services.admin.keys import KeyBucket
from services.admin.store import Credentials
from services.gateway.keys import KeyTable
from services.gateway.keys_domain import Denied, Limited
from services.local import broker
from services.local.agent_keys import issue_gateway_key, kept_key
from services.local.embedded import NatsServer
from shared import subjects
from shared.bus import Bus
from shared.database import Pool
from shared.service import presence
from shared.streams import provision

AGENT, OTHER = "agent-1", "agent-2"
STREAMS = [stream.name for stream in subjects.STREAMS]
BUCKET, KEYS = f"KV_{subjects.ROUTES_BUCKET}", f"KV_{subjects.KEYS_BUCKET}"
STORED = (
    "steps.agent-2",
    "calls.agent-1",
    "outcomes.market",
    "window.closed",
    "window.resolved",
    "group.scored",
    "model.trained",
)
COMMANDS = (
    "command.recorder.close_window",
    "command.trainer.train",
    "command.deployer.deploy",
    "command.admin.add_agent",
)
API = [
    f"$JS.API.{verb}"
    for stream in (*STREAMS, BUCKET, KEYS)
    for verb in (
        *(f"STREAM.{what}.{stream}" for what in ("INFO", "CREATE", "UPDATE", "DELETE", "PURGE", "SNAPSHOT", "RESTORE")),
        *(f"STREAM.{what}.{stream}" for what in ("MSG.GET", "MSG.DELETE", "LEADER.STEPDOWN", "PEER.REMOVE")),
        *(f"{what}.{stream}" for what in ("DIRECT.GET", "CONSUMER.CREATE", "CONSUMER.NAMES", "CONSUMER.LIST")),
        *(
            f"CONSUMER.{what}.{stream}.recorder"
            for what in ("CREATE", "DURABLE.CREATE", "DELETE", "INFO", "MSG.NEXT", "PAUSE", "UNPIN", "RESET")
        ),
    )
] + ["$JS.API.INFO", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.LIST", "$JS.API.DIRECT.GET.STEPS.steps.agent-2"]
FORBIDDEN = [
    *STORED,
    *COMMANDS,
    *API,
    "steps",
    "steps.agent-1.more",
    "calls.agent-1",
    "calls.agent-2",
    "training.progress",
    "model.deployed",
    "model.rolled_back",
    "dead.recorder",
    "gateway.health",
    "$KV.routes.default",
    "$O.artifacts.C.chunk",
    "$O.artifacts.M.meta",
    "$JS.ACK.STEPS.recorder.1.1.1.1700000000000000000.0",
    "$JS.ACK._.hash.STEPS.recorder.1.1.1.1700000000000000000.0.x",
    "$JS.FC.STEPS.recorder.x",
    "$SYS.REQ.SERVER.PING",
    "$SYS.REQ.ACCOUNT.PING.CONNZ",
    "_INBOX_agent-2.x",
    "_INBOX_recorder.x",
]
UNHEARD = [
    *(
        ">",
        "*",
        "*.*",
        "steps.>",
        "steps.*",
        "steps.agent-1",
        "calls.>",
        "outcomes.>",
        "window.*",
        "model.>",
        "dead.>",
        "command.>",
    ),
    *(
        "_INBOX.>",
        "_INBOX_agent-2.>",
        "_INBOX_recorder.>",
        "_INBOX_operator.>",
        "_R_.>",
        "$JS.>",
        "$SYS.>",
        "$KV.>",
        "$O.>",
    ),
]

Connect = Callable[..., Awaitable[Client]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    made = NatsServer(tmp_path / "nats")
    made.start()
    yield made
    made.stop()


@pytest.fixture
async def operator(server: NatsServer) -> AsyncIterator[Bus]:
    async with AsyncExitStack() as stack:
        opened = Bus(server.url, name="operator")
        await opened.connect()
        stack.push_async_callback(opened.close)
        await provision(opened)
        yield opened


@pytest.fixture
def seeds(server: NatsServer, operator: Bus, tmp_path: Path) -> dict[str, Path]:
    """Two agents, let in while the broker runs: the files of their seeds."""
    files = {name: tmp_path / f"{name}.nk" for name in (AGENT, OTHER)}
    server.admit({name: kept_key(path) for name, path in files.items()})
    return files


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """``await connect(url, name, faults, ...)``: what the server refuses is noted in ``faults``."""
    async with AsyncExitStack() as stack:

        async def open_one(url: str, name: str, faults: list[str], **options: Any) -> Client:
            async def note(error: Exception) -> None:
                faults.append(str(error))

            client = await nats.connect(url, inbox_prefix=f"_INBOX_{name}", error_cb=note, **options)
            stack.push_async_callback(client.close)
            return client

        yield open_one


async def state(operator: Bus) -> dict[str, Any]:
    """What an attack could have changed: messages, configuration and consumers of every stream there is."""
    found = {}
    for name in sorted(info.config.name or "" for info in await operator.js.streams_info()):
        info = await operator.js.stream_info(name)
        consumers = [
            (c.name, c.config.as_dict(), c.num_pending, c.num_ack_pending, c.ack_floor)
            for c in await operator.js.consumers_info(name)
        ]
        found[name] = (info.config.as_dict(), info.state.messages, info.state.first_seq, info.state.last_seq, consumers)
    return found


async def heard_out(client: Client) -> None:
    """Until the server has answered all that was said: nats-py's flush overtakes what still waits to be written."""
    while client.pending_data_size:
        await asyncio.sleep(0)
    await client.flush()


async def publish_each(client: Client, wanted: list[str], **more: Any) -> None:
    for subject in wanted:
        await client.publish(subject, b"{}", **more)
    await heard_out(client)


async def test_an_agent_publishes_its_own_events_with_acks(
    server: NatsServer, operator: Bus, seeds: dict[str, Path]
) -> None:
    async with Recorder(server.address, AGENT, credentials=seeds[AGENT]) as recorder:
        async with recorder.trajectory() as run:
            for _ in range(20):
                async with run.step():
                    pass
        assert await recorder.flush() == 0
    info = await operator.js.stream_info("STEPS", subjects_filter=">")
    assert info.state.subjects == {"steps.agent-1": 22}


async def test_an_agent_is_refused_everything_else(
    server: NatsServer, operator: Bus, seeds: dict[str, Path], connect: Connect
) -> None:
    await operator.publish("steps.agent-2", b"{}", "theirs")
    before = await state(operator)
    faults: list[str] = []
    client = await connect(server.address, AGENT, faults, nkeys_seed=str(seeds[AGENT]))
    await publish_each(client, FORBIDDEN)
    assert [fault.lower() for fault in faults] == [
        f'nats: permissions violation for publish to "{subject}"'.lower() for subject in FORBIDDEN
    ]
    faults.clear()
    heard: list[str] = []
    for subject in UNHEARD:
        for queue in ("", "recorder"):

            async def hear(message: Any) -> None:
                heard.append(message.subject)

            await client.subscribe(subject, queue, cb=hear)
    await heard_out(client)
    assert len(faults) == 2 * len(UNHEARD)
    assert all("permissions violation for subscription" in fault.lower() for fault in faults)
    await operator.publish("steps.agent-1", b"{}", "mine")
    await heard_out(client)
    assert heard == []
    after = await state(operator)
    assert after.pop("STEPS")[1] == before.pop("STEPS")[1] + 1
    assert after == before


async def test_an_agent_cannot_make_the_broker_write_for_it(
    server: NatsServer, operator: Bus, seeds: dict[str, Path], connect: Connect
) -> None:
    """The ack of what it may publish goes where it says. That must not be a subject of ours."""
    before = await state(operator)
    faults: list[str] = []
    client = await connect(server.address, AGENT, faults, nkeys_seed=str(seeds[AGENT]))
    asked: list[str] = []

    async def note(message: Any) -> None:
        asked.append(message.subject)

    for subject in ("command.>", "gateway.>", "_INBOX_recorder.>", "$KV.>"):
        await operator.nc.subscribe(subject, cb=note)
    for reply in FORBIDDEN:
        await client.publish("steps.agent-1", b"{}", reply=reply)
    for header in ({"Nats-Rollup": "all"}, {"Nats-Rollup": "sub"}, {"Nats-TTL": "1s"}, {"Nats-Incr": "1"}):
        await client.publish("steps.agent-1", b"{}", headers=header)
    await heard_out(client)
    assert (await client.jetstream().publish("steps.agent-1", b"{}")).seq
    await heard_out(operator.nc)
    after = await state(operator)
    info = await operator.js.stream_info("STEPS", subjects_filter=">")
    assert set(info.state.subjects or {}) == {"steps.agent-1"}
    assert info.state.messages > 10
    assert after["STEPS"][2] <= 1, "something was purged"
    for untouched in (before, after):
        untouched.pop("STEPS")
    assert after == before
    assert asked == []


async def test_anothers_message_ids_suppress_nothing(
    server: NatsServer, operator: Bus, seeds: dict[str, Path], connect: Connect
) -> None:
    thief = (await connect(server.address, OTHER, [], nkeys_seed=str(seeds[OTHER]))).jetstream()
    async with Recorder(server.address, AGENT, credentials=seeds[AGENT]) as recorder:
        ids = [uuid7() for _ in range(5)]
        for event_id in ids:
            await thief.publish("steps.agent-2", b"{}", headers={"Nats-Msg-Id": message_id(AGENT, event_id)})
        for event_id in ids:
            recorder.publisher.offer(message_id(AGENT, event_id), b'{"mine": true}')
        assert await recorder.flush() == 0
    info = await operator.js.stream_info("STEPS", subjects_filter=">")
    assert info.state.subjects == {"steps.agent-1": 5, "steps.agent-2": 5}


async def test_what_a_stranger_has_does_not_open(server: NatsServer, seeds: dict[str, Path], tmp_path: Path) -> None:
    kept_key(tmp_path / "stranger.nk")
    for options in (
        {},
        {"user": "recorder", "password": "guess"},
        {"user": AGENT, "password": ""},
        {"nkeys_seed": str(tmp_path / "stranger.nk")},
    ):
        with pytest.raises(nats.errors.Error, match=r"(?i)authorization violation|no servers"):
            await nats.connect(server.address, allow_reconnect=False, max_reconnect_attempts=0, **options)


async def test_letting_an_agent_in_disturbs_nobody(
    server: NatsServer, operator: Bus, connect: Connect, tmp_path: Path
) -> None:
    lost: list[str] = []

    async def gone() -> None:
        lost.append("disconnected")

    first = tmp_path / "first.nk"
    server.admit({AGENT: kept_key(first)})
    clients = [
        await connect(server.url_of("recorder"), "recorder", lost, disconnected_cb=gone),
        await connect(server.address, AGENT, lost, disconnected_cb=gone, nkeys_seed=str(first)),
    ]
    server.admit({OTHER: kept_key(tmp_path / "second.nk")})
    second = await connect(server.address, OTHER, lost, nkeys_seed=str(tmp_path / "second.nk"))
    assert (await second.jetstream().publish("steps.agent-2", b"{}")).seq == 1
    assert (await clients[1].jetstream().publish("steps.agent-1", b"{}")).seq == 2
    await heard_out(clients[0])
    assert lost == []


# the services -------------------------------------------------------------------------------------
MAY = {
    "steps.agent-1": set(),
    "calls.agent-1": {"gateway"},
    "outcomes.market": {"world", "outcome_tracker"},
    "window.closed": {"recorder"},
    "window.resolved": {"outcome_tracker"},
    "group.scored": {"scorer"},
    "training.progress": {"trainer"},
    "model.trained": {"trainer"},
    "model.deployed": {"deployer"},
    "model.rolled_back": {"deployer"},
    "gateway.health": {"gateway"},
    "$KV.routes.default": {"deployer"},
    f"$KV.gateway_keys.{'0' * 64}": {"admin"},
    "$O.artifacts.C.chunk": set(),
    "dead.recorder": {"recorder"},
    "dead.scorer_window_resolved": {"scorer"},
    "command.recorder.close_window": set(),
    "command.trainer.readiness": {"admin"},
    "command.trainer.train": set(),
    "command.scorer.rescore": set(),
    "command.deployer.deploy": set(),
    "command.outcome_tracker.sync": set(),
    "command.admin.add_agent": set(),
    "ready.recorder": {"admin"},
    "ready.recorder.one": {"admin"},
    "command.admin.add_key": set(),
    "command.admin.revoke_key": set(),
    "command.admin.key_use": {"gateway"},
    "$JS.API.CONSUMER.MSG.NEXT.STEPS.recorder": {"recorder"},
    "$JS.API.CONSUMER.MSG.NEXT.LOOP.scorer_window_resolved": {"scorer"},
    "$JS.API.CONSUMER.INFO.STEPS.recorder": {"recorder", "admin"},
    "$JS.ACK.STEPS.recorder.1.1.1.1700000000000000000.0": {"recorder"},
    "$JS.ACK._.hash.LOOP.deployer_model_trained.1.1.1.1700000000000000000.0": {"deployer"},
    **{
        f"$JS.API.{verb}": set()
        for stream in (*STREAMS, BUCKET, KEYS)
        for verb in (
            *(f"STREAM.{what}.{stream}" for what in ("CREATE", "UPDATE", "DELETE", "PURGE", "MSG.GET", "MSG.DELETE")),
            f"CONSUMER.DELETE.{stream}.recorder",
            f"CONSUMER.DURABLE.CREATE.{stream}.recorder",
        )
    },
    f"$JS.API.CONSUMER.INFO.{BUCKET}.watch": {"gateway"},
    f"$JS.API.STREAM.MSG.GET.{BUCKET}": {"deployer"},
    f"$JS.API.CONSUMER.INFO.{KEYS}.watch": {"gateway", "admin"},
    f"$JS.API.STREAM.MSG.GET.{KEYS}": {"admin"},
    "$JS.API.STREAM.MSG.GET.STEPS": {"recorder"},
    "$JS.API.STREAM.PURGE.STEPS": {"recorder"},
}
HEARD = {
    "steps.agent-1": set(),
    "outcomes.market": set(),
    "window.closed": set(),
    "$KV.routes.default": set(),
    "$KV.gateway_keys.x": set(),
    "gateway.health": {"deployer"},
    "command.recorder.close_window": {"recorder"},
    "command.trainer.train": {"trainer"},
    "command.outcome_tracker.sync": {"outcome_tracker"},
    "command.scorer.rescore": {"scorer"},
    "command.deployer.rollback": {"deployer"},
    "command.admin.add_agent": {"admin"},
    "ready.recorder": {"recorder"},
    "ready.gateway.one": {"gateway"},
    **{f"_INBOX_{name}.x": {name} for name in broker.SERVICES},
    "_INBOX_agent-1.x": set(),
    "_INBOX.x": {"world"},
}


@pytest.mark.parametrize("user", [*broker.SERVICES, broker.WORLD])
async def test_no_service_does_anothers_work(server: NatsServer, operator: Bus, connect: Connect, user: str) -> None:
    for what, expected in (("publish", MAY), ("subscription", HEARD)):
        faults: list[str] = []
        client = await connect(server.url_of(user), user, faults)
        for subject in expected:
            if what == "publish":
                await client.publish(subject, b"")
            else:
                await client.subscribe(subject)
        await heard_out(client)
        refused = {fault.split('"')[1] for fault in faults if f"permissions violation for {what}" in fault.lower()}
        assert refused == {subject.lower() for subject, users in expected.items() if user not in users}


@pytest.mark.parametrize("service", broker.SERVICES)
async def test_each_service_may_say_whether_it_is_ready(server: NatsServer, connect: Connect, service: str) -> None:
    """Also one that may publish nothing at all."""
    asking = Bus(server.url_of("admin"), name="admin")
    answering = Bus(server.url_of(service), name=service)
    await asking.connect()
    await answering.connect()
    await answering.answer((f"ready.{service}", f"ready.{service}.one"), presence(service, []))
    await heard_out(answering.nc)
    for subject in (f"ready.{service}", f"ready.{service}.one"):
        assert b'"ready":true' in (await asking.nc.request(subject, timeout=5)).data
    await answering.close()
    await asking.close()


async def test_keys_reach_the_gateways_and_their_use_comes_back(server: NatsServer, operator: Bus, pool: Pool) -> None:
    credentials = Credentials(pool)
    async with connected(server, "admin") as admin, connected(server, "gateway") as gateway:
        subscribe(admin, credentials)
        await admin.broker.start()
        await admin.nc.flush()
        key = await issue_gateway_key(operator, AGENT)
        await KeyBucket(admin, credentials.gateway_keys).level()
        table = KeyTable(gateway, name="g")
        following = asyncio.create_task(table.follow())
        while isinstance(lease := table.admit(key), Denied):
            await asyncio.sleep(0.01)
        await table.report()
        assert (await credentials.gateway_keys.shown())[0]["requests_today"] == 1
        assert not isinstance(lease, Limited)
        await operator.command("admin", "revoke_key", {"agent_id": AGENT})
        while not isinstance(table.admit(key), Denied):
            await asyncio.sleep(0.01)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


@asynccontextmanager
async def connected(server: NatsServer, user: str) -> AsyncIterator[Bus]:
    bus = Bus(server.url_of(user), name=user)
    await bus.connect()
    yield bus
    await bus.close()


def test_secrets_are_read_by_their_owner_alone(server: NatsServer, seeds: dict[str, Path]) -> None:
    for path in (server.home / "nats.conf", *(server.home / "passwords").iterdir(), *seeds.values()):
        assert path.stat().st_mode & 0o077 == 0, path
    assert {path.name for path in (server.home / "passwords").iterdir()} == set(broker.USERS)
