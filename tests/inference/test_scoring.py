"""The scoring endpoint: a prompt's own log probabilities in vLLM's form, and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.inference import scoring
from services.inference.domain import Refused, Scored
from services.inference.service import Inference
from tests.inference.conftest import Checkpoints
from tests.inference.test_service import ask, model_of

IDS = [5, 80, 81, 7, 200, 3, 3, 90]
SCORE: dict[str, Any] = {"prompt": IDS, "max_tokens": 1, "prompt_logprobs": 0}


@pytest.mark.parametrize("logits_at_a_time", [2**25, 700])  # whole, and two tokens at a time
async def test_a_score_is_what_one_plain_pass_says(
    url: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, logits_at_a_time: int
) -> None:
    monkeypatch.setattr(scoring, "LOGITS_AT_A_TIME", logits_at_a_time)
    async with httpx.AsyncClient() as http:
        reply = (await http.post(f"{url}/completions", json={"model": checkpoints.sha, **SCORE})).json()
    model = AutoModelForCausalLM.from_pretrained(checkpoints.directory)
    with torch.inference_mode():
        want = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    [choice] = reply["choices"]
    first, *said = choice["prompt_logprobs"]
    assert first is None
    assert [list(entry) for entry in said] == [[str(token)] for token in IDS[1:]]
    found = [next(iter(entry.values())) for entry in said]
    assert [entry["logprob"] for entry in found] == pytest.approx(
        [want[place, token].item() for place, token in enumerate(IDS[1:])], abs=1e-4
    )
    assert [entry["rank"] for entry in found] == [
        int((want[place] > want[place, token]).sum()) + 1 for place, token in enumerate(IDS[1:])
    ]
    assert reply["system_fingerprint"] == checkpoints.sha
    assert reply["usage"] == {"prompt_tokens": 8, "completion_tokens": 1, "total_tokens": 9}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": "text"}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"max_tokens": 2}, "max_tokens"),
        ({"prompt_logprobs": 5}, "prompt_logprobs"),
        ({"prompt_logprobs": None}, "prompt_logprobs"),
        ({"temperature": 0.5}, "temperature"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
    ],
)
async def test_anything_else_is_refused_by_its_name(
    url: str, checkpoints: Checkpoints, more: dict[str, Any], param: str
) -> None:
    async with httpx.AsyncClient() as http:
        reply = await http.post(f"{url}/completions", json={"model": checkpoints.sha, **SCORE, **more})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"].split(".")[0] == param


def test_a_prompt_has_room_for_the_token_that_is_drawn(checkpoints: Checkpoints) -> None:
    model = model_of(checkpoints)
    model.context_length = len(IDS)
    refused = model.score("", IDS)
    assert isinstance(refused, Refused)
    assert refused.code == "context_length_exceeded"
    assert isinstance(model.score("", IDS[1:]), Scored)


async def test_a_score_and_a_reply_do_not_disturb_each_other(service: Inference, checkpoints: Checkpoints) -> None:
    one = ask("up", seed=1, max_tokens=12)
    alone = await service.answer(checkpoints.sha, one)
    reply, *scores = await asyncio.gather(
        service.answer(checkpoints.sha, one), *(service.score(checkpoints.sha, IDS) for _ in range(3))
    )
    assert reply == alone
    assert len(scores) == 3
