"""The base model of the demo: a weak trader, built from nothing in seconds and saved as ordinary Hugging Face files.

A Llama of 2 layers and width 64 with one token a word. It is warm-started on a teacher that follows the news a quarter
of the time and else says anything: enough to read its prompt and to answer in one word, and little more.
``python -m examples.market.base --cache DIR --seed 1`` builds it where it is missing and prints where it is; with
``--model smollm2`` a real language model is the base (``smollm2.py``), and its weights are printed before its adapter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from examples.market.words import DECISIONS, NEWS, SYMBOLS, TRENDS, VOLUMES, Decision, prompt, vocabulary
from services.trainer.base_gguf import built_once

BATCHES = 400
BATCH_SIZE = 64
LEARNING_RATE = 4e-3
FOLLOWS_NEWS = 0.25

PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<s>", "<end>"
ROLES = ("<system>", "<user>", "<assistant>")
SPECIALS = [PAD, UNKNOWN, BEGIN, END, *ROLES]
CHAT_TEMPLATE = (
    "{{ '<s>' }}"
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
ARCHITECTURE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,  # at width 64 the usual 0.02 reads nothing in 400 batches
}


def teacher(news: str, source: random.Random) -> Decision:
    """The trader that the base imitates: the sign of the news a quarter of the time, any decision otherwise."""
    if source.random() < FOLLOWS_NEWS:
        return "buy" if NEWS[news] > 0 else "sell" if NEWS[news] < 0 else "hold"
    return source.choice(DECISIONS)


def recipe_id(seed: int) -> str:
    """Names a build: the same sources and seed make the same model."""
    sources = b"".join((Path(__file__).with_name(name)).read_bytes() for name in ("base.py", "words.py"))
    return hashlib.sha256(sources + b"%d" % seed).hexdigest()[:16]


def cached(cache: Path, seed: int) -> Path:
    """The base of ``seed`` below ``cache``, built at first use."""
    return built_once(cache / f"market-base-{recipe_id(seed)}", lambda directory: build(directory, seed))


def build(directory: Path, seed: int) -> None:
    """Make the model and write it to ``directory``: config, weights, tokenizer with chat template, card."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # sums in one order, so that a seed means one model; and nothing here is large
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    losses = warm_start(model, tokenizer, seed)
    directory.mkdir(parents=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    weights = sum(parameter.numel() for parameter in model.parameters())
    (directory / "README.md").write_text(card(seed, weights, losses[-1]))


def make_tokenizer() -> Any:
    """One token a word, with a chat template: what ``AutoTokenizer`` loads again."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate([*SPECIALS, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        model_max_length=ARCHITECTURE["max_position_embeddings"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **ARCHITECTURE,
    )
    return LlamaForCausalLM(config)


def warm_start(model: Any, tokenizer: Any, seed: int) -> list[float]:
    """Imitate the teacher on ``BATCHES`` batches of situations drawn evenly; return the loss of each batch.

    Loss is on the reply alone. A reply is one word and ``<end>``; every prompt has the same length: nothing is padded.
    """
    import torch

    source = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / BATCHES))
    )
    losses = []
    model.train()
    for _ in range(BATCHES):
        rows = [_lesson(tokenizer, source) for _ in range(BATCH_SIZE)]
        tokens = torch.tensor(rows)
        logits = model(input_ids=tokens[:, :-1]).logits[:, -2:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, -2:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


def _lesson(tokenizer: Any, source: random.Random) -> list[int]:
    news = source.choice(list(NEWS))
    messages = prompt(source.choice(SYMBOLS), source.choice(list(TRENDS)), news, source.choice(VOLUMES))
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens: list[int] = tokenizer.convert_tokens_to_ids(_words(text + f" {teacher(news, source)} <end>"))
    return tokens


def _words(text: str) -> list[str]:
    """Split as the tokenizer does, several times faster: specials stand apart, the rest is split at spaces."""
    for special in SPECIALS:
        text = text.replace(special, f" {special} ")
    return text.split()


def card(seed: int, weights: int, loss: float) -> str:
    """The model's README: what it is, how it was made, what it is not for."""
    front = {"library_name": "transformers", "license": "apache-2.0", "pipeline_tag": "text-generation"}
    return f"""---
{json.dumps(front)}
---
# Base trader of the Ratchet demo

A weak trader to begin with. It reads one situation of the demo's market in a closed language of
{len(vocabulary())} words and answers with one word: buy, sell or hold.

- Llama, {ARCHITECTURE["num_hidden_layers"]} layers, width {ARCHITECTURE["hidden_size"]}, {weights:,} weights,
  from random initialisation; word-level tokenizer with a chat template.
- Warm-started on {BATCHES} batches of {BATCH_SIZE} situations, drawn evenly and from no market, labelled by a teacher
  that follows the news {FOLLOWS_NEWS:.0%} of the time and else says anything. It never saw a price, an outcome or a
  reward.
- AdamW, learning rate {LEARNING_RATE:g} with a cosine, seed {seed}; last loss {loss:.3f} nats a token.
- Built by `python -m examples.market.base`, recipe {recipe_id(seed)}. The same sources and seed build it again.

It knows nothing about real markets and is of no use outside this demo.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.market.base", description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".ratchet/cache"), help="where built models are kept")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", choices=["market", "smollm2"], default="market", help="a small one, or a real one")
    arguments = parser.parse_args()
    cache = arguments.cache.absolute()
    if arguments.model == "smollm2":
        from examples.market import smollm2

        found = list(smollm2.cached(cache, arguments.seed))
    else:
        found = [cached(cache, arguments.seed)]
    sys.stdout.write("".join(f"{directory}\n" for directory in found))


if __name__ == "__main__":
    main()
