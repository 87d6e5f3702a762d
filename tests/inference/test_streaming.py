"""Replies as they come: joined between tokens, told token by token, whole in the end; who leaves frees the row."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from services.inference.asking import ChatRequest
from services.inference.domain import Ask, Piece, Reply, Sampling, cut_at_stop
from services.inference.engine_torch import TorchModel
from services.inference.rows import Row, Version
from services.inference.service import Inference
from services.inference.wire import Chunks, completion
from tests.inference.conftest import Checkpoints, listening
from tests.inference.test_service import ask, model_of

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "buy or sell?"}]}
CALL = '<tool_call>{"name": "buy", "arguments": {"n": 1}}</tool_call>'


def test_who_joins_between_tokens_changes_nobody(checkpoints: Checkpoints) -> None:
    """Rows of other lengths come while others go on, longer and shorter: each is answered as it would be alone."""
    model = model_of(checkpoints)
    asks = [ask("buy " * (1 + 7 * n % 40), seed=n, max_tokens=3 + 5 * n % 17) for n in range(12)]
    answers: dict[int, Any] = {}
    most = turn = 0
    while len(answers) < len(asks):
        newcomers = [(turn, "", asks[turn])] if turn < len(asks) else []
        answers |= dict(model.turn(newcomers))
        most, turn = max(most, len(model.running.rows)), turn + 1
    assert most > 3
    for key, one in enumerate(asks):
        [alone] = model.answer([one])
        assert isinstance(alone, Reply)
        assert answers[key].token_ids == alone.token_ids
        assert answers[key].logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_rows_of_a_sliding_window_join_too(checkpoints: Checkpoints) -> None:
    """Layers that keep the last columns alone: shorter and longer than the window, each as it would be alone."""
    model = model_of(checkpoints)
    config = MistralConfig(
        vocab_size=model.vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model.adapters.model = MistralForCausalLM(config).eval()
    asks = [ask("up " * n, seed=n, max_tokens=most) for n, most in ((1, 30), (20, 4), (3, 12), (1, 20))]
    answers: dict[int, Any] = {}
    for key, one in enumerate(asks):
        answers |= dict(model.turn([(key, "", one)]))
    assert {layer.is_sliding for layer in model.running._cache.layers} == {True}
    while len(answers) < len(asks):
        answers |= dict(model.turn([]))
    for key, one in enumerate(asks):
        [alone] = model.answer([one])
        assert isinstance(alone, Reply)
        assert answers[key].token_ids == alone.token_ids
        assert answers[key].logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_a_batch_keeps_to_its_tokens(checkpoints: Checkpoints) -> None:
    model = model_of(checkpoints)
    model.batch_tokens = 60
    answers = model.answer([ask("up " * n, max_tokens=5) for n in (1, 30, 2, 1, 1)])
    assert all(isinstance(answer, Reply) for answer in answers)
    assert model.forward_passes > 10  # the long one goes alone, those behind it wait


def told(model: TorchModel, one: Ask) -> tuple[list[Piece], Reply]:
    pieces: list[Piece] = []
    newcomers = [(0, "", one)]
    while True:
        for _, news in model.turn(newcomers):
            if isinstance(news, Reply):
                return pieces, news
            assert isinstance(news, Piece)
            pieces.append(news)
        newcomers = []


def test_pieces_put_together_are_the_reply(checkpoints: Checkpoints) -> None:
    model = model_of(checkpoints)
    for seed in range(8):  # an untrained model over bytes: most of its characters are broken ones
        pieces, reply = told(model, Ask(CHAT["messages"], None, Sampling(max_tokens=40, seed=seed), streams=True))
        ids = [token for piece in pieces for token in piece.token_ids]
        assert ids == reply.token_ids[: len(ids)]
        assert len(ids) == len(reply.token_ids) - 1
        assert reply.text.startswith("".join(piece.text for piece in pieces))


@given(st.text("ab é😀ਅ\n", min_size=1, max_size=20), st.lists(st.sampled_from(["a", "b ", "😀", "é\n"]), max_size=2))
def test_characters_of_several_tokens_are_told_whole(tokenizer: Any, text: str, stops: list[str]) -> None:
    version = Version("", tokenizer, frozenset())
    request = ChatRequest.model_validate({"model": "m", **CHAT, "stop": stops})
    ids = tokenizer.encode(text, add_special_tokens=False)
    row = Row(0, version, Ask([], None, request.sampling(), streams=True), [1], len(ids), random=None)  # type: ignore[arg-type]
    chunks, said = Chunks(request, "c", 0), []
    for token in ids:
        row.append(token, -1.0)
        news = row.news()
        if isinstance(news, Reply):
            said += [chunk["choices"][0]["delta"]["content"] for chunk in chunks.end(news)]
            break
        assert isinstance(news, Piece)
        if (chunk := chunks.piece(news)) is not None:
            said.append(chunk["choices"][0]["delta"]["content"])
    assert "".join(said) == cut_at_stop(text, stops)[0]
    assert all("\ufffd" not in piece for piece in said)


@pytest.fixture(scope="module")
def tokenizer(checkpoints: Checkpoints) -> Any:
    return AutoTokenizer.from_pretrained(checkpoints.directory)


@pytest.mark.parametrize("text", [f"Sure. {CALL}", f" {CALL}{CALL}", "a <tool_call> b", f"a {CALL} b", "  plain "])
def test_a_streamed_call_is_told_as_a_call(text: str) -> None:
    request = ChatRequest.model_validate({"model": "m", **CHAT})
    chunks = Chunks(request, "chatcmpl-1", 0)
    told = [chunks.piece(Piece([1], [2], [0.0], [c], c, calls_tools=True)) for c in text]
    reply = Reply([1], [2] * (len(text) + 1), [0.0] * (len(text) + 1), [*text, ""], text, "stop", calls_tools=True)
    told += chunks.end(reply)
    deltas = [chunk["choices"][0]["delta"] for chunk in told if chunk is not None]
    message = completion(request, reply, "chatcmpl-1", 0)["choices"][0]["message"]
    assert "".join(delta["content"] for delta in deltas) == (message["content"] or "")
    calls = [{**call} for call in deltas[-1].get("tool_calls", [])]
    assert [{**call, "index": 0} for call in message.get("tool_calls", [])] == [{**call, "index": 0} for call in calls]


async def test_the_first_token_comes_before_the_last_is_drawn(service: Inference, checkpoints: Checkpoints) -> None:
    """Twenty thousand tokens would take minutes: the first comes at once, and who leaves then ends the rest."""
    body = {"model": checkpoints.sha, **CHAT, "max_tokens": 20_000, "stream": True, "seed": 1}
    body |= {"frequency_penalty": -2, "return_token_ids": True}  # one token is said again and again
    async with listening(service) as url, httpx.AsyncClient() as http:
        async with http.stream("POST", f"{url}/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                chunk = json.loads(line.removeprefix("data: "))
                assert chunk["choices"][0]["delta"]["role"] == "assistant"
                assert len(chunk["choices"][0]["token_ids"]) <= 2
                model: Any = next(iter(service._loaded.values())).model
                [row] = model.running.rows
                break
        while row.finished is None:
            await asyncio.sleep(0.005)
    assert row.finished == "length"
    assert len(row.token_ids) < row.room


async def test_a_stream_has_its_deadline_and_says_so(checkpoints: Checkpoints, settings: Any) -> None:
    from services.inference.app import inference

    service = inference(settings.model_copy(update={"answer_timeout_s": 1.0}))
    await service.answer(checkpoints.sha, ask("up"))
    body = {"model": checkpoints.sha, **CHAT, "max_tokens": 60_000, "stream": True, "seed": 1, "frequency_penalty": -2}
    async with listening(service) as url, httpx.AsyncClient() as http:
        response = await http.post(f"{url}/chat/completions", json=body)
    *_, last = [line for line in response.text.splitlines() if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    await service.close()


@pytest.mark.parametrize(("model", "status"), [("0" * 64, 404), ("gpt", 404)])
async def test_a_stream_that_cannot_begin_is_an_error_by_its_status(url: str, model: str, status: int) -> None:
    async with httpx.AsyncClient() as http:
        response = await http.post(f"{url}/chat/completions", json={"model": model, **CHAT, "stream": True})
    assert (response.status_code, response.json()["error"]["code"]) == (status, "model_not_found")
