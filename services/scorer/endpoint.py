"""The ruler judge's endpoint: one chat completion of any server that speaks OpenAI's protocol."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx
import msgspec
from pydantic import BaseModel

from services.scorer.ruler_prompt import Question
from services.scorer.settings import ScorerSettings
from services.scorer.streamed import joined
from shared.telemetry import logger

# What a server says to a form of answer that it does not know. A wrong model or key is told otherwise, or in each form.
FORM_REFUSED = (400, 415, 422, 501)


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


class _RefusedError(Exception):
    """The endpoint answered with another status than success."""

    def __init__(self, response: aiohttp.ClientResponse, content: bytes) -> None:
        super().__init__(f"the judge's endpoint answered {response.status}")
        self.status = response.status
        self.after_s = retry_after_s(response.headers.get("retry-after", ""), datetime.now(UTC))
        self.content = content


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
    """One call of ``POST {base_url}/chat/completions``, sent once: whoever asks counts what is asked again.

    A server that lacks JSON schemas is asked for a JSON object, and one that lacks those for plain text; which of the
    three it takes is remembered as long as the process lives. The answer is read as strictly in each. So is that it
    only streams; what came as a stream is put together and read like any other.
    """

    def __init__(self, session: aiohttp.ClientSession, settings: ScorerSettings) -> None:
        self.session = session
        self.settings = settings
        self.url = f"{(settings.judge_base_url or '').rstrip('/')}/chat/completions"
        self.form = 0
        self.stream = False

    async def __call__(self, question: Question) -> Answer:
        forms = _forms(question)
        begun = self.form
        for form in range(begun, len(forms)):
            try:
                answer = await self._ask(question, forms[form])
            except _RefusedError as error:
                if error.status in FORM_REFUSED and not self.stream and b"stream" in error.content:
                    self.stream = True
                    return await self(question)
                if error.status in FORM_REFUSED and form + 1 < len(forms):
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
                async with self.session.post(self.url, data=msgspec.json.encode(body)) as response:
                    content = await response.read()
        except TimeoutError as error:
            raise AskError(f"the judge did not answer within {self.settings.judge_timeout_s:g} s", "timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            words = f"the judge's endpoint was not reached: {type(error).__name__}"
            raise AskError(words, "unreachable", usage=Usage(0, 0)) from error
        if response.status // 100 != 2:
            raise _RefusedError(response, content)
        return _answer(response.content_type, content)


def _forms(question: Question) -> list[dict[str, Any]]:
    schema = {"name": "scores", "strict": True, "schema": question.schema()}
    return [
        {"response_format": {"type": "json_schema", "json_schema": schema}},
        {"response_format": {"type": "json_object"}},
        {},
    ]


def _refused(error: _RefusedError) -> AskError:
    again = error.status in (408, 409, 425, 429) or error.status >= 500
    return AskError(str(error), "refused", again=again, after_s=error.after_s, usage=Usage(0, 0))


def _answer(content_type: str, content: bytes) -> Answer:
    try:
        if content_type == "text/event-stream":
            completion = _Completion.model_validate(joined(content))
        else:
            completion = _Completion.model_validate_json(content)
    except ValueError as error:  # pydantic's own among them
        raise AskError("the judge's endpoint did not answer with a chat completion", "unreadable") from error
    told = completion.usage or _Usage()
    usage = Usage(told.prompt_tokens, told.completion_tokens)
    choice = completion.choices[0] if completion.choices else None
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
    """The endpoint that the settings name. Of the environment, only its proxies are read."""
    url = urlsplit(settings.judge_base_url or "")
    key = settings.judge_api_key.get_secret_value() if settings.judge_api_key else "none"
    authorization = {} if url.username else {"Authorization": f"Bearer {key}"}  # a user in the URL is sent as such
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=httpx.create_ssl_context()),  # Asker limits; httpx's certificates
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Content-Type": "application/json", **authorization},
        timeout=aiohttp.ClientTimeout(),  # ours is around each call
        proxy=None if proxy_bypass(url.hostname or "") else getproxies().get(url.scheme),
    )
    async with session:
        yield Endpoint(session, settings)
