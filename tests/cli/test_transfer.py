"""Import, export and simulate: what arrives on the streams, and what is read back."""

from __future__ import annotations

import asyncio
import gzip
import json
import shlex
import subprocess
import sys
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat.chat_completion import Choice
from ratchet_sdk.events import Step, TrajectoryEnded, TrajectoryStarted, step_events
from ratchet_sdk.outcomes import outcomes

from services.interchange import importing
from shared.bus import Bus
from shared.database import Pool
from shared.delivery import Delivery
from shared.streams import stream_end
from shared.trajectories import assemble
from shared.windows import window_at, window_of_id
from tests.admin import world
from tests.cli.conftest import Ratchet
from tests.cli.tiny_recorder import TinyRecorder

pytestmark = pytest.mark.usefixtures("servers")

ROWS = [
    {
        "task_id": task,
        "trial": trial,
        "reward": float(trial),
        "instruction": f"secret {task}",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"task {task}"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "t", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "t", "content": "x" * 70_000 if task == 0 else "seen"},
            {"role": "assistant", "content": "Done."},
        ],
    }
    for task in range(2)
    for trial in range(2)
]


TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "runs.jsonl"
    path.write_text(TEXT)
    return path


async def published(bus: Bus, stream: str) -> list[tuple[str, bytes, dict[str, str]]]:
    """Every message of a stream: subject, content as it was sent, headers."""
    found = []
    for sequence in range(1, (await stream_end(bus, stream)).sequence + 1):
        message = await bus.js.get_msg(stream, sequence)
        headers = dict(message.headers or {})
        encoding = {"Content-Encoding": headers["Content-Encoding"]} if "Content-Encoding" in headers else {}
        delivery = Delivery(message.subject or "", message.data or b"", encoding, sequence, datetime.now(UTC), 1)
        found.append((message.subject or "", delivery.content(), headers))
    return found


async def test_import_publishes_what_the_agents_would_have(ratchet: Ratchet, bus: Bus, file: Path) -> None:
    said = (await ratchet("import", str(file), "--format", "openai-chat", "--policy", "clerks", "--json")).json
    assert (said["runs"], said["events"], said["outcomes"], said["closed"]) == (4, 16, 8, False)

    steps = await published(bus, "STEPS")
    events = [step_events.validate_json(body) for _, body, _ in steps]
    assert {subject for subject, _, _ in steps} == {"steps.trial-0", "steps.trial-1"}
    assert {event.policy for event in events} == {"clerks"}
    assert len({event.started_at for event in events}) == 1
    assert len({headers["Nats-Msg-Id"] for _, _, headers in steps}) == 16
    kinds = [type(event) for event in events]
    assert kinds == [TrajectoryStarted] * 4 + [Step] * 8 + [TrajectoryEnded] * 4
    assert {e.scenario_id for e in events if isinstance(e, TrajectoryStarted)} == {"task-0", "task-1"}
    assert (
        sum("Content-Encoding" in headers for _, _, headers in steps) == 4
    )  # two runs: the result, and the next prompt
    run = assemble(
        "trial-1",
        said["trajectories"][1],
        [b for _, b, _ in steps if json.loads(b)["trajectory_id"] == said["trajectories"][1]],
    )
    assert [*run.calls[-1].messages, run.calls[-1].reply] == ROWS[1]["messages"]
    assert run.steps[0].action is not None
    assert run.steps[0].action.type == "look"
    assert run.started is not None
    assert run.started.model is not None
    assert run.started.model.name == "imported"

    facts = [outcomes.validate_json(body) for _, body, _ in await published(bus, "OUTCOMES")]
    rewards = {f.trajectory.trajectory_id: f.trajectory.value for f in facts if f.kind == "trajectory"}
    assert [rewards[run] for run in said["trajectories"]] == [0.0, 1.0, 0.0, 1.0]
    known = {f.knowledge.trajectory_id: f.knowledge.data for f in facts if f.kind == "knowledge"}
    assert known[said["trajectories"][3]] == {"instruction": "secret 1"}
    assert b"secret" not in b"".join(body for _, body, _ in steps)


