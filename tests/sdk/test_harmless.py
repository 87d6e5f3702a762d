"""Whatever an agent hands over, it is never raised into, never held up, and its secrets stay here."""

from __future__ import annotations

import asyncio
import logging
import math
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from ratchet_sdk import Recorder, SyncRecorder, sending
from ratchet_sdk.compat import TrajectoryRecorder
from ratchet_sdk.events import MAX_EVENT_BYTES, Step, TrajectoryEnded, TrajectoryStarted

from services.local.embedded import NatsServer
from shared.bus import Bus
from tests.sdk.stored import stored

NOBODY = "nats://127.0.0.1:1"
KEY = "sk-" + "a1" * 20


@pytest.fixture
async def recorder(nats_server: NatsServer, bus: Bus) -> AsyncIterator[Recorder]:
    async with Recorder(nats_server.url, "agent-1", "traders") as opened:
        yield opened


class Odd:
    @property
    def model_dump(self) -> Any:
        raise RuntimeError("mine alone")


async def test_nothing_that_an_agent_hands_over_raises(recorder: Recorder, bus: Bus) -> None:
    circular: dict[str, Any] = {}
    circular["self"] = circular
    async with recorder.trajectory(
        started_at=datetime.fromisoformat("2026-11-20T10:00"), metadata={"o": object()}
    ) as run:
        async with run.step(environment=circular) as step:
            step.action("two\nlines")
            step.action("good", result={"when": datetime(2026, 1, 1, tzinfo=UTC), "nan": math.nan, "half": "\ud83d"})
            step.llm_call(messages=[object()], response=7)
            step.llm_call(messages=[{"role": "user"}], response=Odd())
            step.llm_call(messages=[], response=None, temperature=math.inf)
            step.provider_access("")
            step.reward(math.nan)
            step.reward("high")  # type: ignore[arg-type]  # a mistake that an agent may make
        run.final(circular)
    assert await recorder.flush() == 0
    opening, first, end = [message.event for message in await stored(bus)]
    assert isinstance(opening, TrajectoryStarted)
    assert opening.metadata == {"o": "<builtins.object>"}
    assert isinstance(first, Step)
    assert (first.environment, first.llm_calls, first.provider_accesses, first.reward) == ({}, [], [], None)
    assert first.action is not None
    assert first.action.result == {"when": "2026-01-01T00:00:00Z", "nan": "NaN", "half": "\ufffd"}
    assert isinstance(end, TrajectoryEnded)
    assert end.final == {}
    assert recorder.counts.refused == 9
    assert recorder.counts.last_error is not None


