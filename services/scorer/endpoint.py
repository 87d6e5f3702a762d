"""The ruler judge's endpoint: one chat completion of any server that speaks OpenAI's protocol."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import openai
from pydantic import BaseModel, ValidationError

from services.scorer.ruler_prompt import Question
from services.scorer.settings import ScorerSettings


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


class AskError(Exception):
    """One call gave no usable answer. ``again``: another may; ``after_s``: the endpoint said when."""

    def __init__(self, text: str, result: str, *, again: bool = True, after_s: float | None = None) -> None:
        super().__init__(text)
        self.result = result
        self.again = again
        self.after_s = after_s


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None


class Endpoint:
    """One call of ``POST {base_url}/chat/completions``; the client's own retries are off, ours are counted."""

    def __init__(self, client: openai.AsyncOpenAI, settings: ScorerSettings) -> None:
        self.client = client
        self.settings = settings

    async def __call__(self, question: Question) -> Answer:
        body: dict[str, Any] = {
            "model": self.settings.judge_model,
            "messages": question.messages(secrets.token_hex(12)),
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "scores", "strict": True, "schema": question.schema()},
            },
        }
        if self.settings.judge_temperature is not None:
            body["temperature"] = self.settings.judge_temperature
        try:
            async with asyncio.timeout(self.settings.judge_timeout_s):
                response = await self.client.chat.completions.with_raw_response.create(**body)
                return _answer(response.content)
        except (TimeoutError, openai.APITimeoutError) as error:
            raise AskError(f"the judge did not answer within {self.settings.judge_timeout_s:g} s", "timeout") from error
        except openai.APIStatusError as error:
            again = error.status_code in (408, 409, 425, 429) or error.status_code >= 500
            words = f"the judge's endpoint answered {error.status_code}"
            raise AskError(words, "refused", again=again, after_s=_retry_after(error)) from error
        except openai.APIError as error:
            raise AskError(f"the judge's endpoint was not reached: {type(error).__name__}", "unreachable") from error


def _answer(content: bytes) -> Answer:
    try:
        completion = _Completion.model_validate_json(content)
    except ValidationError as error:
        raise AskError("the judge's endpoint did not answer with a chat completion", "unreadable") from error
    choice = completion.choices[0] if completion.choices else None
    if choice is None or choice.message.content is None:
        raise AskError("the judge's answer has no content", "unreadable")
    if choice.finish_reason == "length":
        raise AskError("the judge's answer was cut off at its token limit", "unreadable")
    usage = completion.usage or _Usage()
    return Answer(choice.message.content, usage.prompt_tokens, usage.completion_tokens)


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds, where the endpoint names them; a date is left to our own pause."""
    try:
        seconds = float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


@asynccontextmanager
async def ask_of(settings: ScorerSettings) -> AsyncIterator[Endpoint]:
    """The endpoint that the settings name. Nothing of it is read from the client's own environment variables."""
    key = settings.judge_api_key.get_secret_value() if settings.judge_api_key else "none"
    client = openai.AsyncOpenAI(
        base_url=settings.judge_base_url, api_key=key, max_retries=0, timeout=settings.judge_timeout_s
    )
    async with client:
        yield Endpoint(client, settings)
