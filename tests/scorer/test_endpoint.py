"""Who the judge's endpoint is told that asks, and by which way it is reached."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.scorer.endpoint import Answer, ask_of
from services.scorer.rubrics import book
from services.scorer.ruler_prompt import Question
from services.scorer.settings import ScorerSettings
from tests.scorer.endpoint import completion, plain
from tests.serving import served

QUESTION = Question(book("ratchet/1", None).chosen("s", None), 0, None, None, (("attempt-1", 'status: "é"'),))


@contextmanager
def listening(calls: list[Request]) -> Iterator[int]:
    async def answer(request: Request) -> Response:
        calls.append(request)
        return completion(plain([]))

    with served(Route("/{path:path}", answer, methods=["POST"])) as port:
        yield port


async def asked(url: str, **settings: str) -> Answer:
    async with ask_of(ScorerSettings(judge="ruler", judge_base_url=url, judge_model="m", **settings)) as ask:
        return await ask(QUESTION)


async def test_the_key_is_sent_or_who_stands_in_the_address() -> None:
    calls: list[Request] = []
    with listening(calls) as port:
        for user in ("", "me:secret@"):
            assert (await asked(f"http://{user}127.0.0.1:{port}/v1/", judge_api_key="k")).usage.prompt_tokens == 11
        await asked(f"http://127.0.0.1:{port}/v1")
    basic = "Basic " + b64encode(b"me:secret").decode()
    assert [call.headers["authorization"] for call in calls] == ["Bearer k", basic, "Bearer none"]
    assert {call.url.path for call in calls} == {"/v1/chat/completions"}
    assert {call.headers["content-type"] for call in calls} == {"application/json"}


async def test_the_environments_proxy_is_taken_but_where_it_says_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    proxied: list[Request] = []
    direct: list[Request] = []
    with listening(proxied) as proxy, listening(direct) as port:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy}")
        await asked("http://judge.example/v1")
        assert [call.headers["host"] for call in proxied] == ["judge.example"]
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        await asked(f"http://127.0.0.1:{port}/v1")
    assert (len(proxied), len(direct)) == (1, 1)
