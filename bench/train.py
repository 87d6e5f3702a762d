"""Tokens a second of a training step, beside the loop that anybody would write: ``python -m bench.train``.

The same minibatch, the same model and loss: ours (``learning/parts.py``) and a plain loop over the groups in their
order, padded to the longest, all logits. They take turns in one process; each one's peak memory is that of a process of
its own. ``mixed``: sequences of very different lengths that share nothing. ``shared``: eight members a group share
1,000 tokens. ``apart``: the furthest that a gradient is from the plain one's, over its norm.
On a GPU: a model of 0.5 B in bf16, and the share of the rate that a product of two square matrices reaches there.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from services.trainer.learning.likelihood import Likelihood
from services.trainer.learning.parts import Parts
from services.trainer.learning.samples import Sample
from services.trainer.learning.sequences import TokenSequence
from services.trainer.settings import TrainerSettings
from services.trainer.training import Episode

MEMBERS = 8
MICRO_TOKENS = int(TrainerSettings.model_fields["micro_tokens"].default)
SMALL = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4}
LARGE = {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
LARGE |= {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}


def model_of(device: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**(LARGE if device == "cuda" else SMALL), max_position_embeddings=8192)
    model = LlamaForCausalLM(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    return model.eval()


def minibatch(kind: str, groups: int, vocabulary: int) -> list[Sample]:
    """``groups`` of eight. Mixed: 32 to 1,500 tokens, most of them short; shared: 1,000 and a reply of 16 to 96."""
    draw = random.Random(0)
    found = []
    for _ in range(groups):
        prompt = [draw.randrange(vocabulary) for _ in range(1000)]
        for _ in range(MEMBERS):
            reply = draw.randrange(16, 97)
            if kind == "mixed":
                prompt = [draw.randrange(vocabulary) for _ in range(min(1404, int(draw.lognormvariate(5, 1))))]
            ids = (*prompt, *(draw.randrange(vocabulary) for _ in range(reply)))
            own = (False,) * len(prompt) + (True,) * reply
            tokens = TokenSequence(ids, own, (-9.0,) * len(ids))
            episode = Episode("a", "t", "g", "exact", draw.uniform(-1, 1), 0.5, ())
            found.append(Sample(episode, tokens, (-9.0,) * reply, (1.0,) * reply, (-9.0,) * reply))
    return found


# the two ways ---------------------------------------------------------------------------------------
def plain(model: Any) -> Callable[[Sequence[Sample]], None]:
    def gradient(samples: Sequence[Sample]) -> None:
        own_tokens = sum(sample.own_tokens for sample in samples)
        for start in range(0, len(samples), MEMBERS):
            part = samples[start : start + MEMBERS]
            longest = max(len(sample.tokens.ids) for sample in part)
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            weights = torch.zeros(len(part), longest)
            for row, sample in enumerate(part):
                ids[row, : len(sample.tokens.ids)] = torch.tensor(sample.tokens.ids)
                weights[row, : len(sample.tokens.ids)] = torch.tensor(sample.tokens.own) * sample.episode.advantage
            ids, weights = ids.to(model.device), weights.to(model.device)
            logprobs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            taken = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
            (-(taken * weights[:, 1:]).sum() / own_tokens).backward()

    return gradient


def ours(model: Any) -> Callable[[Sequence[Sample]], None]:
    parts = Parts(Likelihood(model), micro_tokens=MICRO_TOKENS)

    def gradient(samples: Sequence[Sample]) -> None:
        own_tokens = sum(sample.own_tokens for sample in samples)
        for part in parts.of(samples):
            logprobs = parts.logprobs(part)
            weights = [sample.episode.advantage for sample in part for _ in range(sample.own_tokens)]
            (-(logprobs * logprobs.new_tensor(weights)).sum() / own_tokens).backward()

    return gradient


WAYS = {"plain": plain, "ours": ours}


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])


# measuring ----------------------------------------------------------------------------------------
def timed(model: Any, gradient: Callable[[Sequence[Sample]], None], samples: Sequence[Sample]) -> float:
    model.zero_grad(set_to_none=True)
    _settled(model)
    began = time.perf_counter()
    gradient(samples)
    _settled(model)
    return time.perf_counter() - began


def _settled(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def ratios(kind: str, device: str, groups: int, rounds: int) -> dict[str, Any]:
    samples = minibatch(kind, groups, (LARGE if device == "cuda" else SMALL)["vocab_size"])
    tokens = sum(len(sample.tokens.ids) for sample in samples)
    models = {name: model_of(device) for name in WAYS}
    ways = {name: way(models[name]) for name, way in WAYS.items()}
    for name, way in ways.items():  # one group, so that no first call is measured
        timed(models[name], way, samples[:MEMBERS])
    took: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in ways.items():
            took[name].append(timed(models[name], way, samples))
    want, found = gradients(models["plain"]), gradients(models["ours"])
    rate = {name: tokens / statistics.median(times) for name, times in took.items()}
    result = {f"{kind}_{name}_tokens_per_s": round(value) for name, value in rate.items()}
    result |= {f"{kind}_ratio": round(rate["ours"] / rate["plain"], 2)}
    result |= {f"{kind}_apart": float(f"{float((found - want).abs().max() / want.norm()):.1e}")}
    if device == "cuda":
        result |= {f"{kind}_of_matrix_rate": round(_flops(models["ours"], samples) * rate["ours"] / _matrix_rate(), 3)}
    return result


def _flops(model: Any, samples: Sequence[Sample]) -> float:
    """Of a token, forward and backward, as if each sequence went through by itself: 6 a weight, and attention's."""
    config = model.config
    weights = sum(parameter.numel() for parameter in model.parameters()) - model.get_input_embeddings().weight.numel()
    squares = sum(len(sample.tokens.ids) ** 2 for sample in samples)
    tokens = sum(len(sample.tokens.ids) for sample in samples)
    return 6.0 * weights + 6.0 * config.num_hidden_layers * config.hidden_size * squares / tokens