class Evil:
    """Raises whatever it is asked, its own name and its length too."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("mine alone")

    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__

    def __bool__(self) -> bool:
        raise RuntimeError("neither")

    def __len__(self) -> int:
        raise RuntimeError("no end")

    def __iter__(self) -> Any:
        raise RuntimeError("no beginning")

    def keys(self) -> Any:
        raise RuntimeError("no keys")

    def __float__(self) -> float:
        raise RuntimeError("no number")


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def hostile() -> list[Any]:
    circular: list[Any] = []
    circular.append(circular)
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]

    def broken_generator() -> Any:
        yield 1
        raise RuntimeError("no more")

    return [
        *(Evil(), Evil, MuteError(), circular, deep, broken_generator(), MagicMock(), object(), lambda: 0, 1j),
        *(math.nan, math.inf, 10**400, Decimal("NaN"), "\ud83d", {"\ud83d": "\udc00"}, "\x00"),
        *(b"\xff\xfe", bytearray(b"text"), memoryview(b"view"), np.zeros(3), np.float32(1), np.array(["x"])),
        *(
            {1, 2},
            {(1, 2): {None: 3}},
            {object(): 1},
            "",
            [],
            {},
            None,
            True,
            7,
            "text",
            datetime.max.replace(tzinfo=UTC),
            Fraction(1, 3),
        ),
        "x" * (2 * MAX_EVENT_BYTES),
    ]


async def test_nothing_raises_wherever_it_is_put(recorder: Recorder, bus: Bus) -> None:
    """Each hostile value in every place there is; afterwards an ordinary run is recorded as ever."""
    old = TrajectoryRecorder(recorder)
    for value in hostile():
        async with recorder.trajectory(
            scenario_id=value, goal=value, model=value, metadata=value, trajectory_id=value, started_at=value
        ) as run:
            async with run.step(environment=value) as step:
                step.provider_access(value, query=value, purpose=value, data=value)
                step.llm_call(messages=value, response=value, call_id=value, temperature=value, tools=value, more=value)
                step.llm_call(messages=[value], response={"message": {"role": "assistant", "content": value}})
                step.refer(value, purpose=value)
                step.failed_call(MuteError(), why=value)
                step.action(value, parameters=value, success=value, result=value, error=value, reasoning=value)
                step.reward(value)
            run.final(value)
            run.metrics(value, more=value)
        old_run = old.start_trajectory(scenario_id=value, goal=value, metadata=value, trajectory_id=value, more=value)
        for named in (old_run, value):
            for of in (old.start_step(named, value), value):
                old.log_provider_access(of, provider_name=value, data=value, purpose=value, query=value)
                old.log_llm_call(
                    of,
                    **dict.fromkeys(["model", "system_prompt", "user_prompt", "response", "purpose"], value),
                    **dict.fromkeys(["prompt_tokens", "completion_tokens", "messages", "latency_ms"], value),
                )
            old.complete_step(named, value, action_type=value, parameters=value, success=value, reward=value)
            old.end_trajectory(named, value, value, final_balance=value, more=value)
    for error in (MuteError(), ValueError(Evil())):
        with pytest.raises(type(error)):
            async with recorder.trajectory() as run, run.step():
                raise error
    refused = recorder.counts.refused
    async with recorder.trajectory(trajectory_id="fine") as run, run.step() as step:
        step.reward(np.float32(0.5))  # type: ignore[arg-type]  # a number all the same
        step.action("buy", result={b"text": b"more"})
    assert await recorder.flush(30) == 0
    assert recorder.counts.refused == refused
    *_, opening, only, end = [message.event for message in await stored(bus)]
    assert isinstance(opening, TrajectoryStarted)
    assert isinstance(only, Step)
    assert isinstance(end, TrajectoryEnded)
    assert only.trajectory_id == "fine"
    assert only.action is not None
    assert (only.reward, only.action.result) == (0.5, {"text": "more"})


async def test_the_agents_loop_has_its_turn_while_many_events_are_redacted(
    nats_server: NatsServer, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turns of so many bytes at most, not a window of 8 MiB at once."""
    turn, most, done = 0, 0, 0

    def slow(text: str) -> str:
        nonlocal done, most
        done += len(text)
        most = max(most, done)
        return text

    async def agent() -> None:
        nonlocal turn, done
        while True:
            turn, done = turn + 1, 0
            await asyncio.sleep(0)

    async with Recorder(nats_server.url, "agent-1", redact=slow) as recorder:
        async with recorder.trajectory() as run:
            for _ in range(200):
                async with run.step(environment={"text": "x" * 10_000}):
                    pass
        task = asyncio.create_task(agent())
        assert await recorder.flush() == 0
        task.cancel()
    assert recorder.counts.published == 202
    assert most <= 2 * sending.REDACT_AT_ONCE_BYTES


