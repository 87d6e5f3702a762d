"""The agent in TypeScript: built with its own tools, and what it records is what the Python clients record."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

from ratchet_sdk.events import Step, TrajectoryEnded, TrajectoryStarted, message_id
from ratchet_sdk.redact import Redaction, secrets

from services.local.embedded import NatsServer
from services.recorder.handlers import subscribe
from services.recorder.service import Recording
from services.recorder.settings import RecorderSettings
from services.recorder.store import EventStore
from services.recorder.stream import StepStream
from services.recorder.window_store import WindowStore
from services.recorder.windows import Closing
from shared.bus import Bus
from shared.database import Pool
from shared.streams import provision
from tests.sdk.stored import stored
from tests.sdk.test_assembly import CASES
from tests.sdk.test_faces import MORE, VOLATILE, with_ids, with_the_recorder, without
from tests.sdk.test_redact import HARMLESS, KEY, SAMPLES
from tests.sdk.typescript import EXAMPLE, agent, connected, run

EVENT_ID = "019aa0c4-1f00-7000-8000-0123456789ab"
OF_EACH_CLIENT = {"agent_id", "window_id", "started_at", "ended_at", "first_sequence", "ended_sequence"}
OF_EACH_EVENT = {"agent_id", "event_id", "call_id", "base_call_id", "occurred_at", "first_stored_at"}


def test_the_types_are_those_of_the_schema(built: Path) -> None:
    (built / "src" / "events.ts").write_text("")
    done = run(["npm", "run", "generate"], built)
    assert done.returncode == 0, done.stderr
    generated = (built / "src" / "events.ts").read_text()
    assert generated == (EXAMPLE / "src" / "events.ts").read_text(), "run `npm run generate` in examples/typescript"


def test_its_own_tests_pass(built: Path) -> None:
    done = run(["npm", "test"], built)
    assert done.returncode == 0, done.stdout


def test_the_lock_file_names_no_registry() -> None:
    assert '"resolved"' not in (EXAMPLE / "package-lock.json").read_text()


async def rows(pool: Pool, agent_id: str) -> dict[str, list[dict[str, object]]]:
    return {
        table: [
            {name: value for name, value in row.items() if name not in OF_EACH_CLIENT | OF_EACH_EVENT}
            for row in await pool.fetch(f"select * from {table} where agent_id = $1 order by {order}", agent_id)
        ]
        for table, order in (("trajectories", "trajectory_id"), ("steps", "step"), ("llm_calls", "step"))
    }


async def test_each_kind_of_client_records_the_same_rows(
    built: Path, nats_server: NatsServer, bus: Bus, pool: Pool
) -> None:
    await with_the_recorder(nats_server.url, "the-recorder")
    await asyncio.to_thread(with_ids, nats_server.url, "with-ids")
    agent = ["node", "dist/agent.js", "typescript", "t"]
    done = await asyncio.to_thread(run, agent, built, RATCHET_NATS_URL=nats_server.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    chosen = RecorderSettings()
    closing = Closing(WindowStore(pool), StepStream(bus), bus, chosen)
    subscribe(bus, Recording(EventStore(pool), chosen), closing, gather_s=0.05)
    await bus.broker.start()
    async with asyncio.timeout(30):
        while await pool.fetchval("select count(*) from bodies") < 12:
            await asyncio.sleep(0.02)

    expected = await rows(pool, "the-recorder")
    assert {table: len(found) for table, found in expected.items()} == {"trajectories": 1, "steps": 2, "llm_calls": 2}
    assert expected["trajectories"][0]["status"] == "completed"
    assert {row["prompt_tokens"] for row in expected["llm_calls"]} == {3, 9}
    assert await rows(pool, "with-ids") == expected
    assert await rows(pool, "typescript") == expected

    messages = await stored(bus)
    events = [without(message.event.model_dump(mode="json"), VOLATILE) for message in messages]
    assert events[:4] == events[4:8] == events[8:]
    assert [message.headers["Nats-Msg-Id"] for message in messages[8:]] == [
        message_id("typescript", message.event.event_id) for message in messages[8:]
    ]
    for of_one in (messages[:4], messages[4:8], messages[8:]):
        first, second = (message.event.llm_calls[0] for message in of_one[1:3])  # type: ignore[union-attr]
        assert (second.base_call_id, second.messages) == (first.call_id, [MORE[-1]]), "only what is new is sent"


async def test_the_readme_compiles_and_records_a_whole_run(built: Path, nats_server: NatsServer, bus: Bus) -> None:
    """As it stands, beside what it takes for granted: the client of a model, and something to ask it."""
    [example] = re.findall(r"```ts\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.S)
    given = """
        import { Recorder } from "./recorder.js";
        const text = "it does not start";
        const messages = [{ role: "user" as const, content: text }];
        const message = { role: "assistant" as const, content: "turn it off and on" };
        const choices = [{ index: 0, finish_reason: "stop" as const, message }];
        const create = async (_: { model: string; messages: typeof messages }) => ({ id: "c-1", model: "m", choices });
        const openai = { chat: { completions: { create } } };
    """
    (built / "src" / "readme.ts").write_text(given + example + "process.exitCode = unsent;")
    done = await asyncio.to_thread(run, ["npm", "run", "build"], built)
    assert done.returncode == 0, done.stdout
    done = await asyncio.to_thread(run, ["node", "dist/readme.js"], built, RATCHET_NATS_URL=nats_server.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    started, step, ended = [message.event for message in await stored(bus)]
    assert isinstance(started, TrajectoryStarted)
    assert isinstance(step, Step)
    assert isinstance(ended, TrajectoryEnded)
    assert started.scenario_id == "ticket-4711"
    assert [call.messages for call in step.llm_calls] == [[{"role": "user", "content": "it does not start"}]]
    assert step.action is not None
    assert step.action.parameters == {"text": "turn it off and on"}
    assert (ended.status, ended.step_count, ended.final) == ("completed", 1, {"balance": 101})


async def test_what_javascript_has_and_json_has_not(built: Path, nats_server: NatsServer, bus: Bus) -> None:
    """Large events travel zipped; what JSON has no word for is marked, and makes no event unreadable."""
    script = r"""
        const trajectory = recorder.trajectory();
        const step = trajectory.step({ text: "x".repeat(40_000) });
        step.llmCall({ messages: [], response: { model: "m-1", usage: { total_tokens: 2 }, choices: [{ index: 0 }] } });
        step.refer("chatcmpl-1", { purpose: "evaluation" });
        step.llmCall({ messages: [], response: "hot", temperature: Number.NaN });
        step.action("buy", { parameters: {
          half: "\ud83d \\ud83d \ud83d\ude00", wei: 10n ** 20n, odd: [NaN, -Infinity, Infinity, new Date(NaN), () => 1],
          map: new Map([[1, 2], ["1", 3]]), set: new Set([1]), error: new TypeError("no"),
        } });
        step.end();
        step.action("sell");
        trajectory.end("failed", { error: "no" });
        process.exitCode = (await recorder.close()) + recorder.counts.refused - 2;
    """
    async with agent(built, nats_server.url, script):
        pass
    messages = await stored(bus)
    assert [message.headers.get("Content-Encoding") for message in messages] == [None, "gzip", None]
    _, step, end = [message.event for message in messages]
    assert isinstance(step, Step)
    assert step.environment == {"text": "x" * 40_000}
    assert step.action is not None
    assert step.action.parameters == {
        **{"half": "\ufffd \\ud83d \U0001f600", "wei": str(10**20)},
        "odd": ["NaN", "-Infinity", "Infinity", "Invalid Date", "<function>"],
        **{"map": {"1": 2, "1 (2)": 3}, "set": [1], "error": "TypeError: no"},
    }
    said, referred = step.llm_calls
    assert (said.model_version, said.usage, said.response) == ("m-1", {"total_tokens": 2}, {"index": 0})
    assert (referred.call_id, referred.purpose, referred.response) == ("chatcmpl-1", "evaluation", None)
    assert isinstance(end, TrajectoryEnded)
    assert (end.status, end.step_count, end.model_extra) == ("failed", 1, {"error": "no"})


def told(built: Path, script: str, given: Any) -> Any:
    """What a script says in JSON, of what it reads."""
    command = ["node", "--input-type=module", "-e", script]
    done = subprocess.run(command, cwd=built, input=json.dumps(given), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_puts_streams_together_as_the_python_sdk_does(built: Path) -> None:
    script = """
        import { readFileSync } from "node:fs";
        import { StreamedReply } from "./dist/assembly.js";
        const whole = ({ chunks }) => {
          const before = JSON.stringify(chunks);
          const reply = new StreamedReply();
          chunks.forEach((chunk) => reply.add(chunk));
          return { choices: reply.completion().choices, changed: JSON.stringify(chunks) !== before };
        };
        console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(whole)));
    """
    assert told(built, script, CASES) == [{"choices": [case["choice"]], "changed": False} for case in CASES]


async def test_a_second_call_of_one_id_is_kept_under_another(built: Path, nats_server: NatsServer, bus: Bus) -> None:
    script = """
        const step = recorder.trajectory().step();
        step.llmCall({ messages: [], response: { choices: [{ index: 0 }, { index: 1 }] }, call_id: "c" });
        step.llmCall({ messages: [], response: "sell", call_id: "c" });
        step.end();
        process.exitCode = (await recorder.close()) + recorder.counts.refused - 1;
    """
    async with agent(built, nats_server.url, script):
        pass
    _, step = [message.event for message in await stored(bus)]
    assert isinstance(step, Step)
    first, second = step.llm_calls
    assert (first.call_id, first.model_extra) == ("c", {"other_choices": [{"index": 1}]})
    assert second.call_id != "c"


def test_it_takes_out_what_the_python_sdk_takes_out(built: Path) -> None:
    """The same samples, alone and within an event, whose tokens go with what was replaced."""
    texts = [*SAMPLES, *SAMPLES.values(), *HARMLESS]
    call = {"call_id": "4111111111111111", "prompt_token_ids": [1], "response": {"token_ids": [2], "logprobs": {}}}
    events = [
        {"kind": "step", "trajectory_id": "4222222222222", "environment": {text: [{"deep": text}], "password": text}}
        | {"scenario_id": text, "metadata": {"order_ids": [text], "userId": text, "a@b.de": 1, "c@d.de": 2}}
        | {"llm_calls": [call, {**call, "messages": [{"role": "user", "content": text}]}]}
        for text in texts
    ]
    script = """
        import { readFileSync } from "node:fs";
        import { Redaction, secrets } from "./dist/redact.js";
        const { texts, events } = JSON.parse(readFileSync(0, "utf8"));
        const each = events.map((event) => JSON.parse(new Redaction(secrets).of(JSON.stringify(event))));
        console.log(JSON.stringify({ texts: texts.map(secrets), events: each }));
    """
    said = told(built, script, {"texts": texts, "events": events})
    assert said["texts"] == [secrets(text) for text in texts]
    assert said["events"] == [json.loads(Redaction(secrets)(json.dumps(event).encode())) for event in events]


async def test_nothing_secret_goes_over_the_wire(built: Path, nats_server: NatsServer, bus: Bus) -> None:
    """A redactor that throws costs its event, which is counted, and no other."""
    script = f"""
        const step = recorder.trajectory({{ goal: "use {KEY}" }}).step();
        step.llmCall({{ messages: [{{ role: "user", content: "me@example.org" }}], response: "ok" }});
        step.end();
        const unsent = await recorder.close();
        const other = new Recorder(process.env.URL, "agent-1", {{
          log: () => undefined,
          redact: (text) => {{ if (text === "boom") throw new Error("no"); return text; }},
        }});
        const run = other.trajectory({{ goal: "boom" }});
        run.end();
        process.exitCode = unsent + (await other.close()) + other.counts.refused - 1;
    """
    async with agent(built, nats_server.url, script):
        pass
    messages = await stored(bus)
    assert [message.event.kind for message in messages] == ["trajectory.started", "step", "trajectory.ended"]
    started, step, _ = [message.event.model_dump() for message in messages]
    assert (started["goal"], step["llm_calls"][0]["messages"][0]["content"]) == ("use [key]", "[email]")


async def test_a_broker_that_goes_away_gets_each_event_once_and_in_order(built: Path, nats_server: NatsServer) -> None:
    """The agent begins while no broker is there, has events in flight when it dies, and goes on while it is gone."""
    script = """
        const trajectory = recorder.trajectory();
        for (let n = 0; n < 300; n++) trajectory.step({ n }).end();
        console.log("unsent:", await recorder.flush(60_000));
        await told();
        for (let n = 300; n < 310; n++) trajectory.step({ n }).end();
        console.log("unsent:", await recorder.flush(200));
        await told();
        trajectory.end();
        process.exitCode = await recorder.close(60_000);
    """
    async with connected(nats_server) as bus:
        await provision(bus)  # a stream that is made while events come would take the first of them last
    nats_server.stop()
    async with agent(built, nats_server.url, script) as other:
        await other.hear("did not take an event yet")
        nats_server.start()
        await other.hear("unsent: 0")
        if process := getattr(nats_server, "process", None):  # none where it is a container
            process.send_signal(signal.SIGSTOP)
            other.tell()
            await other.hear("unsent: 10")
            process.kill()
            process.wait()
        else:
            nats_server.stop()
            other.tell()
        await other.hear("did not take an event yet")
        other.tell()
        nats_server.start()
    async with connected(nats_server) as bus:
        events = [message.event for message in await stored(bus)]
    assert [event.step for event in events if isinstance(event, Step)] == list(range(310))
    assert [event.kind for event in events[::311]] == ["trajectory.started", "trajectory.ended"]


async def test_an_event_whose_message_id_somebody_else_took_is_stored_all_the_same(
    built: Path, nats_server: NatsServer, bus: Bus
) -> None:
    script = (
        f"const event_id = {EVENT_ID!r};"
        + """
        const run = { schema: 1, trajectory_id: "t", started_at: "2026-11-20T10:00:00Z" };
        recorder.record({ ...run, kind: "trajectory.started", event_id, occurred_at: run.started_at });
        process.exitCode = await recorder.close();
    """
    )
    await bus.js.publish("steps.other", b"{}", headers={"Nats-Msg-Id": f"agent-1:{EVENT_ID}"})
    async with agent(built, nats_server.url, script):
        pass
    info = await bus.js.stream_info("STEPS")
    ours = await bus.js.get_msg("STEPS", info.state.last_seq)
    assert (ours.subject, ours.headers) == ("steps.agent-1", None)
