"""From a model one pays for to a model one owns: recorded, judged, imitated by a student, which is then on trial."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from dotenv import dotenv_values
from openai import AsyncOpenAI
from ratchet_sdk import Recorder
from ratchet_sdk.openai import wrap_openai
from ratchet_sdk.outcomes import Outcomes

from services.trainer.base import create_corpus_base
from tests.e2e.conftest import Running, _up

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

KEY = "sk-paid"
TAKEN = {"model", "messages", "temperature", "max_tokens", "stream", "stream_options", "top_p"}
AGENTS = ("agent-1", "agent-2")
SCENARIOS = 11


class Paid(BaseHTTPRequestHandler):
    """A paid model's server: it asks for its key, and refuses any field that it does not know."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers["authorization"] != f"Bearer {KEY}":
            return self.says(401, {"error": {"message": "Incorrect API key", "type": "invalid_request_error"}})
        if unknown := body.keys() - TAKEN:
            error = {"message": f"Unrecognized request argument: {min(unknown)}", "type": "invalid_request_error"}
            return self.says(400, {"error": error})
        message = {"role": "assistant", "content": "Sorry, it comes tomorrow."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
        head = {"id": "c", "object": "chat.completion", "created": 1, "model": body["model"]}
        return self.says(200, {**head, "choices": [choice], "usage": usage})

    def says(self, status: int, reply: object) -> None:
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def paid() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Paid)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def customer() -> Iterator[Running]:
    """An installation whose user has put a key where `ratchet base endpoint` says."""
    with tempfile.TemporaryDirectory(prefix="ratchet-paid-", ignore_cleanup_errors=True) as home:
        secrets = Path(home) / "mine" / "secrets"
        secrets.mkdir(parents=True)
        (secrets / "upstream-keys.json").write_text(json.dumps({"openai": KEY}))
        yield from _up(Path(home) / "mine")


async def ask(customer: Running, agent: str, number: int, key: str, environment: dict[str, str | None]) -> str:
    """One run through the gateway; the two agents take turns at being good."""
    url, credentials = environment["RATCHET_NATS_URL"], environment["RATCHET_CREDENTIALS"]
    async with Recorder(str(url), agent, credentials=str(credentials)) as recorder:
        openai = AsyncOpenAI(base_url=environment["OPENAI_BASE_URL"], api_key=key, max_retries=0)
        client, asked = wrap_openai(openai, recorder), f"Parcel {number} is late."
        opened = recorder.trajectory(scenario_id=f"ticket-{number}", model="default")
        async with openai, opened as run, run.step() as step:
            await client.chat.completions.create(model="default", messages=[{"role": "user", "content": asked}])
            step.action("answer", success=True)
        return run.trajectory_id


async def work(customer: Running) -> None:
    customer.ratchet("outcomes", "credential")
    world_url = dotenv_values(customer.directory / "world.env")["RATCHET_OUTCOMES_URL"]
    async with Outcomes(str(world_url), "desk") as world:
        for turn, agent in enumerate(AGENTS):
            customer.ratchet("agents", "add", agent)
            key = customer.ratchet("agents", "key", agent).strip()
            environment = dict(dotenv_values(customer.directory / "agents" / f"{agent}.env"))
            ids = await asyncio.gather(*(ask(customer, agent, n, key, environment) for n in range(SCENARIOS)))
            for number, trajectory_id in enumerate(ids):
                await world.reward(agent, trajectory_id, float(number % 2 == turn))


def test_from_a_model_one_pays_for_to_a_model_one_owns(customer: Running, paid: str, tmp_path: Path) -> None:
    said = customer.json("base", "endpoint", paid, "--model", "gpt-4o-mini", "--key", "openai")
    assert said["version"] == "v0"
    customer.until(
        "select state from deployments where version = 'v0'",
        holds=lambda rows: [row["state"] for row in rows] == ["promoted"],
        within_s=30,
    )
    asyncio.run(work(customer))
    create_corpus_base([[{"role": "user", "content": "Sorry, the parcel is late."}]], tmp_path / "student", 0)
    assert customer.json("base", "register", str(tmp_path / "student"))["student_of"] == "v0"
    customer.ratchet("window", "close", "--yes")

    [batch] = customer.until(
        "select * from batches", holds=lambda rows: bool(rows) and rows[0]["state"] != "claimed", within_s=90
    )
    assert (batch["state"], batch["method"], batch["failure"]) == ("trained", "imitation", None)
    labels = customer.rows("select label, count(*) from batch_trajectories where trained group by label")
    assert [tuple(row.values()) for row in labels] == [("imitation", SCENARIOS)]
    answered = customer.rows("select distinct model_version, witnessed from llm_calls where witnessed")
    assert [row["model_version"] for row in answered] == ["v0"]
    customer.until(
        "select state from deployments where version = 'v1'",
        holds=lambda rows: [row["state"] for row in rows] == ["canary"],
        within_s=60,
    )
    v1, v0 = customer.json("models")
    assert (v1["parent"], v1["control"], v0["serving"]["base_url"]) == ("v0", "v0", paid)
    assert "endpoint http" in customer.ratchet("models")
    kept = b"".join(file.read_bytes() for file in (customer.directory / "logs").iterdir())
    assert KEY.encode() not in kept + json.dumps(customer.rows("select document from routes"), default=str).encode()