async def test_a_second_import_is_a_new_one(ratchet: Ratchet, bus: Bus, file: Path) -> None:
    first = (await ratchet("import", str(file), "--json")).json
    second = (await ratchet("import", str(file), "--json")).json
    assert set(first["trajectories"]).isdisjoint(second["trajectories"])
    assert (await stream_end(bus, "STEPS")).sequence == 32


async def test_import_close_waits_until_the_window_is_closed(
    ratchet: Ratchet, bus: Bus, pool: Pool, file: Path
) -> None:
    recorder = TinyRecorder(bus, pool)
    await recorder.start()
    packed = file.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(TEXT.encode()))
    said = await ratchet("import", str(packed), "--close", "--json")
    assert said.code == 0, said.err
    assert recorder.closed == [said.json["window_id"]]
    assert said.json["closed"] is True
    row = await pool.fetchrow("select state, (select count(*) from trajectories) as runs from windows")
    assert row is not None
    assert (row["state"], row["runs"]) == ("closed", 4)


async def test_nothing_is_imported_into_a_closed_window(
    ratchet: Ratchet, bus: Bus, pool: Pool, file: Path, environment: pytest.MonkeyPatch
) -> None:
    recorder = TinyRecorder(bus, pool)
    await recorder.start()
    environment.setattr(importing, "MAX_WAIT_S", 0.0)
    assert (await ratchet("import", str(file), "--close")).code == 0
    before = await stream_end(bus, "STEPS")
    for command in (["import", str(file)], ["simulate", "--minutes", "1", "--rate", "1000"]):
        said = await ratchet(*command)
        assert said.code == 75
        assert f"window {recorder.closed[0]} was closed already" in said.err
    assert await stream_end(bus, "STEPS") == before


async def act(pool: Pool, window: str, agent: str = "ann", status: str = "open") -> None:
    """A run of a live agent in a window."""
    await pool.execute(
        """insert into windows (window_id, starts_at, ends_at, length_s) values ($1, $2, $3, 3600)
           on conflict do nothing""",
        window,
        window_of_id(window).starts_at,
        window_of_id(window).ends_at,
    )
    await pool.execute(
        """insert into trajectories (agent_id, trajectory_id, policy, window_id, scenario_id, started_at, status,
                                     first_sequence) values ($1, 'live', 'default', $2, 's', $3, $4, 0)""",
        agent,
        window,
        window_of_id(window).starts_at,
        status,
    )


@pytest.mark.parametrize("ago", [0, 1])
async def test_no_window_is_closed_on_others(ratchet: Ratchet, bus: Bus, pool: Pool, file: Path, ago: int) -> None:
    now = window_at(datetime.now(UTC), 3600)
    await act(pool, (now if ago == 0 else now.previous()).window_id, status="completed")
    for command in (["import", str(file), "--close"], ["simulate", "--minutes", "1", "--rate", "1000", "--close"]):
        said = await ratchet(*command)
        assert said.code == 2
        assert f"window {now.window_id} is not closed with --close: ann acts in it" in said.err
    assert (await stream_end(bus, "STEPS")).sequence == 0


async def test_a_window_is_closed_on_others_where_that_is_said(
    ratchet: Ratchet, bus: Bus, pool: Pool, environment: pytest.MonkeyPatch
) -> None:
    recorder = TinyRecorder(bus, pool)
    await recorder.start()
    now = window_at(datetime.now(UTC), 3600)
    assert "there is no window" in (await ratchet("window", "close", "--yes")).err
    await act(pool, now.window_id)
    assert "add --yes" in (await ratchet("window", "close", "--json")).err
    asked: list[str] = []
    environment.setattr("typer.confirm", lambda words, **_: asked.append(words))
    said = await ratchet("window", "close")
    assert said.code == 0, said.err
    assert f"Window {now.window_id} has 1 runs of 1 agents, 1 of them open" in asked[0]
    assert "until then will be late and never judged. Close it?" in asked[0]
    assert recorder.closed == [now.window_id]
    said = await ratchet("window", "close", now.window_id, "--yes", "--json")
    assert said.json == {"window_id": now.window_id, "runs": 1, "were_open": 1, "state": "closed"}
    assert recorder.closed == [now.window_id], "it is asked once"
    assert "is no window id" in (await ratchet("window", "close", "soon", "--yes")).err


