"""What tests of ``wrap_openai`` ask, through which client, and what was recorded of it."""

from __future__ import annotations

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam
from ratchet_sdk import Recorder
from ratchet_sdk.events import LlmCall, LlmCallMade, Step
from ratchet_sdk.openai import wrap_openai

from shared.bus import Bus
from tests.sdk.standin import Provider
from tests.sdk.stored import stored

ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "?"}]
FAIL: list[ChatCompletionMessageParam] = [{"role": "user", "content": "fail"}]


def client_of(provider: Provider, recorder: Recorder) -> AsyncOpenAI:
    return wrap_openai(AsyncOpenAI(base_url=provider.url, api_key="k", max_retries=0), recorder)


async def calls(recorder: Recorder, bus: Bus) -> list[LlmCall]:
    assert await recorder.flush() == 0
    assert recorder.counts.refused == 0
    events = [message.event for message in await stored(bus)]
    return [call for event in events if isinstance(event, Step) for call in event.llm_calls] + [
        event.call for event in events if isinstance(event, LlmCallMade)
    ]
