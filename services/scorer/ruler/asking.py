"""A question to the judge's endpoint, paid for once: remembered by its content, claimed, within the budget, retried."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Protocol

from prometheus_client import Counter

from services.scorer.judge import JudgeFailedError, JudgeWaitsError, Opinion
from services.scorer.probes.domain import address
from services.scorer.ruler.endpoint import Answer, AskError, Usage
from services.scorer.ruler.ledger_store import Reply
from services.scorer.ruler.prompt import REPLY_TOKENS_PER_ATTEMPT, Question, read_reply
from services.scorer.settings import ScorerSettings
from shared.trajectories import RunKey

CALLS = Counter("ratchet_judge_calls_total", "Calls of the judge's endpoint, by what came back", ["result"])
TOKENS = Counter("ratchet_judge_tokens_total", "Tokens of the judge, as told or else at most", ["kind"])
COST = Counter("ratchet_judge_cost_usd_total", "What its tokens cost, at the prices that the settings name")
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
FIRST_LOOK_AGAIN_S, LOOK_AGAIN_S = 0.05, 1.0  # at a question that another asks
BUDGET = "budget"


class Ask(Protocol):
    async def __call__(self, question: Question) -> Answer:
        """Ask once. Raises AskError."""


class Ledger(Protocol):
    """What replicas know of each other's questions. Without one, nothing is remembered and nothing limits spending."""

    async def remembered(self, content_sha256: bytes, runs: Sequence[RunKey]) -> Reply | None: ...
    async def keep(
        self, content_sha256: bytes, judge: str, model: str, reply: Reply, runs: Sequence[RunKey]
    ) -> None: ...
    async def claim(self, content_sha256: bytes) -> bool: ...
    async def release(self, content_sha256: bytes) -> None: ...
    async def reserve(self, tokens: int, budget: int) -> date | None: ...
    async def settle(
        self, day: date | None, reserved: int, prompt_tokens: int, completion_tokens: int, cost_usd: float
    ) -> None: ...


@dataclass(frozen=True)
class Asked:
    """An answer with what it says by attempt; ``remembered``: it was paid for before."""

    reply: Reply
    opinions: dict[str, Opinion]
    remembered: bool