async def test_close_returns_though_a_client_swallows_the_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``asyncio.wait_for`` does in Python 3.11 where its result comes in the same moment."""
    recorder = Recorder(NOBODY, "agent-1", spool_dir="")
    connecting = asyncio.Event()

    async def swallowing() -> None:
        connecting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise OSError("no connection") from None

    monkeypatch.setattr(recorder.publisher._connection, "jetstream", swallowing)
    recorder.trajectory().start()
    await connecting.wait()
    assert await asyncio.wait_for(recorder.close(0), 20) == 1


# without a loop -------------------------------------------------------------------------------------
def test_a_sync_recorder_says_at_once_that_there_is_no_room() -> None:
    """Also before its thread had a turn: what waits for it is bounded, and nothing is built upon what was refused."""
    with SyncRecorder(NOBODY, "agent-1", spool_dir="", queue_max=5) as recorder:
        started, go_on = threading.Event(), threading.Event()
        recorder.publisher._loop.call_soon_threadsafe(lambda: (started.set(), go_on.wait(20)))
        assert started.wait(20)
        run = recorder.trajectory().start()
        with run.step(environment={"text": "x" * MAX_EVENT_BYTES}) as step:
            step.llm_call(messages=[{"role": "user", "content": "?"}], response="lost", call_id="lost")
        assert recorder.lost == 1
        extended, _ = run.extended([{"role": "user", "content": "?"}, {"role": "assistant", "content": "lost"}, {}])
        assert extended is None
        for _ in range(10):
            with run.step():
                pass
        assert recorder.counts.dropped == 6
        assert recorder.publisher._coming == 5
        go_on.set()
        assert recorder.flush(0.2) == 5
        assert recorder.close(0) == 5
        assert recorder.flush(0) == 5


FORKING = """
import os, sys
from ratchet_sdk import SyncRecorder

recorder = SyncRecorder(sys.argv[1], "agent-1", spool_dir="")
recorder.trajectory(trajectory_id="of-the-parent").start()
child = os.fork()
if child == 0:
    recorder.trajectory(trajectory_id="of-the-child").start()
    assert recorder.counts.refused == 1, recorder.counts
    recorder.flush()
    sys.exit(7)  # its exit handlers run
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7
assert recorder.close() == 0
"""


async def test_a_fork_is_not_held_up_and_says_that_it_records_nothing(nats_server: NatsServer, bus: Bus) -> None:
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", FORKING, nats_server.url, stderr=subprocess.PIPE)
    _, said = await asyncio.wait_for(child.communicate(), 30)
    assert child.returncode == 0, said.decode()
    assert b"does not outlive a fork" in said
    assert [message.event.trajectory_id for message in await stored(bus)] == ["of-the-parent"]


def test_a_recorder_serves_one_loop_after_the_other(nats_server: NatsServer, bus: Bus) -> None:
    recorder = Recorder(nats_server.url, "agent-1")

    async def agent(name: str) -> None:
        async with recorder.trajectory(trajectory_id=name):
            pass
        assert await recorder.flush() == 0

    for name in ("one", "two", "three"):
        asyncio.run(agent(name))
    recorder.trajectory(trajectory_id="between").start()

    async def rest() -> list[str]:
        assert await recorder.close() == 0
        other = Bus(nats_server.url, name="test")
        await other.connect()
        try:
            return [message.event.trajectory_id for message in await stored(other)]
        finally:
            await other.close()

    assert asyncio.run(rest()) == ["one", "one", "two", "two", "three", "three", "between"]


# redaction ------------------------------------------------------------------------------------------
async def test_secrets_do_not_reach_the_wire(recorder: Recorder, bus: Bus) -> None:
    key = "sk-" + "a1" * 20
    async with recorder.trajectory(goal=f"use {key}") as run, run.step(environment={"big": "x" * 40_000 + " " + key}):
        pass
    assert await recorder.flush() == 0
    opening, step, _ = [message.event for message in await stored(bus)]
    assert isinstance(opening, TrajectoryStarted)
    assert opening.goal == "use [key]"
    assert isinstance(step, Step)
    assert step.environment["big"] == "x" * 40_000 + " [key]"


async def test_what_a_redactor_fails_on_stays_here(nats_server: NatsServer, bus: Bus) -> None:
    def mine(text: str) -> str:
        if "boom" in text:
            raise RuntimeError("no")
        return text.replace("Jane", "J.")

    async with Recorder(nats_server.url, "agent-1", redact=mine) as recorder, recorder.trajectory() as run:
        for name in ("Jane", "boom", "Joe"):
            async with run.step(environment={"name": name}):
                pass
        run.end()
        assert await recorder.flush() == 0
    assert recorder.counts.refused == 1
    steps = [m.event for m in await stored(bus) if isinstance(m.event, Step)]
    assert [step.environment["name"] for step in steps] == ["J.", "Joe"]


async def test_secrets_do_not_reach_the_log(
    nats_server: NatsServer, bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in what a value, a redactor or an exception says of itself, nor in a warning about a broker."""

    class Telling:
        @property
        def model_dump(self) -> Any:
            raise KeyError(f"no such thing as {KEY}")

    def indiscreet(text: str) -> str:
        if KEY in text:
            raise ValueError(text)
        return text

    caplog.set_level(logging.DEBUG, "ratchet_sdk")
    address = nats_server.url.replace("ratchet-", f"{KEY}-")
    for redact in ({}, {"redact": indiscreet}):
        async with Recorder(address, "agent-1", spool_dir="", **redact) as recorder:  # type: ignore[arg-type]
            async with recorder.trajectory(metadata={"t": Telling()}, goal=KEY) as run, run.step({"key": KEY}) as step:
                step.llm_call(messages=[Telling()], response=Telling())
                step.action(KEY * 9, result={KEY: b"\xff"})
                step.failed_call(RuntimeError(KEY))
                TrajectoryRecorder(recorder).end_trajectory(KEY)
            assert await recorder.flush() == 0
            assert recorder.counts.refused >= 3
            assert KEY not in str(recorder.counts)
    assert len(caplog.records) >= 5
    assert KEY not in caplog.text


