"""How much of what can be earned the demo's market is learned in ten windows: ``python -m bench.learning``.

The market of ``examples/market`` and its weak trader, trained by the torch engine without servers: in each window a
dozen agents decide about every symbol, the outcome ranks them, and one batch is trained. What a version earns is
counted, not sampled: the probability of each decision times its expected profit, over windows that no batch has seen,
as a share of what an oracle earns there that knows the expected return. Five seeds; 0.75 on average is wanted, none
under 0.6.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from examples.market.base import END, cached
from examples.market.market import Facts, facts, oracle, profit
from examples.market.words import DECISIONS, SYMBOLS, Message, decision_in, prompt
from services.trainer.domain import CallRecord, advantages
from services.trainer.engines.engine_torch import TorchEngine
from services.trainer.learning import checkpoint
from services.trainer.training import Episode, Job, Recipe

UNSEEN = range(200, 260)
MAX_TOKENS = 4


class Trader:
    """One version at its decisions."""

    def __init__(self, directory: Path) -> None:
        self.model, self.tokenizer = checkpoint.load(directory, "cpu")
        self.model.eval()
        self.end = self.tokenizer.convert_tokens_to_ids(END)
        self.words = self.tokenizer.convert_tokens_to_ids(list(DECISIONS))

    def asked(self, situations: list[Facts]) -> torch.Tensor:
        """(n, t): the prompts; all are of one length."""
        rows = [
            self.tokenizer.apply_chat_template(_messages(each), add_generation_prompt=True)["input_ids"]
            for each in situations
        ]
        return torch.tensor(rows)

    @torch.inference_mode()
    def decide(self, situations: list[Facts], draw: torch.Generator) -> list[CallRecord]:
        """A reply to each, drawn at temperature 1, as the gateway would have recorded it."""
        ids = prompts = self.asked(situations)
        drawn, logprobs = [], []
        for _ in range(MAX_TOKENS):
            step = self.model(input_ids=ids).logits[:, -1].log_softmax(-1)
            token = torch.multinomial(step.exp(), 1, generator=draw)
            drawn.append(token)
            logprobs.append(step.gather(-1, token))
            ids = torch.cat([ids, token], dim=1)
        replies, told = torch.cat(drawn, dim=1).tolist(), torch.cat(logprobs, dim=1).tolist()
        return [
            self._call(each, asked, reply, said)
            for each, asked, reply, said in zip(situations, prompts.tolist(), replies, told, strict=True)
        ]

    def _call(self, each: Facts, asked: list[int], reply: list[int], said: list[float]) -> CallRecord:
        length = reply.index(self.end) + 1 if self.end in reply else len(reply)
        text = self.tokenizer.decode(reply[:length], skip_special_tokens=True)
        return CallRecord(
            messages=[dict(message) for message in _messages(each)],
            response={"message": {"role": "assistant", "content": text}},
            prompt_token_ids=asked,
            token_ids=reply[:length],
            logprobs=said[:length],
            temperature=1.0,
            witnessed=True,
        )

    @torch.inference_mode()
    def share(self, situations: list[Facts]) -> float:
        """What it earns on average as a share of the oracle's, both without the noise."""
        ids = self.asked(situations)
        first = self.model(input_ids=ids).logits[:, -1].softmax(-1)
        earned = torch.full((len(situations),), profit(None, 0.0))
        for decision, word in zip(DECISIONS, self.words, strict=True):
            said = torch.cat([ids, torch.full((len(ids), 1), word)], dim=1)
            chance = first[:, word] * self.model(input_ids=said).logits[:, -1].softmax(-1)[:, self.end]
            made = torch.tensor([profit(decision, each.expected) for each in situations])
            earned += chance * (made - profit(None, 0.0))
        best = sum(profit(oracle(each.expected), each.expected) for each in situations)
        return float(earned.sum()) / best


def _messages(each: Facts) -> list[Message]:
    return prompt(each.symbol, each.trend, each.news, each.volume)


def episodes(trader: Trader, seed: int, window: int, agents: int, draw: torch.Generator) -> list[Episode]:
    """A window's runs: each symbol is a group, its members are ranked by what they earned."""
    found: list[Episode] = []
    for symbol in SYMBOLS:
        situation = facts(seed, window, symbol)
        calls = trader.decide([situation] * agents, draw)
        said = [decision_in(str((call.reply or {}).get("content", ""))) for call in calls]
        scores = [profit(decision, situation.realised) for decision in said]
        strength = advantages(scores, homogeneous=True)
        if any(strength):
            found += [
                Episode(f"a{n}", f"{symbol}-{window}", f"{symbol}-{window}", "exact", strength[n], scores[n], (call,))
                for n, call in enumerate(calls)
            ]
    return found


def learned(base: Path, home: Path, seed: int, given: argparse.Namespace) -> list[float]:
    """The share of the oracle's before the first window and after each."""
    draw = torch.Generator().manual_seed(seed)
    unseen = [facts(seed, window, symbol) for window in UNSEEN for symbol in SYMBOLS]
    numbers: dict[str, Any] = json.loads(given.recipe)
    parent, trader = base, Trader(base)
    shares = [trader.share(unseen)]
    for window in range(given.windows):
        recipe = Recipe(given.learning_rate, given.steps, given.minibatch, 0.2, 1.0, 16_384, seed, **numbers)
        runs = tuple(episodes(trader, seed, window, given.agents, draw))
        job = Job(f"b{window}", "market", f"v{window + 1}", f"v{window}", "grpo", parent, runs, recipe)
        parent = home / f"{seed}-{window}"
        parent.mkdir()
        TorchEngine(device="cpu").train(job, parent, lambda *_: None)
        trader = Trader(parent)
        shares.append(trader.share(unseen))
    return shares


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--windows", type=int, default=10)
    arguments.add_argument("--agents", type=int, default=12)
    arguments.add_argument("--learning-rate", type=float, default=1e-3)
    arguments.add_argument("--steps", type=int, default=8, help="optimizer steps a window")
    arguments.add_argument("--minibatch", type=int, default=64, help="runs a step")
    arguments.add_argument("--recipe", default="{}", help="other fields of a recipe, as JSON")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    last = []
    with tempfile.TemporaryDirectory() as home:
        for seed in range(1, given.seeds + 1):
            shares = learned(cached(Path(".ratchet/cache"), seed), Path(home), seed, given)
            print(f"seed {seed}: " + " ".join(f"{share:.2f}" for share in shares), flush=True)
            last.append(shares[-1])
    wanted = {"mean": 0.75, "worst": 0.6}
    figures = {"mean": round(statistics.fmean(last), 3), "worst": round(min(last), 3)}
    print(json.dumps({**figures, "seeds": [round(share, 3) for share in last], "wanted": wanted}))


if __name__ == "__main__":
    main()
