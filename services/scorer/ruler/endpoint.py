"""The ruler judge's endpoint: one chat completion of any server that speaks OpenAI's protocol."""

from __future__ import annotations

import asyncio
import math
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import openai
from pydantic import BaseModel

from services.scorer.ruler.prompt import Question
from services.scorer.ruler.streamed import joined
from services.scorer.settings import ScorerSettings
from shared.telemetry import logger

# What a server says to a form of answer that it does not know. A wrong model or key is told otherwise, or in each form.
FORM_REFUSED = (400, 415, 422, 501)
FILTER = "content_filter"  # how OpenAI ends an answer that its filter stopped
# How endpoints refuse a question for the same: OpenAI's content_policy_violation, Azure's content_filter and words.
FILTERED = re.compile(r"content[ _-](filter|policy|management)|ResponsibleAI", re.IGNORECASE)


@dataclass(frozen=True)
class Usage:
    """Tokens of one call; None where the endpoint did not tell."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Answer:
    text: str
    usage: Usage = Usage()


class AskError(Exception):
    """One call gave no usable answer. ``again``: another may; ``after_s``: the endpoint said when.

    ``usage``: what it took nevertheless; None where nothing came back at all.
    """

    def __init__(
        self,
        text: str,
        result: str,
        *,
        again: bool = True,
        after_s: float | None = None,
        usage: Usage | None = None,
    ) -> None:
        super().__init__(text)
        self.result = result
        self.again = again
        self.after_s = after_s
        self.usage = usage


class _Message(BaseModel):
    content: str | None = None
    refusal: Any = None


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
    """One call of ``POST {base_url}/chat/completions``; the client's own retries are off, ours are counted.

    A server that lacks JSON schemas is asked for a JSON object, and one that lacks those for plain text; which of the
    three it takes is remembered as long as the process lives. The answer is read as strictly in each. So is that it
    only streams; what came as a stream is put together and read like any other.
    """

    def __init__(self, client: openai.AsyncOpenAI, settings: ScorerSettings) -> None:
        self.client = client
        self.settings = settings
        self.form = 0
        self.stream = False

    async def __call__(self, question: Question) -> Answer:
        forms = _forms(question)
        begun = self.form
        for form in range(begun, len(forms)):
            try:
                answer = await self._ask(question, forms[form])
            except openai.APIStatusError as error:
                if error.status_code in FORM_REFUSED and not self.stream and "stream" in error.response.text:
                    self.stream = True
                    return await self(question)
                if error.status_code in FORM_REFUSED and form + 1 < len(forms) and not _filtered(error):
                    continue
                raise _refused(error) from error
            if form > self.form:
                self.form = form
                logger().info("judge_form", form=("json_schema", "json_object", "plain")[form])
            return answer
        raise AssertionError("the last form answers or raises")  # pragma: no cover

    async def _ask(self, question: Question, form: dict[str, Any]) -> Answer:
        body: dict[str, Any] = {
            "model": self.settings.judge_model,
            "messages": question.messages(secrets.token_hex(12)),
            **form,
        }
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.settings.judge_temperature is not None:
            body["temperature"] = self.settings.judge_temperature
        try:
            async with asyncio.timeout(self.settings.judge_timeout_s):
                # The body as it is: the typed method walks through all of it first, which costs more than sending it.
                response = await self.client.post("/chat/completions", cast_to=httpx.Response, body=body)
                return _answer(response)
        except (TimeoutError, openai.APITimeoutError) as error:
            # What aiohttp's transport calls a refusal, too. Of httpx, or from openai 3 on of httpx2.
            if error.__cause__ is not None and type(error.__cause__).__name__ == "ConnectTimeout":
                raise _unreached(error) from error
            raise AskError(f"the judge did not answer within {self.settings.judge_timeout_s:g} s", "timeout") from error
        except openai.APIStatusError:
            raise
        except openai.APIError as error:
            raise _unreached(error) from error


def _forms(question: Question) -> list[dict[str, Any]]:
    schema = {"name": "scores", "strict": True, "schema": question.schema()}
    return [
        {"response_format": {"type": "json_schema", "json_schema": schema}},
        {"response_format": {"type": "json_object"}},
        {},
    ]


def _unreached(error: Exception) -> AskError:
    words = f"the judge's endpoint was not reached: {type(error.__cause__ or error).__name__}"
    return AskError(words, "unreachable", usage=Usage(0, 0))


def _filtered(error: openai.APIStatusError) -> bool:
    """Whether the endpoint refused the question for what stands in it: no form of answer would change that."""
    return error.status_code in (400, 403, 422) and FILTERED.search(error.response.text[:1000]) is not None


def _refused(error: openai.APIStatusError) -> AskError:
    if _filtered(error):
        words = f"the content filter of the judge's endpoint refused the question ({error.status_code})"
        return AskError(words, "filtered", again=False, usage=Usage(0, 0))
    again = error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    words = f"the judge's endpoint answered {error.status_code}"
    after_s = retry_after_s(error.response.headers.get("retry-after", ""), datetime.now(UTC))
    return AskError(words, "refused", again=again, after_s=after_s, usage=Usage(0, 0))


def _answer(response: httpx.Response) -> Answer:
    try:
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            completion = _Completion.model_validate(joined(response.content))
        else:
            completion = _Completion.model_validate_json(response.content)
    except ValueError as error:  # pydantic's own among them
        raise AskError("the judge's endpoint did not answer with a chat completion", "unreadable") from error
    told = completion.usage or _Usage()
    usage = Usage(told.prompt_tokens, told.completion_tokens)
    choice = completion.choices[0] if completion.choices else None
    if choice is not None and choice.finish_reason == FILTER:
        raise AskError("the content filter of the judge's endpoint cut its answer off", "filtered", usage=usage)
    if choice is not None and choice.message.content is None and choice.message.refusal:
        raise AskError("the judge's model refused to answer", "filtered", usage=usage)
    if choice is None or choice.message.content is None:
        raise AskError("the judge's answer has no content", "unreadable", usage=usage)
    if choice.finish_reason == "length":
        raise AskError("the judge's answer was cut off at its token limit", "unreadable", usage=usage)
    return Answer(choice.message.content, usage)


def retry_after_s(header: str, now: datetime) -> float | None:
    """Seconds until the moment that ``Retry-After`` names, as a number or an HTTP date (RFC 9110, 10.2.3)."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            at = parsedate_to_datetime(header)
        except ValueError:
            return None
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at
        seconds = max(0.0, (at - now).total_seconds())
    return seconds if 0 <= seconds < math.inf else None


@asynccontextmanager
async def ask_of(settings: ScorerSettings) -> AsyncIterator[Endpoint]:
    """The endpoint that the settings name. Nothing of it is read from the client's own environment variables."""
    key = settings.judge_api_key.get_secret_value() if settings.judge_api_key else "none"
    client = openai.AsyncOpenAI(
        base_url=settings.judge_base_url,
        api_key=key,
        max_retries=0,
        timeout=settings.judge_timeout_s,
        http_client=openai.DefaultAioHttpClient(),  # two thirds of httpx's own time for a call
    )
    async with client:
        yield Endpoint(client, settings)