def every_byte_in(directory: Path) -> bytes:
    return b"".join(file.read_bytes() for file in directory.rglob("*") if file.is_file())


async def test_secrets_reach_neither_the_spool_nor_the_wire(tmp_path: Path, nats_server: NatsServer, bus: Bus) -> None:
    """Every byte that leaves the process: the files of the spool, and what a stand-in for the broker is sent."""
    nats_server.stop()
    recorder = Recorder(nats_server.url, "agent-1", spool_dir=tmp_path)
    planted: list[Any] = [KEY, KEY.encode(), {"kind": KEY}, {"password": "hunter22hunter"}, [{"schema": {KEY: 1}}]]
    async with recorder.trajectory(goal=KEY, metadata={"m": planted}) as run, run.step({"e": planted}) as step:
        step.provider_access("p", query=planted, purpose=KEY, data=planted)
        step.llm_call(messages=[{"role": "user", "content": KEY}], response=KEY, tools=[{"f": planted}], note=KEY)
        step.action("buy", parameters={"p": planted}, result=planted, error=KEY, reasoning=KEY)
        step.failed_call(RuntimeError(KEY))
        run.final(f=planted)
        run.metrics({KEY: planted})
    while recorder.counts.spooled < 3:
        await asyncio.sleep(0.01)
    await recorder.close(0)
    spooled = every_byte_in(tmp_path)
    assert b"trajectory.ended" in spooled
    nats_server.start()
    wire = bytearray()

    async def passing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs = nats_server.address.rpartition(":")[2]
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", int(theirs))

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, kept: bytearray | None) -> None:
            while data := await source.read(65536):
                if kept is not None:
                    kept += data
                sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, inner_writer, wire), pump(inner_reader, writer, None))

    async with await asyncio.start_server(passing, "127.0.0.1", 0) as between:
        port = between.sockets[0].getsockname()[1]
        address = f"{nats_server.url.rpartition(':')[0]}:{port}"
        async with Recorder(address, "agent-1", spool_dir=tmp_path) as again:
            async with again.trajectory(goal=KEY, metadata={"m": planted}):
                pass
            assert await again.flush(20) == 0
            assert again.counts.published == 5
    assert b"trajectory.started" in wire
    while not bus.nc.is_connected:
        await asyncio.sleep(0.02)
    for leak in (KEY.encode(), b"hunter22hunter", KEY.encode().hex().encode()):
        assert leak not in spooled
        assert leak not in bytes(wire)
