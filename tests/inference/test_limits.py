"""Over a real socket: nobody waits for ever, crowds others out or gets in; one bad model stops no other."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.deployer.domain import Version
from services.deployer.serving.places import Places
from services.deployer.serving.serving import NotYet, Verified
from services.deployer.settings import DeployerSettings
from services.gateway.service import Broken, Refused, Replied
from services.gateway.upstream import HttpTargets
from services.inference.app import inference
from services.inference.domain import Answer, Ask, Piece, Reply, Scored
from services.inference.service import Inference
from services.inference.settings import InferenceSettings
from shared.artifacts import DirectoryStore
from shared.routing import Target
from tests.inference.conftest import Checkpoints, listening
from tests.inference.test_service import model_of

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "buy or sell?"}], "max_tokens": 2}


class Endless:
    """A model that answers once it is let go, or when nobody waits any more."""

    def __init__(self) -> None:
        self.started, self.let_go = threading.Event(), threading.Event()
        self.unwanted = 0
        self.asked: dict[int, Ask] = {}

    def add(self, name: str, directory: Path) -> None: ...

    def remove(self, name: str) -> None: ...

    def score(self, name: str, ids: Sequence[int]) -> Scored:
        raise NotImplementedError

    def turn(self, newcomers: Sequence[tuple[int, str, Ask]]) -> list[tuple[int, Piece | Answer]]:
        self.started.set()
        self.asked |= {key: ask for key, _, ask in newcomers}
        if not self.let_go.wait(0.005):
            left = [key for key, ask in self.asked.items() if not ask.wanted()]
            self.unwanted += len(left)
        else:
            left = list(self.asked)
        for key in left:
            del self.asked[key]
        return [(key, Reply([1], [2], [0.0], ["a"], "a", "stop")) for key in left]


def serving(checkpoints: Checkpoints, model: Endless, **limits: Any) -> Inference:
    store = DirectoryStore(checkpoints.root)
    return Inference(store, lambda _: model, max_loaded=2, batch_max=8, batch_wait_s=0, **limits)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


async def test_who_leaves_frees_the_row(checkpoints: Checkpoints) -> None:
    model = Endless()
    service = serving(checkpoints, model)
    async with listening(service) as url, httpx.AsyncClient() as http:
        asking = asyncio.create_task(http.post(f"{url}/chat/completions", json={"model": checkpoints.sha, **CHAT}))
        await asyncio.to_thread(model.started.wait)
        asking.cancel()
        await asyncio.wait_for(until(lambda: model.unwanted == 1), 10)
    await service.close()


async def test_a_row_that_nobody_waits_for_ends_before_its_length(checkpoints: Checkpoints) -> None:
    [left] = model_of(checkpoints).answer([Ask(CHAT["messages"], wanted=lambda: False)])
    assert isinstance(left, Reply)
    assert len(left.token_ids) == 1


async def test_a_reply_that_takes_too_long_is_given_up(checkpoints: Checkpoints) -> None:
    model = Endless()
    service = serving(checkpoints, model, answer_s=0.05)
    async with listening(service) as url, httpx.AsyncClient() as http:
        late = await http.post(f"{url}/chat/completions", json={"model": checkpoints.sha, **CHAT})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    await service.close()
    assert model.unwanted == 1


async def test_more_than_may_wait_are_told_to_come_back(checkpoints: Checkpoints) -> None:
    model = Endless()
    service = serving(checkpoints, model, waiting_max=1)
    async with listening(service) as url, httpx.AsyncClient() as http:
        ask: dict[str, Any] = {"url": f"{url}/chat/completions", "json": {"model": checkpoints.sha, **CHAT}}
        first = asyncio.create_task(http.post(**ask))
        await asyncio.to_thread(model.started.wait)
        second = await http.post(**ask)
        assert (second.status_code, second.headers["retry-after"]) == (429, "1")
        assert "1 requests wait already" in second.json()["error"]["message"]
        model.let_go.set()
        assert (await first).status_code == 200
        assert (await http.post(**ask)).status_code == 200
    await service.close()


async def test_a_body_that_does_not_arrive_is_not_waited_for(service: Inference) -> None:
    async with listening(service, body_timeout_s=0.05) as url:
        where = httpx.URL(url)
        reader, writer = await asyncio.open_connection(where.host, where.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 10)
        writer.close()


async def test_a_token_is_asked_for_where_one_is_set(service: Inference, checkpoints: Checkpoints) -> None:
    async with listening(service, token="secret") as url, httpx.AsyncClient() as http:  # of this test
        body = {"model": checkpoints.sha, **CHAT}
        for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "Basic secret"}):
            refused = await http.post(f"{url}/chat/completions", json=body, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert (await http.get(f"{url}/models", headers=headers)).status_code == 401
        known = {"authorization": "Bearer secret"}
        assert (await http.post(f"{url}/chat/completions", json=body, headers=known)).status_code == 200
        assert (await http.get(f"{url}/models", headers=known)).status_code == 200


async def test_gateway_and_deployer_send_the_token(service: Inference, checkpoints: Checkpoints) -> None:
    async with listening(service, token="secret") as url:  # of this test
        target = Target(base_url=url, model=checkpoints.sha, artifact_sha256=checkpoints.sha)
        for token, asked, verified in (("secret", Replied, Verified), (None, Broken, NotYet)):
            targets = HttpTargets(timeout_s=30, connect_timeout_s=5, connections=1, token=token)
            settings = DeployerSettings(inference_url=url, inference_token=token)
            places = Places(settings, DirectoryStore(checkpoints.root))
            assert isinstance(await targets.ask(target, {"model": checkpoints.sha, **CHAT}), asked)
            version = Version(policy="default", version="v0", number=0, artifact_sha256=checkpoints.sha)
            assert isinstance(await places.verify(version), verified)
            await targets.close()
            await places.close()


@pytest.mark.parametrize("more", [{"stream": 1}, {"response_format": {"type": "json_object"}}, {"top_k": "a"}])
async def test_a_refusal_is_no_failure_of_the_target(
    service: Inference, checkpoints: Checkpoints, more: dict[str, Any]
) -> None:
    """The gateway passes a 400 on; it would ask another version, and say 502, if it took it for a failure."""
    targets = HttpTargets(timeout_s=30, connect_timeout_s=5, connections=1)
    async with listening(service) as url:
        target = Target(base_url=url, model=checkpoints.sha, artifact_sha256=checkpoints.sha)
        refused = await targets.ask(target, {"model": checkpoints.sha, **CHAT, **more})
    assert isinstance(refused, Refused)
    assert refused.status == 400
    await targets.close()


def test_it_listens_on_this_machine_alone_unless_told() -> None:
    assert InferenceSettings().http_host == "127.0.0.1"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
async def test_a_bad_artifact_stops_no_other(checkpoints: Checkpoints, tmp_path: Path, file: str) -> None:
    store = DirectoryStore(tmp_path / "store")
    good = store.put(checkpoints.directory).sha256
    broken = shutil.copytree(checkpoints.directory, tmp_path / "broken")
    (broken / file).write_text("{% if %}" if file.endswith("jinja") else "{[")
    bad = store.put(broken).sha256
    service = inference(InferenceSettings(artifacts_dir=store.root, device="cpu"))
    async with listening(service) as url, httpx.AsyncClient(timeout=30) as http:
        for sha256, status in ((good, 200), (bad, 400 if file.endswith("jinja") else 404), (good, 200)):
            reply = await http.post(f"{url}/chat/completions", json={"model": sha256, **CHAT})
            assert reply.status_code == status, reply.text
    await service.close()
