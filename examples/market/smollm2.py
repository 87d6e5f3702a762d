"""The demo's base where it is to be a real language model: SmolLM2-135M-Instruct, and an adapter that answers a word.

It reads and writes English, but not to order: asked for one word it writes a paragraph. So it imitates the same teacher
as the small base, by a job of the trainer's own engine, which leaves a LoRA adapter. That is v0.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Mapping
from pathlib import Path

from examples.market.base import teacher
from examples.market.words import NEWS, SYMBOLS, TRENDS, VOLUMES, prompt
from services.trainer.base_gguf import SMOLLM2, built_once, smollm2
from services.trainer.domain import CallRecord
from services.trainer.engines.engine_torch import TorchEngine
from services.trainer.training import Episode, Job, Recipe

STEPS = 24
LESSONS_A_STEP = 16
RECIPE = Recipe(
    learning_rate=1e-3,
    steps=STEPS,
    minibatch=LESSONS_A_STEP,
    clip_epsilon=0.2,
    max_grad_norm=1.0,
    micro_tokens=1024,
    seed=0,
    trains="lora",
    lora_rank=8,
    lora_alpha=16,
)


def cached(cache: Path, seed: int) -> tuple[Path, Path]:
    """The language model and the adapter of ``seed`` over it, below ``cache``, each made at first use."""
    weights = smollm2(cache)
    home = cache / f"market-smollm2-{recipe_id(seed)}"
    return weights, built_once(home, lambda directory: warm_start(weights, directory, seed))


def recipe_id(seed: int) -> str:
    """Names a build: the same sources and seed make the same adapter."""
    sources = b"".join((Path(__file__).with_name(name)).read_bytes() for name in ("smollm2.py", "base.py", "words.py"))
    return hashlib.sha256(sources + b"%d" % seed).hexdigest()[:16]


def warm_start(weights: Path, directory: Path, seed: int) -> None:
    """Imitate the teacher on situations drawn evenly and from no market, each once."""
    source = random.Random(seed)
    lessons = tuple(lesson(number, source) for number in range(STEPS * LESSONS_A_STEP))
    job = Job("warm-up", "default", "v0", SMOLLM2, "imitation", weights, lessons, RECIPE)
    directory.mkdir(parents=True)
    TorchEngine().train(job, directory, say)


def lesson(number: int, source: random.Random) -> Episode:
    news = source.choice(list(NEWS))
    seen = source.choice(SYMBOLS), source.choice(list(TRENDS)), news, source.choice(VOLUMES)
    answer = {"role": "assistant", "content": teacher(news, source)}
    call = CallRecord([dict(message) for message in prompt(*seen, in_words=True)], {"message": answer})
    return Episode("teacher", str(number), "lessons", "imitation", 1.0, 1.0, (call,))


def say(step: int, steps: int, metrics: Mapping[str, float]) -> None:
    if metrics:
        sys.stderr.write(f"step {step} of {steps}: {metrics['loss']:.3f} nats a token\n")
