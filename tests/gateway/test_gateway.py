"""The whole gateway over real HTTP, with the OpenAI client, a real broker and a stand-in model's server."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from services.local.embedded import NatsServer
from shared import subjects
from shared.credentials import fingerprint, new_key
from shared.events import GatewayHealth
from shared.routing import Target, assigned
from shared.windows import window_at
from tests.gateway.conftest import MESSAGES, NOON, WINDOW_S, House, document, headers


async def test_a_call_is_answered_routed_and_recorded(house: House) -> None:
    await house.route(document(house.upstream_url, {"v1": 0.5, "v2": 0.5}))
    raw = await house.client().chat.completions.with_raw_response.create(
        model="default",
        messages=MESSAGES,
        temperature=0.7,
        max_tokens=8,
        tools=[{"type": "function", "function": {"name": "sell", "parameters": {}}}],
        extra_headers=headers(Purpose="reasoning"),
    )
    reply = raw.parse()
    version = assigned(house.routes.get("default"), "a1", NOON)  # type: ignore[arg-type]  # it was just put there

    assert reply.choices[0].message.content == f"hello from sha-{version}"
    assert (reply.model, reply.system_fingerprint) == (version, f"sha-{version}")
    assert raw.headers["x-ratchet-model-version"] == version
    assert raw.headers["x-ratchet-call-id"] == reply.id
    assert reply.choices[0].logprobs is None
    assert not {"prompt_token_ids", "token_ids"} & (
        set(reply.model_extra or {}) | set(reply.choices[0].model_extra or {})
    )
    [asked] = house.upstream.asked
    assert (asked["model"], asked["temperature"], asked["top_p"]) == (f"sha-{version}", 0.7, 1.0)
    assert asked["logprobs"] is asked["return_token_ids"] is True
    assert asked["tools"][0]["function"]["name"] == "sell"

    [(where, event, sent)] = await house.events()
    assert where == f"calls.a1 a1:{event.event_id}"
    assert (event.policy, event.trajectory_id, event.step, event.started_at) == ("default", "t1", 3, NOON)
    call = event.call
    assert (call.call_id, call.purpose, call.model, call.model_version) == (reply.id, "reasoning", "default", version)
    assert call.messages == MESSAGES
    assert call.prompt_token_ids == [9, 8]
    assert call.response is not None
    assert call.response["token_ids"] == [1, 2, 3]
    assert [token["logprob"] for token in call.response["logprobs"]["content"]] == [-0.5] * 3
    assert call.response["message"]["content"] == reply.choices[0].message.content
    assert (call.temperature, call.top_p, call.max_tokens) == (0.7, 1.0, 8)
    assert call.usage == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert call.latency_ms is not None
    assert b"assigned_version" not in sent


async def test_a_run_keeps_its_version_and_windows_draw_afresh(house: House) -> None:
    made = document(house.upstream_url, {"v1": 0.5, "v2": 0.5})
    await house.route(made)
    for minutes in range(8):
        started = NOON + timedelta(minutes=minutes, seconds=59)
        extra = {"X-Ratchet-Trajectory": f"t{minutes}", "X-Ratchet-Started-At": started.isoformat()}
        versions = {
            (
                await house.client().chat.completions.create(model="default", messages=MESSAGES, extra_headers=extra)
            ).model
            for _ in range(2)
        }
        assert versions == {assigned(made, "a1", window_at(started, WINDOW_S).starts_at)}
    assert {event.call.model_version for _, event, _ in await house.events()} == {"v1", "v2"}


async def test_without_a_trajectory_nothing_is_recorded(house: House) -> None:
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    reply = await house.client().chat.completions.create(model="default", messages=MESSAGES, logprobs=True)
    assert reply.choices[0].logprobs is not None
    assert await house.events() == []


async def test_the_best_version_stands_in_and_the_record_says_so(house: House) -> None:
    hows = ["500", "404", "hang", "garbage", "empty", "quarantined", "no target"]
    for revision, how in enumerate(hows, start=1):
        barred = ["v2"] if how == "quarantined" else []
        made = document(house.upstream_url, {"v1": 0.0, "v2": 1.0}, revision=revision, quarantined=barred)
        if how == "no target":
            del made.targets["v2"]
        await house.route(made)
        house.upstream.broken["sha-v2"] = how
        house.upstream.asked.clear()
        reply = await house.client().chat.completions.create(
            model="default", messages=MESSAGES, extra_headers=headers()
        )
        assert (reply.model, reply.choices[0].message.content) == ("v1", "hello from sha-v1"), how
        tried = "sha-v2" in [asked["model"] for asked in house.upstream.asked]
        assert tried == (how not in ("quarantined", "no target")), how
    events = await house.events()
    assert {event.call.model_version for _, event, _ in events} == {"v1"}
    assert [event.call.model_extra for _, event, _ in events] == [{"assigned_version": "v2", "fallback": True}] * 7


async def test_where_nothing_answers_the_client_hears_502_and_operators_of_both(house: House) -> None:
    heard = await house.bus.nc.subscribe(subjects.GATEWAY_HEALTH)
    made = document(house.upstream_url, {"v1": 0.0, "v2": 1.0})
    dead = Target(base_url="http://127.0.0.1:1/v1", model="x", artifact_sha256="x")
    await house.route(made.model_copy(update={"targets": {"v1": dead, "v2": dead}}))
    with pytest.raises(openai.InternalServerError) as failure:
        await house.client().chat.completions.create(model="default", messages=MESSAGES, extra_headers=headers())
    assert failure.value.status_code == 502
    assert failure.value.code == "upstream_failed"

    await house.route(document(house.upstream_url, {"v1": 0.0, "v2": 1.0}, revision=2))
    house.upstream.broken["sha-v2"] = "500"
    await house.client().chat.completions.create(model="default", messages=MESSAGES)
    await house.health.report()
    reports = [GatewayHealth.model_validate_json((await heard.next_msg(timeout=5)).data) for _ in range(2)]
    assert [(r.version, r.requests, r.failures, r.fallbacks) for r in reports] == [("v1", 1, 1, 0), ("v2", 2, 1, 1)]
    assert await house.events() == []


async def test_the_request_s_own_faults_come_back_as_they_are(house: House) -> None:
    await house.route(document(house.upstream_url, {"v1": 0.0, "v2": 1.0}))
    house.upstream.broken["sha-v2"] = "429"
    with pytest.raises(openai.RateLimitError) as failure:
        await house.client().chat.completions.create(model="default", messages=MESSAGES)
    assert failure.value.response.headers["retry-after"] == "7"
    assert len(house.upstream.asked) == 1


async def test_a_stream_passes_through_and_is_recorded_whole(house: House) -> None:
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    stream = await house.client().chat.completions.create(
        model="default", messages=MESSAGES, stream=True, extra_headers=headers()
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello from sha-v1"
    assert {chunk.model for chunk in chunks} == {"v1"}
    assert all(not set(chunk.choices[0].model_extra or {}) and chunk.choices[0].logprobs is None for chunk in chunks)
    [(_, event, _)] = await house.events()
    assert {chunk.id for chunk in chunks} == {event.call.call_id}
    assert event.call.prompt_token_ids == [9, 8]
    assert event.call.response == {
        "index": 0,
        "message": {"role": "assistant", "content": "hello from sha-v1"},
        "finish_reason": "stop",
        "logprobs": {
            "content": [{"token": "t", "logprob": -0.5, "bytes": None, "top_logprobs": []}] * 3,
        },
        "token_ids": [1, 2, 3],
    }
    assert event.call.usage is not None
    assert event.call.model_extra == {}


async def test_a_stream_that_cannot_begin_falls_back(house: House) -> None:
    await house.route(document(house.upstream_url, {"v1": 0.0, "v2": 1.0}))
    house.upstream.broken["sha-v2"] = "500"
    stream = await house.client().chat.completions.create(
        model="default", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, extra_headers=headers()
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage is not None
    assert {chunk.model for chunk in chunks} == {"v1"}


async def test_a_stream_without_done_is_whole_and_only_cr_and_lf_end_its_lines(house: House) -> None:
    """U+2028 and the like stand in a text as they are; ``"error": null`` and ``"choices": null`` say nothing."""
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    house.upstream.broken["sha-v1"] = "no done"
    stream = await house.client().chat.completions.create(
        model="default", messages=MESSAGES, stream=True, extra_headers=headers()
    )
    chunks = [chunk async for chunk in stream]
    text = "hello\u2028 \x0b\x85 from sha-v1"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == "\ud83d" + "\ude00" + text, "a character that was cut in two goes on as it came"
    [(_, event, _)] = await house.events()
    assert event.call.model_extra == {}
    assert event.call.response is not None
    assert (event.call.response["message"]["content"], event.call.response["finish_reason"]) == (
        "\U0001f600" + text,
        "stop",
    )


@pytest.mark.parametrize("how", ["cut", "left"])
async def test_a_stream_that_does_not_end_is_recorded_as_far_as_it_came(house: House, how: str) -> None:
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    house.upstream.broken["sha-v1"] = "cut" if how == "cut" else "slow"
    stream = await house.client().chat.completions.create(
        model="default", messages=MESSAGES, stream=True, extra_headers=headers()
    )
    if how == "cut":
        with pytest.raises(openai.APIError, match="broke off"):
            [chunk async for chunk in stream]
    else:
        await anext(aiter(stream))
        await stream.close()
    while not (events := await house.events()):
        await asyncio.sleep(0.02)
    [(_, event, _)] = events
    assert event.call.model_extra == {"incomplete": True, **({"broken_off": True} if how == "cut" else {})}
    assert event.call.response is not None
    assert event.call.response["finish_reason"] == "length"
    assert event.call.response["token_ids"] == ([1, 2] if how == "cut" else [1])


async def test_wrong_requests_are_told_what_is_wrong(house: House) -> None:
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    client = house.client()
    for key in ("rk-a1.0000", "sk-x", new_key(), house.key[:-1], house.key + "A", fingerprint(house.key)):
        with pytest.raises(openai.AuthenticationError):
            await house.client(api_key=key).chat.completions.create(model="default", messages=MESSAGES)
    with pytest.raises(openai.AuthenticationError):
        await house.client(api_key="x").models.list()
    with pytest.raises(openai.NotFoundError, match="no policy other"):
        await client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="X-Ratchet-Step"):
        await client.chat.completions.create(model="default", messages=MESSAGES, extra_headers=headers(Step="-1"))
    with pytest.raises(openai.APIStatusError) as failure:
        await client.chat.completions.create(model="default", messages=[{"role": "user", "content": "x" * 300_000}])
    assert failure.value.status_code == 413
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {house.key}"}) as plain:
        for content in (b"{", b"[]", b'{"model": "default", "messages": [NaN]}'):
            answer = await plain.post(f"{house.url}/v1/chat/completions", content=content)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "invalid_request"
    assert [model.id async for model in client.models.list()] == ["default"]
    assert house.upstream.asked == []


async def test_a_conversation_is_recorded_by_what_each_call_added(house: House) -> None:
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    client = house.client()
    first = await client.chat.completions.create(model="default", messages=MESSAGES, extra_headers=headers())
    more = [*MESSAGES, first.choices[0].message.model_dump(), {"role": "user", "content": "sure?"}]
    extra = headers(Base_Call_Id=first.id)
    await client.chat.completions.create(model="default", messages=more, extra_headers=extra)
    await client.chat.completions.create(model="default", messages=more[1:], extra_headers=extra)
    _, (_, second, _), (_, third, _) = await house.events()
    assert second.call.base_call_id == first.id
    assert second.call.messages == [{"role": "user", "content": "sure?"}]
    assert third.call.base_call_id is None
    assert third.call.messages == more[1:]


async def test_large_events_travel_gzipped(house: House) -> None:
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    messages: Any = [{"role": "user", "content": "x" * 100_000}]
    await house.client().chat.completions.create(model="default", messages=messages, extra_headers=headers())
    message = await house.bus.js.get_msg("STEPS", 1)
    assert (message.headers or {})["Content-Encoding"] == "gzip"
    [(_, event, sent)] = await house.events()
    assert event.call.messages == messages
    assert json.loads(sent)["kind"] == "llm_call"


async def test_while_the_broker_is_away_calls_are_answered_and_recorded_later(
    house: House, nats_server: NatsServer, tmp_path: Path
) -> None:
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    client = house.client()
    nats_server.stop()
    while house.bus.nc.is_connected:
        await asyncio.sleep(0.01)
    reply = await client.chat.completions.create(model="default", messages=MESSAGES, extra_headers=headers())
    nats_server.start()
    await asyncio.wait_for(house.records.flush(), 20)
    while not house.bus.nc.is_connected:
        await asyncio.sleep(0.05)
    await house.records.flush()
    assert [event.call.call_id for _, event, _ in await house.events()] == [reply.id]


async def test_routes_are_read_again_after_the_broker_lost_the_watch(house: House, nats_server: NatsServer) -> None:
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    nats_server.stop()
    while house.bus.nc.is_connected:
        await asyncio.sleep(0.01)
    nats_server.start()
    while not house.bus.nc.is_connected:
        await asyncio.sleep(0.05)
    changed = document(house.upstream_url, {"v2": 1.0}, revision=2)
    bucket = await house.bus.js.key_value(subjects.ROUTES_BUCKET)
    await bucket.put("default", changed.model_dump_json().encode())
    while house.routes.get("default") != changed:
        await asyncio.sleep(0.02)
    assert await house.routes.ready() is None


async def test_a_document_that_is_none_leaves_the_one_before(house: House) -> None:
    made = document(house.upstream_url, {"v1": 1.0})
    await house.route(made)
    bucket = await house.bus.js.key_value(subjects.ROUTES_BUCKET)
    await bucket.put("default", b'{"policy": "default"}')
    await house.route(made.model_copy(update={"policy": "other"}))
    assert house.routes.get("default") == made
    await bucket.delete("other")
    while house.routes.policies() != ["default"]:
        await asyncio.sleep(0.005)
