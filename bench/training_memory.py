"""Peak memory of one training step of a model of SmolLM2's size: ``python -m bench.training_memory``.

Random weights (30 layers of 576, vocabulary 49,152: 135 million), full weights in float32 with AdamW, one step over
so many runs, each of ``--prompt`` and ``--reply`` tokens. A process of its own, so that what is printed is that step's.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from services.trainer.domain import CallRecord
from services.trainer.engines.engine_torch import TorchEngine
from services.trainer.settings import TrainerSettings
from services.trainer.training import Episode, Job, Recipe

VOCABULARY = 49_152


def parent(directory: Path, layers: int) -> Path:
    """A checkpoint of that size, with a tokenizer that is never asked: the runs bring their token ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))).save_pretrained(directory)
    return directory


def episode(number: int, prompt: int, reply: int) -> Episode:
    draw = random.Random(number)
    call = CallRecord(
        messages=[{"role": "user", "content": "a"}],
        response={"message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"},
        prompt_token_ids=[draw.randrange(VOCABULARY) for _ in range(prompt)],
        token_ids=[draw.randrange(VOCABULARY) for _ in range(reply)],
        logprobs=[-10.8] * reply,
        temperature=1.0,
        top_p=1.0,
        model_version="v0",
    )
    return Episode(f"a{number}", f"t{number}", "g", "exact", 1.0 if number % 2 else -1.0, 0.5, (call,))


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--runs", type=int, default=16)
    arguments.add_argument("--prompt", type=int, default=896, help="tokens")
    arguments.add_argument("--reply", type=int, default=128, help="tokens")
    arguments.add_argument("--layers", type=int, default=30)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as home:
        base = parent(Path(home, "base"), given.layers)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        recipe = Recipe(1e-5, 1, given.runs, 0.2, 1.0, int(TrainerSettings.model_fields["micro_tokens"].default), 1)
        runs = tuple(episode(number, given.prompt, given.reply) for number in range(given.runs))
        out = Path(home, "out")
        out.mkdir()
        began = time.monotonic()
        TorchEngine(device="cpu").train(Job("b", "p", "v1", "v0", "grpo", base, runs, recipe), out, lambda *_: None)
        took = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tokens = given.runs * (given.prompt + given.reply)
    print(json.dumps({"tokens": tokens, "before_mb": round(before), "peak_mb": round(peak), "step_s": round(took, 1)}))


if __name__ == "__main__":
    main()
