"""wrap_openai with the real client over a real socket: behind a gateway and elsewhere, whole and streamed."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel
from ratchet_sdk import Recorder
from ratchet_sdk.events import Step
from ratchet_sdk.openai import wrap_openai

from services.local.embedded import NatsServer
from shared.bus import Bus
from tests.sdk.asking import ASK, FAIL, calls, client_of
from tests.sdk.standin import LOGPROBS, Provider
from tests.sdk.stored import stored


async def test_elsewhere_the_whole_call_is_recorded(provider: Provider, recorder: Recorder, bus: Bus) -> None:
    client = client_of(provider, recorder)
    messages = list(ASK)
    async with recorder.trajectory() as run, run.step():
        reply = await client.chat.completions.create(
            model="m", messages=messages, temperature=0.5, max_completion_tokens=9, seed=3
        )
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})
        await client.chat.completions.create(model="m", messages=[*ASK, reply.choices[0].message])
    first, second = await calls(recorder, bus)
    assert first.messages == ASK
    assert (first.model, first.model_version, first.temperature) == ("m", "m-1", 0.5)
    assert (first.max_tokens, first.seed, first.top_p, first.tools) == (9, 3, None, None)
    assert first.response is not None
    assert first.response["message"] == {"role": "assistant", "content": "buy"}
    assert (first.response["token_ids"], first.response["logprobs"]) == ([5, 6], LOGPROBS)
    assert first.prompt_token_ids == [1, 2, 3]
    assert first.usage is not None
    assert first.usage["completion_tokens"] == 2
    assert first.latency_ms is not None
    assert second.messages[1] == {"role": "assistant", "content": "buy"}


async def test_how_a_reply_was_drawn_is_recorded_whole(provider: Provider, recorder: Recorder, bus: Bus) -> None:
    class Order(BaseModel):
        side: str

    client = client_of(provider, recorder)
    named: Any = {"temperature": 0.5, "presence_penalty": 0.1, "stop": ["."], "logit_bias": {"7": -1}, "max_tokens": 9}
    tool = {"type": "function", "function": {"name": "order"}}
    async with recorder.trajectory() as run, run.step():
        await client.chat.completions.create(
            model="m",
            messages=ASK,
            tools=[tool],  # type: ignore[list-item]  # a tool's parameters may be left away
            tool_choice="required",
            top_p=openai.NOT_GIVEN,
            extra_body={"top_k": 20, "min_p": 0.05, "guided_regex": "a|b"},
            **named,
        )
        await client.chat.completions.parse(model="m", messages=ASK, response_format=Order)
        await client.chat.completions.create(model="m", messages=ASK)
    first, parsed, last = await calls(recorder, bus)
    asked = {"top_k": 20, "min_p": 0.05, "guided_regex": "a|b", "tool_choice": "required"}
    assert first.sampling == {**named, **asked}
    schema = {"name": "Order", "schema": Order.model_json_schema()}
    assert parsed.sampling == {"response_format": {"type": "json_schema", "json_schema": schema}}
    assert last.sampling is None


async def test_a_stream_is_handed_on_and_recorded_as_a_whole(provider: Provider, recorder: Recorder, bus: Bus) -> None:
    client = client_of(provider, recorder)
    async with recorder.trajectory() as run, run.step():
        stream = await client.chat.completions.create(model="m", messages=ASK, stream=True)
        parts = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices]
        assert stream.response.status_code == 200
    assert parts == ["", "bu", "y", None]
    [call] = await calls(recorder, bus)
    assert call.response == {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": "buy"},
        "token_ids": [5, 6],
        "logprobs": {"content": LOGPROBS["content"] * 2},
    }
    assert (call.model_version, call.usage) == (
        "m-1",
        {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    )


async def test_streamed_tool_calls_are_put_together(provider: Provider, recorder: Recorder, bus: Bus) -> None:
    client = client_of(provider, recorder)
    async with recorder.trajectory() as run, run.step():
        stream = await client.chat.completions.create(
            model="m", messages=ASK, stream=True, tools=[{"type": "function", "function": {"name": "order"}}]
        )
        async for _ in stream:
            pass
    [call] = await calls(recorder, bus)
    assert call.tools == [{"type": "function", "function": {"name": "order"}}]
    assert call.response is not None
    assert call.response["finish_reason"] == "tool_calls"
    assert call.response["message"]["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "order", "arguments": '{"n": 3}'}}
    ]


async def test_a_stream_that_is_left_early_or_read_late_is_recorded(
    provider: Provider, recorder: Recorder, bus: Bus
) -> None:
    client = client_of(provider, recorder)
    async with recorder.trajectory() as run:
        async with run.step():
            async with await client.chat.completions.create(model="m", messages=ASK, stream=True) as stream:
                async for chunk in stream:
                    if chunk.choices[0].delta.content == "bu":
                        break
            late = await client.chat.completions.create(model="m", messages=ASK, stream=True)
        async for _ in late:
            pass
    early, whole = await calls(recorder, bus)
    assert early.response is not None
    assert (early.response["message"]["content"], early.response["finish_reason"]) == ("bu", None)
    assert whole.response is not None
    assert whole.response["message"]["content"] == "buy"


@pytest.mark.parametrize("streamed", [False, True])
async def test_behind_the_gateway_a_call_is_referred_to(
    gateway: Provider, recorder: Recorder, bus: Bus, streamed: bool
) -> None:
    client = client_of(gateway, recorder)
    async with recorder.trajectory() as run, run.step() as step:
        reply = await client.chat.completions.create(model="traders", messages=ASK, stream=streamed)
        if isinstance(reply, openai.AsyncStream):
            assert [c.choices[0].delta.content async for c in reply if c.choices] == ["", "bu", "y", None]
        sent = step.headers()
    assert {name: gateway.headers[0][name.lower()] for name in sent} == sent
    [call] = await calls(recorder, bus)
    assert (call.call_id, call.model, call.model_version) == ("call-1", "traders", "v7")
    assert (call.messages, call.response) == ([], None)


async def test_the_same_by_hand(gateway: Provider, recorder: Recorder, bus: Bus) -> None:
    client = AsyncOpenAI(base_url=gateway.url, api_key="k")
    async with recorder.trajectory() as run, run.step() as step:
        reply = await client.chat.completions.create(model="m", messages=ASK, extra_headers=step.headers())
        assert step.refer(reply) == "call-1"
        raw = await client.chat.completions.with_raw_response.create(model="m", messages=ASK)
        assert step.refer(raw, purpose="evaluation") == "call-2"
    assert [call.call_id for call in await calls(recorder, bus)] == ["call-1", "call-2"]


async def test_only_this_recorders_steps_are_recorded(
    provider: Provider, recorder: Recorder, nats_server: NatsServer, bus: Bus
) -> None:
    client = client_of(provider, recorder)
    await client.chat.completions.create(model="m", messages=ASK)
    async with Recorder(nats_server.url, "agent-2") as other, other.trajectory() as run, run.step():
        await client.chat.completions.create(model="m", messages=ASK)
    async with recorder.trajectory() as run, run.step():
        pass
    await client.chat.completions.create(model="m", messages=ASK)
    assert await calls(recorder, bus) == []
    assert not any("x-ratchet-trajectory" in headers for headers in provider.headers)


async def test_ids_stay_here_where_that_is_asked(provider: Provider, recorder: Recorder, bus: Bus) -> None:
    client = wrap_openai(AsyncOpenAI(base_url=provider.url, api_key="k"), recorder, send_headers=False)
    async with recorder.trajectory() as run, run.step():
        await client.chat.completions.create(model="m", messages=iter(ASK))
    assert not any(name.startswith("x-ratchet") for name in provider.headers[0])
    [call] = await calls(recorder, bus)
    assert call.messages == ASK


async def test_an_error_of_the_server_is_recorded_and_the_agents_as_it_was(
    provider: Provider, recorder: Recorder, bus: Bus
) -> None:
    client = client_of(provider, recorder)
    with pytest.raises(openai.BadRequestError) as bare:
        await AsyncOpenAI(base_url=provider.url, api_key="k").chat.completions.create(model="m", messages=FAIL)
    with pytest.raises(openai.BadRequestError) as met:
        async with recorder.trajectory() as run, run.step():
            await client.chat.completions.create(model="m", messages=FAIL)
    assert (str(met.value), met.value.body) == (str(bare.value), bare.value.body)
    assert await calls(recorder, bus) == []
    assert recorder.counts.published == 3
    [step] = [message.event for message in await stored(bus) if isinstance(message.event, Step)]
    assert step.model_extra is not None
    [failed] = step.model_extra["failed_calls"]
    assert (failed["model"], failed["error"]) == ("m", f"BadRequestError: {met.value}")
