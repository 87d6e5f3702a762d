"""wrap_openai, whichever way the client is asked and whatever becomes of the call."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from ratchet_sdk import Recorder, SyncRecorder
from ratchet_sdk.events import Step
from ratchet_sdk.openai import wrap_openai

from services.local.embedded import NatsServer
from shared.bus import Bus
from tests.sdk.asking import ASK, FAIL, calls, client_of
from tests.sdk.standin import Provider, serving
from tests.sdk.stored import stored


async def test_a_stream_that_breaks_off_is_recorded_as_far_as_it_came(
    provider: Provider, recorder: Recorder, bus: Bus
) -> None:
    client = client_of(provider, recorder)
    async with recorder.trajectory() as run, run.step():
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "break off"}], stream=True
        )
        with pytest.raises(openai.APIError, match="broken off"):
            async for _ in stream:
                pass
    [call] = await calls(recorder, bus)
    assert call.response is not None
    assert (call.response["message"]["content"], call.response["finish_reason"]) == ("bu", None)
    assert call.model_extra == {"error": "APIError"}


@pytest.mark.parametrize("held", [False, True])
async def test_a_stream_that_nobody_reads_on_is_recorded(
    provider: Provider, recorder: Recorder, bus: Bus, held: bool
) -> None:
    """Neither read to its end nor closed: recorded when it is let go, or when its run ends."""
    client = client_of(provider, recorder)
    async with recorder.trajectory() as run, run.step():
        stream = await client.chat.completions.create(model="m", messages=ASK, stream=True)
        assert isinstance(stream, openai.AsyncStream)
        async for chunk in stream:
            if chunk.choices[0].delta.content == "bu":
                break
        if not held:
            del stream
            gc.collect()
    [call] = await calls(recorder, bus)
    assert call.response is not None
    assert (call.response["message"]["content"], call.response["token_ids"]) == ("bu", [5])
    kinds = [message.event.kind for message in await stored(bus)]
    assert kinds == ["trajectory.started", "step", *(["llm_call"] if held else []), "trajectory.ended"]


class Order(BaseModel):
    side: str


@pytest.mark.parametrize("way", ["parse", "stream", "raw", "client.raw", "streaming", "beta", "options", "twice"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_whichever_way_the_client_is_asked_the_call_is_recorded_once(
    provider: Provider, recorder: Recorder, bus: Bus, way: str, streamed: bool
) -> None:
    client = client_of(provider, recorder)
    asked: dict[str, Any] = {"model": "m", "messages": ASK, "stream": streamed}
    said = "buy"

    async def read(reply: Any) -> None:
        if streamed:
            assert "".join([c.choices[0].delta.content or "" async for c in reply if c.choices]) == said
        else:
            assert reply.choices[0].message.content == said

    async with recorder.trajectory() as run, run.step():
        match way:
            case "parse":
                said = '{"side": "buy"}'
                parsed = await client.chat.completions.parse(model="m", messages=ASK, response_format=Order)
                assert parsed.choices[0].message.parsed == Order(side="buy")
            case "stream":
                async with client.chat.completions.stream(model="m", messages=ASK) as events:
                    assert (await events.get_final_completion()).choices[0].message.content == said
            case "raw":
                raw = await client.chat.completions.with_raw_response.create(**asked)
                await read(raw.parse())
                raw.parse()
            case "client.raw":
                await read((await client.with_raw_response.chat.completions.create(**asked)).parse())
            case "streaming":
                async with client.chat.completions.with_streaming_response.create(**asked) as response:
                    await read(await response.parse())
            case "beta":
                await read(await client.beta.chat.completions.create(**asked))
            case "options":
                await read(await client.with_options(timeout=9).chat.completions.create(**asked))
            case "twice":
                await read(await wrap_openai(client, recorder).chat.completions.create(**asked))
    [call] = await calls(recorder, bus)
    assert call.messages == ASK
    assert call.response is not None
    message = {name: value for name, value in call.response["message"].items() if value is not None}
    assert message == {"role": "assistant", "content": said}
    assert call.response["token_ids"] == [5, 6]
    assert call.latency_ms is not None


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_raw_response_of_the_gateway_is_referred_to(
    gateway: Provider, recorder: Recorder, bus: Bus, streamed: bool
) -> None:
    client = client_of(gateway, recorder)
    asked: dict[str, Any] = {"model": "m", "messages": ASK, "stream": streamed}
    async with recorder.trajectory() as run, run.step():
        raw = await client.chat.completions.with_raw_response.create(**asked)
        assert raw.headers["X-Ratchet-Call-Id"] == "call-1"
        raw.parse()
    [call] = await calls(recorder, bus)
    assert (call.call_id, call.messages, call.response) == ("call-1", [], None)
    assert gateway.headers[0]["x-ratchet-trajectory"] == run.trajectory_id


async def test_of_several_choices_each_is_kept(provider: Provider, recorder: Recorder, bus: Bus) -> None:
    client = client_of(provider, recorder)
    async with recorder.trajectory() as run, run.step():
        await client.chat.completions.create(model="m", messages=ASK, n=3)
    [call] = await calls(recorder, bus)
    assert call.response is not None
    assert call.response["index"] == 0
    assert call.model_extra is not None
    assert [choice["index"] for choice in call.model_extra["other_choices"]] == [1, 2]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_conversation_through_the_gateway_names_what_it_extends(
    gateway: Provider, recorder: Recorder, bus: Bus, streamed: bool
) -> None:
    """So that the gateway, too, records what each call adds and no more."""
    client = client_of(gateway, recorder)
    messages: list[Any] = list(ASK)
    async with recorder.trajectory() as run:
        for _ in range(3):
            async with run.step():
                reply = await client.chat.completions.create(model="m", messages=messages, stream=streamed)
                if isinstance(reply, openai.AsyncStream):
                    said = "".join([c.choices[0].delta.content or "" async for c in reply if c.choices])
                else:
                    said = reply.choices[0].message.content or ""
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "and now?"}]
    assert [headers.get("x-ratchet-base-call-id") for headers in gateway.headers] == [None, "call-1", "call-2"]
    assert len(await calls(recorder, bus)) == 3


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("behind", [False, True])
def test_a_client_without_a_loop_is_recorded_too(
    nats_server: NatsServer, bus: Bus, behind: bool, streamed: bool
) -> None:
    def agent(url: str) -> None:
        with SyncRecorder(nats_server.url, "agent-1") as recorder:
            client = wrap_openai(OpenAI(base_url=url, api_key="k", max_retries=0), recorder)
            with recorder.trajectory() as run, run.step():
                reply: Any = client.chat.completions.create(model="m", messages=ASK, stream=streamed)
                if streamed:
                    assert isinstance(reply, openai.Stream)
                    with reply:
                        assert [c.choices[0].delta.content for c in reply if c.choices] == ["", "bu", "y", None]
                else:
                    assert reply.choices[0].message.content == "buy"
            with recorder.trajectory() as run, run.step(), client.chat.completions.stream(model="m", messages=ASK) as s:
                assert s.get_final_completion().choices[0].message.content == "buy"
            with pytest.raises(openai.BadRequestError), recorder.trajectory() as run, run.step():
                client.chat.completions.with_raw_response.create(model="m", messages=FAIL)
            assert recorder.flush() == recorder.counts.refused == 0

    async def around() -> list[Step]:
        async with serving(Provider(gateway=behind)) as server:
            await asyncio.to_thread(agent, server.url)
        other = Bus(nats_server.url, name="test")
        await other.connect()
        try:
            return [message.event for message in await stored(other) if isinstance(message.event, Step)]
        finally:
            await other.close()

    first, second, third = asyncio.run(around())
    for step, call_id in ((first, "call-1"), (second, "call-2")):
        [call] = step.llm_calls
        if behind:
            assert (call.call_id, call.messages, call.response) == (call_id, [], None)
        else:
            assert (call.messages, (call.response or {})["token_ids"]) == (ASK, [5, 6])
    assert third.llm_calls == []
    assert "BadRequestError" in (third.model_extra or {})["failed_calls"][0]["error"]


class Contrary(BaseModel):
    """What a client may hand over among the messages, and cannot be written down."""

    role: str = "user"

    def model_dump(self, **_: Any) -> dict[str, Any]:
        raise RuntimeError("not for you")


@pytest.mark.parametrize("odd", [[], None, [{"index": 0}], "text"])
@pytest.mark.parametrize("behind", [False, True])
async def test_an_odd_reply_is_the_agents_as_the_client_gives_it(
    recorder: Recorder, bus: Bus, behind: bool, odd: Any
) -> None:
    async with serving(Provider(gateway=behind)) as server:
        server.odd = odd
        messages: list[Any] = [{"role": "user", "content": "odd"}]
        bare = await AsyncOpenAI(base_url=server.url, api_key="k").chat.completions.create(model="m", messages=messages)
        async with recorder.trajectory() as run, run.step():
            reply = await client_of(server, recorder).chat.completions.create(model="m", messages=messages)
    assert reply.choices == bare.choices
    assert await recorder.flush() == 0
    assert recorder.counts.published == 3


async def test_what_cannot_be_recorded_is_asked_all_the_same(provider: Provider, recorder: Recorder) -> None:
    """The client is the one to say no: here it sees what is no message, and what is no header."""
    client = client_of(provider, recorder)
    wrong: list[dict[str, Any]] = [
        {"messages": [Contrary()]},
        {"messages": [object()]},
        {"messages": ASK, "extra_headers": 7},
        {"messages": 7},
        {"model": object(), "messages": ASK},
    ]
    for asked in wrong:
        with pytest.raises(Exception) as bare:  # noqa: PT011  # whatever the client raises
            await AsyncOpenAI(base_url=provider.url, api_key="k").chat.completions.create(**{"model": "m", **asked})
        async with recorder.trajectory() as run, run.step():
            with pytest.raises(type(bare.value)) as met:
                await client.chat.completions.create(**{"model": "m", **asked})
        assert str(met.value).split(" object at")[0] == str(bare.value).split(" object at")[0]
    assert await recorder.flush() == 0


async def test_a_run_with_an_id_that_no_header_holds_asks_all_the_same(
    provider: Provider, recorder: Recorder, bus: Bus
) -> None:
    client = client_of(provider, recorder)
    for name in ("two\nlines", "Jürgen", "", "x" * 200, 7):
        async with recorder.trajectory(trajectory_id=name) as run, run.step():  # type: ignore[arg-type]
            assert (await client.chat.completions.create(model="m", messages=ASK)).choices
    assert await recorder.flush() == 0
    assert recorder.counts.refused == 5
    assert len([message for message in await stored(bus) if isinstance(message.event, Step)]) == 5
