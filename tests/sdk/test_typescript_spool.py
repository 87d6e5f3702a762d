"""The spool of the agent in TypeScript: drained when the broker is back, by whoever comes, in whichever language."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from ratchet_sdk import Recorder
from ratchet_sdk import spool as module
from ratchet_sdk.events import Step
from ratchet_sdk.spool import PACKED, TRIED, Spool

from services.local.embedded import NatsServer
from shared.bus import Bus
from shared.streams import provision
from tests.sdk.stored import Stored, stored
from tests.sdk.test_recorder import CRASHING, spooled_files
from tests.sdk.typescript import agent, connected, run

KEPT = [(f"a:{n}", b'{"n": %d, "text": "\xc3\xa9 \\u0000"}' % n, (0, TRIED, PACKED)[n % 3]) for n in range(7)]
SPOOL = """
    import { Spool } from "./dist/spool.js";
    const spool = new Spool(process.env.DIRECTORY, 1e9, 150);
    await spool.open();
"""


@pytest.fixture
async def away(nats_server: NatsServer) -> NatsServer:
    """A broker that has its streams, and is away."""
    async with connected(nats_server) as bus:
        await provision(bus)
    nats_server.stop()
    return nats_server


async def what_came(server: NatsServer) -> list[Stored]:
    async with connected(server) as bus:
        return await stored(bus)


async def test_a_broker_that_comes_back_gets_what_was_spooled_before_what_is_newer(
    built: Path, away: NatsServer
) -> None:
    script = """
        const trajectory = recorder.trajectory();
        for (let n = 0; n < 600; n++) trajectory.step({ n, text: n === 7 ? "x".repeat(40_000) : "" }).end();
        await until(() => recorder.counts.spooled === 601);
        console.log("all are on disk");
        await until(() => recorder.counts.spooled < 601);
        for (let n = 600; n < 610; n++) trajectory.step({ n }).end();
        trajectory.end();
        const unsent = await recorder.close(60_000);
        const { published, spooled, dropped, refused } = recorder.counts;
        console.log([unsent, published, spooled, dropped, refused].join(" "));
    """
    async with agent(built, away.url, script) as running:
        await running.hear("all are on disk")
        away.start()
        await running.hear("0 612 0 0 0")
    messages = await what_came(away)
    assert [message.event.step for message in messages if isinstance(message.event, Step)] == list(range(610))
    assert [message.headers.get("Content-Encoding") for message in messages[7:10]] == [None, "gzip", None]
    assert [message.event.kind for message in messages[::611]] == ["trajectory.started", "trajectory.ended"]
    assert not spooled_files()


async def killed_typescript(built: Path, url: str) -> None:
    script = """
        const trajectory = recorder.trajectory({ trajectory_id: "t" });
        for (let n = 0; n < 500; n++) trajectory.step({ n, secret: "sk-" + "a".repeat(30) }).end();
        await until(() => recorder.counts.spooled === 501);
        process.kill(process.pid, "SIGKILL");
    """
    async with agent(built, url, script, ends=-signal.SIGKILL):
        pass


async def killed_python(_: Path, url: str) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", CRASHING, url)
    assert await asyncio.wait_for(process.wait(), 60) == -signal.SIGKILL


async def heir_in_typescript(built: Path, server: NatsServer) -> None:
    script = """
        await recorder.flush(0);
        await until(() => recorder.counts.spooled === 501);
        console.log("found", recorder.counts.unsent);
        recorder.trajectory({ trajectory_id: "newer" }).end();
        process.exitCode = (await recorder.close(60_000)) + recorder.counts.published - 503;
    """
    async with agent(built, server.url, script) as running:
        await running.hear("found 501")
        server.start()


async def heir_in_python(_: Path, server: NatsServer) -> None:
    async with Recorder(server.url, "agent-1") as recorder:
        while recorder.counts.spooled < 501:
            await asyncio.sleep(0.01)
        server.start()
        async with recorder.trajectory(trajectory_id="newer"):
            pass
        assert await recorder.flush(20) == 0
        assert recorder.counts.published == 503


@pytest.mark.parametrize(
    ("killed", "heir"),
    [
        (killed_typescript, heir_in_typescript),
        (killed_typescript, heir_in_python),
        (killed_python, heir_in_typescript),
    ],
)
async def test_what_a_killed_agent_had_spooled_goes_with_the_next_one(
    built: Path,
    away: NatsServer,
    killed: Callable[[Path, str], Awaitable[None]],
    heir: Callable[[Path, NatsServer], Awaitable[None]],
) -> None:
    await killed(built, away.url)
    assert [b"sk-aaa" in file.read_bytes() for file in spooled_files()] == [False]
    await heir(built, away)
    events = [message.event for message in await what_came(away)]
    assert [event.step for event in events if isinstance(event, Step)] == list(range(500))
    assert [event.trajectory_id for event in events] == ["t"] * 501 + ["newer"] * 2
    assert not spooled_files()


async def test_what_the_broker_may_have_stored_before_it_went_is_stored_once(built: Path, away: NatsServer) -> None:
    """It stops with an event in flight. The spool remembers that it was tried: a duplicate is our own event then."""
    away.start()
    if (process := getattr(away, "process", None)) is None:
        pytest.skip("a server in a container cannot be stopped with an event in flight")
    script = """
        recorder.trajectory({ goal: "connect" });
        console.log("unsent:", await recorder.flush(60_000));
        await told();
        recorder.trajectory({ goal: "be in flight" });
        await recorder.flush(200);
        console.log("it is in flight");
        await until(() => recorder.counts.spooled === 1);
        process.exitCode = (await recorder.close(0)) - 1;
    """
    async with agent(built, away.url, script) as running:
        await running.hear("unsent: 0")
        process.send_signal(signal.SIGSTOP)
        running.tell()
        await running.hear("it is in flight")
        process.kill()
        process.wait()
    spool = Spool(Path(os.environ["RATCHET_SPOOL_DIR"]) / "agent-1")
    spool.open()
    [event] = spool.read(9, 10**9)
    spool.close()
    assert event.flags == TRIED
    away.start()
    async with connected(away) as bus:  # as if it had been stored, and only the ack was lost
        await bus.js.publish("steps.agent-1", event.data, headers={"Nats-Msg-Id": event.message_id})
    async with agent(built, away.url, "process.exitCode = await recorder.close(60_000);"):
        pass
    goals = [message.event.model_dump()["goal"] for message in await what_came(away)]
    assert goals == ["connect", "be in flight"]
    assert not spooled_files()


async def test_a_flipped_byte_costs_one_event(built: Path, away: NatsServer) -> None:
    script = """
        const trajectory = recorder.trajectory();
        for (let n = 0; n < 9; n++) trajectory.step({ n }).end();
        process.exitCode = (await recorder.close(0)) - 10;
    """
    async with agent(built, away.url, script):
        pass
    [file] = spooled_files()
    data = bytearray(file.read_bytes())
    data[data.index(b'{"n":4}')] ^= 1
    file.write_bytes(data)
    away.start()
    async with agent(built, away.url, "process.exitCode = await recorder.close(60_000);") as running:
        await running.hear("were damaged and left out")
    steps = [message.event.step for message in await what_came(away) if isinstance(message.event, Step)]
    assert steps == [0, 1, 2, 3, 5, 6, 7, 8]
    assert not spooled_files()


async def test_a_full_spool_keeps_the_oldest_and_counts_the_rest(built: Path, away: NatsServer) -> None:
    script = """
        import { connectionOptions } from "./dist/connection.js";
        import { Publisher } from "./dist/publisher.js";
        import { Spool } from "./dist/spool.js";
        const [options, spool] = [connectionOptions(process.env.URL), new Spool(process.env.RATCHET_SPOOL_DIR, 2_100)];
        const publisher = new Publisher("steps.a", options, 10, console.log, undefined, spool);
        const offer = (n) => publisher.offer(`a:${n}`, JSON.stringify({ text: "x".repeat(150 - 11) }));
        for (let n = 0; n < 10; n++) offer(n);
        await until(() => publisher.counts.spooled === 10);
        for (let n = 10; n < 25; n++) offer(n);
        await until(() => publisher.counts.spooled === 12);
        for (let n = 25; n < 30; n++) offer(n);
        console.log("dropped:", publisher.counts.dropped);
        console.log([await publisher.close(60_000), publisher.counts.published, publisher.counts.dropped].join(" "));
    """
    async with agent(built, away.url, script) as running:
        await running.hear("is full: 12 events wait there")
        await running.hear("dropped: 8")
        away.start()
        await running.hear("0 22 8")
    ids = [message.headers["Nats-Msg-Id"] for message in await what_came(away)]
    assert ids == [f"a:{n}" for n in [*range(20), 25, 26]]


async def test_files_that_somebody_took_away_are_counted_and_hold_nothing_up(built: Path, away: NatsServer) -> None:
    script = """
        const trajectory = recorder.trajectory();
        await until(() => recorder.counts.spooled === 1);
        console.log("it is on disk");
        await told();
        trajectory.end();
        const unsent = await recorder.close(60_000);
        console.log([unsent, recorder.counts.published, recorder.counts.dropped].join(" "));
    """
    async with agent(built, away.url, script) as running:
        await running.hear("it is on disk")
        [file] = spooled_files()
        file.unlink()
        away.start()
        running.tell()
        await running.hear("are not there any more")
        await running.hear("0 1 1")
    [ended] = await what_came(away)
    assert ended.event.kind == "trajectory.ended"


def test_both_write_the_same_files_and_read_them(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 150)
    ours, theirs = tmp_path / "python", tmp_path / "typescript"
    spool = Spool(ours)
    spool.open()
    spool.append(KEPT)
    spool.done(spool.read(2, 10**9)[-1], 2)
    spool.close()
    kept = [[message_id, data.decode(), flags] for message_id, data, flags in KEPT]
    script = """
        const given = JSON.parse(process.env.GIVEN);
        await spool.append(given.map(([id, text, flags]) => ({ id, data: Buffer.from(text), flags })));
        await spool.done((await spool.read(2, 1e9)).at(-1), 2);
        await spool.close();
    """
    run_spool(built, script, theirs, GIVEN=json.dumps(kept))
    assert len(files_of(ours)) > 3
    assert files_of(theirs) == files_of(ours)
    reading = """
        const read = (await spool.read(99, 1e9)).map(({ id, data, flags }) => [id, data.toString(), flags]);
        console.log(JSON.stringify([spool.pending, spool.damaged, read]));
    """
    assert json.loads(run_spool(built, reading, ours)) == [5, 0, kept[2:]]
    again = Spool(theirs)
    again.open()
    assert [(one.message_id, one.data, one.flags) for one in again.read(99, 10**9)] == KEPT[2:]
    again.close()


def run_spool(built: Path, script: str, directory: Path, **environment: str) -> str:
    done = run(["node", "--input-type=module", "-e", SPOOL + script], built, DIRECTORY=str(directory), **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


async def test_neither_takes_a_place_that_the_other_holds(built: Path, bus: Bus, nats_server: NatsServer) -> None:
    home = Path(os.environ["RATCHET_SPOOL_DIR"]) / "agent-1"
    ours = Spool(home)
    ours.open()
    script = """
        import { Spool } from "./dist/spool.js";
        const spool = new Spool(process.env.RATCHET_SPOOL_DIR + "/agent-1");
        await spool.open();
        console.log("took", spool.directory);
        await told();
        await recorder.close();
    """
    async with agent(built, nats_server.url, script) as running:
        await running.hear(f"took {home}.1")
        third = Spool(home)
        third.open()
        assert third.directory == home.with_name("agent-1.2")
        ours.close()
        third.close()
        running.tell()