def _matrix_rate(size: int = 8192, times: int = 50) -> float:
    one = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for _ in range(5):
        one @ one
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        one @ one
    torch.cuda.synchronize()
    return 2.0 * size**3 * times / (time.perf_counter() - began)


def peak_mb(kind: str, way: str, device: str, groups: int) -> int:
    """What a gradient holds at its most, in a process of its own."""
    command = [sys.executable, "-m", "bench.train", "--only", way, "--kind", kind, "--device", device]
    run = subprocess.run([*command, "--groups", str(groups)], check=True, capture_output=True, text=True)
    return int(json.loads(run.stdout.splitlines()[-1])["peak_mb"])


def alone(kind: str, way: str, device: str, groups: int) -> dict[str, int]:
    model = model_of(device)
    samples = minibatch(kind, groups, model.config.vocab_size)
    timed(model, WAYS[way](model), samples)
    if device == "cuda":
        return {"peak_mb": torch.cuda.max_memory_allocated() // 2**20}
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--groups", type=int, default=8, help="of eight runs each")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--kind", choices=["mixed", "shared"], help="one alone")
    arguments.add_argument("--only", choices=list(WAYS), help="one gradient of one way, for its peak memory")
    given = arguments.parse_args()
    if given.only:
        print(json.dumps(alone(given.kind, given.only, given.device, given.groups)))
        return
    found: dict[str, Any] = {"device": given.device, "threads": torch.get_num_threads()}
    kinds = [given.kind] if given.kind else ["mixed", "shared"]
    for kind in kinds:  # before this process is large: what it starts would count its memory as their own
        for way in WAYS:
            found[f"{kind}_{way}_peak_mb"] = peak_mb(kind, way, given.device, given.groups)
    for kind in kinds:
        found |= ratios(kind, given.device, given.groups, given.rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
