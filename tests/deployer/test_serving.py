"""Versions where they are served: vLLM with adapters that come and go, and a fixed endpoint behind a key."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import SecretStr

from services.deployer.domain import Version
from services.deployer.serving.serving import NotYet, Wrong
from services.deployer.settings import DeployerSettings
from shared import subjects
from shared.errors import ConfigurationError, GiveUpError
from shared.events import ModelTrained
from shared.settings import load
from shared.upstream import Place
from tests.deployer.fake_vllm import DRAWN, PROMPT, FakeVllm, adapter
from tests.deployer.test_service import House, house  # noqa: F401  # the fixture is used by its name
from tests.gateway.standin import listening

KEY = "sk-nobody-must-see-this"


@dataclass
class OnVllm:
    house: House
    vllm: FakeVllm

    async def train(self, version: str, *, shift: float = 0.1, probe: Any = None) -> str:
        """A LoRA version as the trainer leaves it behind. Returns what vLLM is to call it."""
        base = await self.house.pool.fetchval("select artifact_sha256 from models where version = 'v0'")
        kept = self.house.artifacts.put(adapter(self.house.tmp / f"lora-{version}", base, shift=shift, probe=probe))
        await self.house.pool.execute(
            "insert into artifacts (sha256, uri, size_bytes, files) values ($1, $2, $3, $4)",
            kept.sha256,
            kept.uri,
            kept.size_bytes,
            kept.files,
        )
        await self.house.pool.execute(
            """insert into models (policy, version, number, method, artifact_sha256, adapter_of, parent)
               values ('default', $1, $2, 'grpo', $3, $4, 'v0')""",
            version,
            int(version[1:]),
            kept.sha256,
            base,
        )
        trained = {"artifact_sha256": kept.sha256, "adapter_of": base, "method": "grpo"}
        await self.house.deployer.trained(ModelTrained(policy="default", version=version, **trained))
        await self.house.deployer.verify_due()
        return f"default-{version}-{kept.sha256[:8]}"

    async def row(self, version: str) -> Any:
        return await self.house.pool.fetchrow("select * from deployments where version = $1", version)


@pytest.fixture
async def on_vllm(house: House) -> AsyncIterator[OnVllm]:  # noqa: F811  # pytest passes the fixture under its name
    vllm = FakeVllm()
    async with listening(vllm.app) as url:
        seen = str(house.artifacts.root)
        place = Place(kind="vllm", base_url=f"{url}/v1", model="base", credential="gpu", artifacts=seen)
        house.deployer._settings.serving = {"default": place}
        house.deployer._settings.upstream_keys = {"gpu": SecretStr(KEY)}
        yield OnVllm(house, vllm)


async def test_an_adapter_is_loaded_tried_on_its_share_and_unloaded_when_it_is_rolled_back(on_vllm: OnVllm) -> None:
    at, vllm = on_vllm.house, on_vllm.vllm
    vllm.adapters["somebody-else-s"] = "/theirs"
    await at.train("v0")
    assert (await at.in_bucket()).targets["v0"].model == "base"
    assert "has no probe.json" in (await on_vllm.row("v0"))["verification"]

    name = await on_vllm.train("v1")
    assert vllm.adapters[name] == str(at.artifacts.root / (await at.document()).targets["v1"].artifact_sha256)  # type: ignore[operator]  # an adapter is an artifact
    assert vllm.asked("completions") == [
        {"model": name, "prompt": PROMPT + DRAWN, "max_tokens": 1, "prompt_logprobs": 0}
    ]
    row = await on_vllm.row("v1")
    assert (row["state"], row["mismatch"]) == ("canary", pytest.approx(0, abs=1e-9))
    assert row["verification"].startswith("3 tokens: ")
    target = (await at.in_bucket()).targets["v1"]
    assert (target.kind, target.model, target.credential) == ("vllm", name, "gpu")

    await at.deployer.keep_served()
    assert len(vllm.asked("load_lora_adapter")) == 1
    vllm.adapters.clear()  # the server began anew
    await at.deployer.keep_served()
    assert list(vllm.adapters) == [name]

    vllm.adapters["somebody-else-s"] = "/theirs"
    await at.deployer.rollback("default", "v1", "it lies")
    await at.deployer.keep_served()
    assert list(vllm.adapters) == ["somebody-else-s"]
    assert set(vllm.keys) == {f"Bearer {KEY}"}


async def test_a_version_whose_tokens_the_server_weighs_otherwise_is_never_seen(on_vllm: OnVllm) -> None:
    await on_vllm.house.train("v0")
    on_vllm.vllm.off = 0.2
    name = await on_vllm.train("v1")
    row = await on_vllm.row("v1")
    assert (row["state"], row["mismatch"]) == ("refused", pytest.approx(0.2))
    assert "differ by 0.2 nats a token, 0.05 may be" in row["reason"]
    assert list((await on_vllm.house.document()).targets) == ["v0"]
    await on_vllm.house.deployer.keep_served()
    assert name not in on_vllm.vllm.adapters


@pytest.mark.parametrize(
    ("probe", "listed", "state", "words"),
    [
        ({"prompts": []}, None, "refused", "probe.json of the artifact cannot be read"),
        (None, [None] * len(PROMPT + DRAWN), "refused", "3 of 3 log probabilities are missing"),
        (None, [None], "canary", "not compared: the endpoint gives no prompt_logprobs"),
        (None, "unscored", "canary", "not compared: the endpoint scores nothing"),
    ],
)
async def test_what_cannot_be_compared_is_said(
    on_vllm: OnVllm, probe: Any, listed: Any, state: str, words: str
) -> None:
    await on_vllm.house.train("v0")
    on_vllm.vllm.scores, on_vllm.vllm.prompt_logprobs = listed != "unscored", listed
    await on_vllm.train("v1", probe=probe)
    row = await on_vllm.row("v1")
    assert (row["state"], row["mismatch"]) == (state, None)
    assert words in row["verification"]


async def test_whole_weights_are_not_for_vllm_beyond_its_base(on_vllm: OnVllm) -> None:
    await on_vllm.house.train("v0")
    await on_vllm.house.train("v1")
    assert (await on_vllm.row("v1"))["state"] == "refused"
    assert "it has whole weights" in (await on_vllm.row("v1"))["reason"]


async def test_a_server_that_takes_no_adapters_is_waited_for_and_named(house: House) -> None:  # noqa: F811
    vllm = FakeVllm(runtime_loading=False)
    async with listening(vllm.app) as url:
        house.deployer._settings.serving = {"default": Place(kind="vllm", base_url=f"{url}/v1", model="base")}
        await house.train("v0")
        on_vllm = OnVllm(house, vllm)
        await on_vllm.train("v1")
        assert (await on_vllm.row("v1"))["state"] == "verifying"
        await house.pool.execute("update deployments set created_at = now() - interval '61 s' where version = 'v1'")
        await house.deployer.verify_due()
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in (await on_vllm.row("v1"))["reason"]


async def test_another_adapter_under_the_same_name_is_not_taken_for_it(on_vllm: OnVllm) -> None:
    await on_vllm.house.train("v0")
    base = on_vllm.house.shas["v0"]
    kept = on_vllm.house.artifacts.put(adapter(on_vllm.house.tmp / "a", base, shift=0.1))
    version = Version(policy="default", version="v1", number=1, artifact_sha256=kept.sha256, adapter_of=base)
    on_vllm.vllm.adapters[f"default-v1-{kept.sha256[:8]}"] = "/elsewhere"
    outcome = await on_vllm.house.deployer._servings.verify(version)
    assert isinstance(outcome, Wrong)
    assert "read from /elsewhere" in outcome.reason


# a fixed endpoint ---------------------------------------------------------------------------------
async def paid(house: House, url: str, *, credential: str | None = "openai") -> None:  # noqa: F811
    """A paid model as v0: an endpoint, and no artifact."""
    serving = {"kind": "openai", "base_url": url, "model": "base", "credential": credential}
    await house.pool.execute(
        "insert into models (policy, version, number, method, serving) values ('default', 'v0', 0, 'base', $1)", serving
    )
    await house.deployer.trained(ModelTrained(policy="default", version="v0", serving=serving, method="base"))
    await house.deployer.verify_due()


async def test_a_paid_model_is_v0_and_its_key_stays_in_the_settings(
    house: House,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = FakeVllm()
    caplog.set_level(logging.DEBUG)
    house.deployer._settings.upstream_keys = {"openai": SecretStr(KEY)}
    async with listening(server.app) as url:
        await paid(house, f"{url}/v1")
    assert await house.states() == {"v0": "promoted"}
    assert server.keys == [f"Bearer {KEY}"]
    assert set(server.asked("chat/completions")[0]) == {"model", "messages"}
    bucket = await house.bus.js.key_value(subjects.ROUTES_BUCKET)
    sent = (await bucket.get("default")).value or b""
    target = json.loads(sent)["targets"]["v0"]
    assert (target["credential"], target["artifact_sha256"]) == ("openai", None)
    assert (target["neutral"], target["adds"]) == ([], ["stream_options"])
    rows = await house.pool.fetch(
        "select to_jsonb(d)::text as row from deployments d union select to_jsonb(r)::text from routes r"
    )
    written = capsys.readouterr()
    assert KEY not in sent.decode() + "".join(row["row"] for row in rows) + caplog.text + written.out + written.err


async def test_a_key_that_nobody_has_is_named_and_not_waited_for_for_ever(house: House) -> None:  # noqa: F811
    server = FakeVllm()
    async with listening(server.app) as url:
        await paid(house, f"{url}/v1", credential="nobody")
        assert await house.states() == {"v0": "verifying"}
        await house.pool.execute("update deployments set created_at = now() - interval '61 s'")
        await house.deployer.verify_due()
    assert await house.states() == {"v0": "refused"}
    assert "no key is named nobody here; add it to RATCHET_UPSTREAM_KEYS" in await house.reason("v0")
    assert server.calls == []


async def test_an_endpoint_that_repeats_a_key_is_not_quoted_with_it(house: House) -> None:  # noqa: F811
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def chat(request: Request) -> Response:
        return JSONResponse({"error": {"message": f"no quota for {request.headers['authorization']}"}}, 400)

    house.deployer._settings.upstream_keys = {"openai": SecretStr(KEY)}
    version = Version(
        policy="default",
        version="v0",
        number=0,
        artifact_sha256=None,
        serving={"kind": "openai", "base_url": "", "model": "m", "credential": "openai"},
    )
    async with listening(Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])) as url:
        assert version.serving is not None
        version.serving["base_url"] = f"{url}/v1"
        outcome = await house.deployer._servings.verify(version)
    assert outcome == NotYet("the endpoint refuses a chat: HTTP 400: no quota for Bearer [key]")


async def test_an_endpoint_serves_nothing_that_is_trained_here(house: House) -> None:  # noqa: F811
    place = Place(kind="openai", base_url="http://127.0.0.1:1/v1", model="gpt")
    house.deployer._settings.serving = {"default": place}
    version = Version(policy="default", version="v1", number=1, artifact_sha256="a" * 64)
    outcome = await house.deployer._servings.verify(version)
    assert isinstance(outcome, Wrong)
    assert "serves gpt alone" in outcome.reason


async def test_an_endpoint_that_cannot_be_read_is_refused(house: House) -> None:  # noqa: F811
    await paid(house, "ftp://x")
    assert await house.states() == {"v0": "refused"}
    assert "serving of default v0: base_url" in await house.reason("v0")


# artifacts and settings ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("UPSTREAM_KEYS", f"{{'openai': '{KEY}'}}", "expected a JSON object"),
        ("UPSTREAM_KEYS", f'["{KEY}"]', "expected a JSON object"),
        ("UPSTREAM_KEYS", f'{{"open ai": "{KEY}"}}', "a key's name must be letters"),
        ("UPSTREAM_KEYS", f'{{"openai": "{KEY}\\n"}}', "the key named openai must be text without spaces"),
        ("SERVING", '{"a": {"kind": "vllm", "base_url": "http://x/v1"}}', "needs model"),
        ("SERVING", f'{{"a": {{"kind": "inference", "base_url": "http://u:{KEY}@x/v1"}}}}', "RATCHET_UPSTREAM_KEYS"),
        ("SERVING", '{"a": {"kind": "inference", "base_url": "http://x/v1", "neutral": ["top_z"]}}', "top_z"),
    ],
)
def test_a_wrong_setting_says_so_without_the_key(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(f"RATCHET_{name}", value)
    with pytest.raises(ConfigurationError, match=words) as raised:
        load(DeployerSettings)
    assert str(raised.value).startswith(f"RATCHET_{name}")
    assert KEY not in f"{raised.value!r} {raised.value.__cause__!r}"


def test_no_keys_are_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_UPSTREAM_KEYS", "")
    assert load(DeployerSettings).upstream_keys == {}


async def test_an_operator_is_told_why_a_version_is_not_deployed(on_vllm: OnVllm) -> None:
    await on_vllm.house.train("v0")
    await on_vllm.house.register("v1")
    with pytest.raises(GiveUpError, match="v1 was not deployed: it has whole weights"):
        await on_vllm.house.deployer.deploy("default", "v1", None)