async def test_the_next_window_is_waited_for(
    ratchet: Ratchet, bus: Bus, pool: Pool, file: Path, environment: pytest.MonkeyPatch
) -> None:
    recorder = TinyRecorder(bus, pool, length_s=2)
    await recorder.start()
    environment.setenv("RATCHET_WINDOW_S", "2")
    for _ in range(2):
        assert (await ratchet("import", str(file), "--close")).code == 0
    assert len(set(recorder.closed)) == 2


async def test_bad_lines_are_said_and_skipped(ratchet: Ratchet, bus: Bus, tmp_path: Path) -> None:
    good = TEXT.splitlines()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([good[0], "{", "", '{"task_id": 1, "messages": []}', good[1]]))
    said = await ratchet("import", str(mixed))
    assert said.code == 1
    assert "line 2 skipped: it is not JSON" in said.err
    assert "line 4 skipped: messages must be a list" in said.err
    assert "runs: 2\n" in said.out
    assert (await stream_end(bus, "STEPS")).sequence == 8


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "it is empty"),
        ("a.jsonl", b"\x00\x01\x02", "line 1: it is not JSON"),
        ("a.jsonl.gz", b"plain", "is not gzip as its name says"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:-12], "is cut off or damaged"),
    ],
)
async def test_a_malformed_file_is_one_line(
    ratchet: Ratchet, bus: Bus, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    said = await ratchet("import", str(tmp_path / name))
    assert said.code == 2
    assert words in said.err
    assert said.err.count("\n") == 1
    assert (await stream_end(bus, "STEPS")).sequence == 0


# export -------------------------------------------------------------------------------------------
def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


async def test_groups_are_exported_as_art_reads_them(ratchet: Ratchet, pool: Pool, tmp_path: Path) -> None:
    await world.build(pool)
    [group] = lines((await ratchet("export")).out)
    assert (group["group_id"], group["judge"], group["scenario_id"]) == ("g1", "outcome", "ACME")
    best, worst = group["trajectories"]
    assert (best["reward"], worst["reward"]) == (1.0, 0.0)
    assert best["metrics"] == {"rank": 1, "reward_of_record": 1.5}
    assert best["metadata"]["agent_id"] == "ann"
    assert best["tools"] == [{"type": "function"}]
    system, user, first, act, second = best["messages_and_choices"]
    assert (system["role"], user["content"], act["content"]) == ("system", world.HOSTILE, "Act.")
    assert Choice.model_validate(first).message.content == "I look."
    spoken = Choice.model_validate(second)
    assert spoken.logprobs is not None
    assert spoken.logprobs.content is not None
    assert spoken.logprobs.content[0].logprob == -0.5
    assert second["token_ids"] == [7]

    out = tmp_path / "groups.jsonl"
    said = await ratchet("export", "--ties", "--out", str(out), "--json")
    assert said.json == {"format": "groups", "lines": 2, "file": str(out)}
    assert [group["group_id"] for group in lines(out.read_text())] == ["g1", "g2"]


async def test_conversations_are_exported_as_they_were(ratchet: Ratchet, pool: Pool) -> None:
    await world.build(pool)
    rows = lines((await ratchet("export", "--format", "openai-chat", "--policy", "default")).out)
    assert [(row["agent_id"], row["reward"]) for row in rows] == [("ann", 1.5), ("bob", -0.5), ("bob", None)]
    assert [message["role"] for message in rows[0]["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert lines((await ratchet("export", "--format", "openai-chat", "--policy", "other")).out) == []


@pytest.mark.parametrize(("form", "runs"), [("openai-chat", 3), ("groups", 2)])
async def test_what_was_exported_is_imported(
    ratchet: Ratchet, bus: Bus, pool: Pool, tmp_path: Path, form: str, runs: int
) -> None:
    await world.build(pool)
    file = tmp_path / "runs.jsonl"
    assert (await ratchet("export", "--format", form, "--out", str(file))).code == 0
    said = await ratchet("import", str(file), "--format", form, "--json")
    assert said.code == 0, said.err
    assert (said.json["runs"], said.json["outcomes"], said.json["policy"]) == (runs, 2, "default")
    events = [(subject, step_events.validate_json(body)) for subject, body, _ in await published(bus, "STEPS")]
    started = [(subject, event) for subject, event in events if isinstance(event, TrajectoryStarted)]
    assert {subject for subject, _ in started} == {"steps.ann", "steps.bob"}
    assert {(event.scenario_id, event.goal) for _, event in started} == {("ACME", world.HOSTILE)}
    first, second = (event for subject, event in events if subject == "steps.ann" and isinstance(event, Step))
    assert first.llm_calls[0].tools == [{"type": "function"}]
    assert second.action is not None
    assert (second.action.type, second.action.parameters) == ("buy", {"n": 3})
    wrong = "groups" if form == "openai-chat" else "openai-chat"
    assert (await ratchet("import", str(file), "--format", wrong)).code == 2


async def test_export_of_what_is_not_there(ratchet: Ratchet, pool: Pool) -> None:
    await world.build(pool)
    said = await ratchet("export", "--window", "2020-01-01T00:00")
    assert said.code == 2
    assert "there is no window" in said.err
    assert (await ratchet("export", "--out", "/nowhere/x")).code == 2
    await pool.execute("update bodies set body = null where agent_id = 'bob'")
    [group] = lines((await ratchet("export", "--window", world.WINDOW)).out)
    assert [t["metadata"]["agent_id"] for t in group["trajectories"]] == ["ann"]
    assert group["forgotten"] == ["run-1"]


async def test_a_number_that_json_has_not_is_shown_as_its_word(ratchet: Ratchet, pool: Pool) -> None:
    """As it was stored before such numbers were refused, or by an older recorder."""
    sent = await world.build(pool)
    for body in sent[("ann", "run-1")]:
        odd = body.replace(b'"finish_reason":"stop"', b'"finish_reason":"stop","odd":[NaN,-Infinity]')
        odd = odd.replace(b'"role":"user"', b'"role":"user","weight":Infinity')
        await pool.execute("update bodies set body = $2 where body = $1", zlib.compress(body), zlib.compress(odd))
    [group] = lines((await ratchet("export")).out)
    [best] = [run for run in group["trajectories"] if run["metadata"]["agent_id"] == "ann"]
    assert best["messages_and_choices"][2]["odd"] == ["NaN", "-Infinity"]
    said = await ratchet("export", "--format", "openai-chat")
    assert (said.code, lines(said.out)[0]["messages"][1]["weight"]) == (0, "Infinity")
    for form in ((), ("--json",), ("--raw",)):
        said = await ratchet("trajectory", "run-1", "--agent", "ann", *form)
        assert (said.code, said.err) == (0, "")
        assert "Infinity" in said.out or not form


async def test_a_reader_who_has_had_enough_hears_no_complaint(servers: None, pool: Pool) -> None:
    await world.build(pool)
    command = f"{shlex.quote(sys.executable)} -m services.cli.main export --format openai-chat"
    code = f"set -o pipefail; {command} | true"
    done = await asyncio.to_thread(subprocess.run, ["bash", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")


# simulate -----------------------------------------------------------------------------------------
async def test_simulated_agents_record_through_the_sdk(ratchet: Ratchet, bus: Bus, pool: Pool) -> None:
    recorder = TinyRecorder(bus, pool)
    await recorder.start()
    said = await ratchet("simulate", "--agents", "3", "--minutes", "3", "--rate", "600", "--close", "--json")
    assert said.code == 0, said.err
    assert (said.json["runs"], said.json["outcomes"], said.json["closed"]) == (9, 9, True)
    assert recorder.closed == said.json["windows"]

    events = [step_events.validate_json(body) for _, body, _ in await published(bus, "STEPS")]
    steps = [event for event in events if isinstance(event, Step)]
    assert len(steps) == 18
    assert {step.action.type for step in steps if step.action} >= {"observe", "post", "comment"}
    assert all(step.llm_calls and step.action and step.action.result for step in steps)
    assert sum(bool(step.provider_accesses) for step in steps) == 9
    scenarios = [event.scenario_id for event in events if isinstance(event, TrajectoryStarted)]
    assert len(set(scenarios)) == 3
    facts = [outcomes.validate_json(body) for _, body, _ in await published(bus, "OUTCOMES")]
    rewards = [fact.trajectory.value for fact in facts if fact.kind == "trajectory"]
    assert len(set(rewards)) == 9