class Asker:
    def __init__(
        self, ask: Ask, settings: ScorerSettings, ledger: Ledger | None, *, first_pause_s: float = FIRST_PAUSE_S
    ) -> None:
        self.ask = ask
        self.settings = settings
        self.ledger = ledger
        self.first_pause_s = first_pause_s
        self.calls = asyncio.Semaphore(settings.judge_concurrency)
        self.endpoint = address(settings.judge_base_url or "")

    def content_sha256(self, question: Question) -> bytes:
        """A question as it is put to this endpoint."""
        return question.content_sha256(self.settings.judge_model, self.endpoint, self.settings.judge_temperature)

    async def __call__(self, judge: str, question: Question, runs: Sequence[RunKey]) -> Asked:
        """The answer to a question about these runs. Raises JudgeFailedError, JudgeWaitsError."""
        if self.ledger is None:
            return Asked(*await self._paid(question), remembered=False)
        model = self.settings.judge_model
        sha256 = self.content_sha256(question)
        pause_s = FIRST_LOOK_AGAIN_S
        while True:
            if await self.ledger.claim(sha256):  # first: most questions are new, and each round trip costs all others
                break
            if (known := await self._remembered(self.ledger, sha256, question, runs)) is not None:
                return known
            await asyncio.sleep(pause_s)  # another replica asks it just now, or has been killed and its claim ends
            pause_s = min(LOOK_AGAIN_S, pause_s * 2)
        kept = False
        try:
            # Answered, and the claim given back, between our look and our claim: one statement could not see both.
            if (known := await self._remembered(self.ledger, sha256, question, runs)) is not None:
                return known
            reply, opinions = await self._paid(question)
            await self.ledger.keep(sha256, judge, model, reply, runs)
            kept = True
            return Asked(reply, opinions, remembered=False)
        finally:
            if not kept:
                await self.ledger.release(sha256)

    async def _remembered(
        self, ledger: Ledger, sha256: bytes, question: Question, runs: Sequence[RunKey]
    ) -> Asked | None:
        reply = await ledger.remembered(sha256, runs)
        return Asked(reply, read_reply(reply.text, question.ids), remembered=True) if reply else None

    async def _paid(self, question: Question) -> tuple[Reply, dict[str, Opinion]]:
        """Ask until an answer can be read, ``judge_attempts`` times at most."""
        last = self.settings.judge_attempts
        for attempt in range(1, last + 1):
            started = time.monotonic()
            try:
                answer, opinions, cost_usd = await self._once(question)
            except AskError as error:
                CALLS.labels(error.result).inc()
                wait_s = self._pause(attempt, error)
                if wait_s is None or attempt == last:
                    words = f"{error} (call {attempt} of at most {last})"
                    raise JudgeFailedError(words, error.after_s) from error
                await asyncio.sleep(wait_s)
            else:
                CALLS.labels("ok").inc()
                latency_ms = (time.monotonic() - started) * 1000
                text = answer.text.replace("\x00", "")
                used = answer.usage
                return Reply(text, used.prompt_tokens, used.completion_tokens, cost_usd, latency_ms), opinions
        raise AssertionError("judge_attempts is 1 or more")  # pragma: no cover  # the loop returns or raises

    def _pause(self, attempt: int, error: AskError) -> float | None:
        """Seconds until the next call: what the endpoint asked for, else doubling with jitter; None for no more."""
        if not error.again or (error.after_s or 0) > MAX_PAUSE_S:
            return None
        doubled = self.first_pause_s * float(2 ** (attempt - 1)) * random.uniform(0.5, 1.5)  # noqa: S311  # jitter
        return max(error.after_s or 0, min(MAX_PAUSE_S, doubled))

    async def _once(self, question: Question) -> tuple[Answer, dict[str, Opinion], float | None]:
        """One call within the day's budget; whatever it took is counted, also where it gave nothing."""
        at_most = question.tokens_at_most()
        day = await self._reserve(at_most)
        reserved = at_most if day else 0
        used = Usage(at_most, 0)  # of a call that is cancelled or lost: as much as was set aside
        try:
            async with self.calls:
                answer = await self.ask(question)
            used = answer.usage
            return answer, _read(answer, question.ids), self._cost(used)
        except AskError as error:
            used = error.usage or used
            raise
        finally:
            if self.ledger is not None:
                await self.ledger.settle(day, reserved, *self._spent(used, at_most, len(question.ids)))

    async def _reserve(self, tokens: int) -> date | None:
        budget = self.settings.judge_tokens_per_day
        if self.ledger is None or budget == 0:
            return None
        day = await self.ledger.reserve(tokens, budget)
        if day is None:
            raise JudgeWaitsError(BUDGET, f"the day's {budget} tokens are spent or would be by {tokens} more")
        return day

    def _spent(self, used: Usage, at_most: int, attempts: int) -> tuple[int, int, float]:
        """Tokens of prompt and answer, and USD. What the endpoint does not tell is counted at the most it may be."""
        answer_at_most = attempts * REPLY_TOKENS_PER_ATTEMPT
        prompt = at_most - answer_at_most if used.prompt_tokens is None else used.prompt_tokens
        completion = answer_at_most if used.completion_tokens is None else used.completion_tokens
        TOKENS.labels("prompt").inc(prompt)
        TOKENS.labels("completion").inc(completion)
        cost_usd = self._cost(Usage(prompt, completion)) or 0.0
        COST.inc(cost_usd)
        return prompt, completion, cost_usd

    def _cost(self, usage: Usage) -> float | None:
        """In USD; None where no price is set or the endpoint told no tokens."""
        prices = (self.settings.judge_prompt_usd_per_million, self.settings.judge_completion_usd_per_million)
        tokens = (usage.prompt_tokens, usage.completion_tokens)
        if None in prices or None in tokens:
            return None
        return sum((n or 0) * (price or 0.0) for n, price in zip(tokens, prices, strict=True)) / 1e6


def _read(answer: Answer, ids: Sequence[str]) -> dict[str, Opinion]:
    try:
        return read_reply(answer.text, ids)
    except ValueError as error:
        raise AskError(str(error), "unreadable", usage=answer.usage) from error
