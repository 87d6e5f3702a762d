"""The judge that is a language model: RULER's idea over any OpenAI-compatible endpoint, with hindsight."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import Counter

from services.scorer.endpoint import Answer, AskError
from services.scorer.ruler_prompt import Question, ask_about, read_reply
from services.scorer.service import JudgeFailedError, Opinion
from services.scorer.settings import ScorerSettings
from services.scorer.store import Case, Hindsight
from shared.trajectories import RunKey, Trajectory

CALLS = Counter("ratchet_judge_calls_total", "Calls of the judge's endpoint, by what came back", ["result"])
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0


class Ask(Protocol):
    async def __call__(self, question: Question) -> Answer:
        """Ask once. Raises AskError."""


class Evidence(Protocol):
    async def trajectories(self, keys: Sequence[RunKey]) -> dict[RunKey, Trajectory]: ...
    async def hindsight(self, window_id: str, keys: Sequence[RunKey]) -> Hindsight: ...
    async def cached(self, content_sha256: bytes) -> Any | None: ...
    async def keep(
        self,
        content_sha256: bytes,
        runs: Sequence[RunKey],
        judge: str,
        model: str,
        reply: Any,
        prompt_tokens: int | None,
        completion_tokens: int | None,
        latency_ms: float,
    ) -> None: ...


def shown_order(group_id: str, rubric: str, keys: Sequence[RunKey]) -> list[RunKey]:
    """The order in which members are shown: shuffled, with the group and the rubric as the seed."""
    seed = hashlib.sha256(f"{group_id}\n{rubric}".encode()).digest()
    order = sorted(keys)
    random.Random(seed).shuffle(order)  # noqa: S311  # an order that can be repeated, not a secret
    return order


class RulerJudge:
    name = "ruler"
    rubric = "ratchet/1"

    def __init__(
        self, evidence: Evidence, ask: Ask, settings: ScorerSettings, *, first_pause_s: float = FIRST_PAUSE_S
    ) -> None:
        assert settings.judge_model, "the settings were checked"
        self.model: str | None = settings.judge_model
        self.evidence = evidence
        self.ask = ask
        self.settings = settings
        self.first_pause_s = first_pause_s
        self.lease_s = settings.judge_attempts * (settings.judge_timeout_s + MAX_PAUSE_S) + 30

    async def judge(self, case: Case) -> Mapping[RunKey, Opinion]:
        """Scores that the model gave, by id. The same question is asked once and then remembered."""
        keys = shown_order(case.group_id, self.rubric, list(case.members))
        runs = await self.evidence.trajectories(keys)
        if gone := [trajectory_id for agent_id, trajectory_id in keys if (agent_id, trajectory_id) not in runs]:
            raise JudgeFailedError(f"the events of {len(gone)} runs are not stored any more, {gone[0]} among them")
        known = await self.evidence.hindsight(case.window_id, keys)
        budget = self.settings.judge_context_chars
        question = ask_about(case, runs, known, order=keys, rubric=self.rubric, context_chars=budget)
        opinions = await self._remembered(question, keys)
        return {key: opinions[name] for key, name in zip(keys, question.ids, strict=True)}

    async def _remembered(self, question: Question, keys: Sequence[RunKey]) -> dict[str, Opinion]:
        model = str(self.model)
        sha256 = question.content_sha256(model, self.settings.judge_temperature)
        if (reply := await self.evidence.cached(sha256)) is not None:
            return read_reply(reply["text"], question.ids)
        started = time.monotonic()
        answer, opinions = await self._asked(question)
        await self.evidence.keep(
            sha256,
            keys,
            self.name,
            model,
            {"text": answer.text},
            answer.prompt_tokens,
            answer.completion_tokens,
            (time.monotonic() - started) * 1000,
        )
        return opinions

    async def _asked(self, question: Question) -> tuple[Answer, dict[str, Opinion]]:
        """Ask until an answer can be read, ``judge_attempts`` times at most. Raises JudgeFailedError."""
        last = self.settings.judge_attempts
        for attempt in range(1, last + 1):
            try:
                answer = await self.ask(question)
                opinions = _read(answer, question.ids)
            except AskError as error:
                CALLS.labels(error.result).inc()
                wait_s = self._pause(attempt, error)
                if wait_s is None or attempt == last:
                    raise JudgeFailedError(f"{error} (call {attempt} of at most {last})") from error
                await asyncio.sleep(wait_s)
            else:
                CALLS.labels("ok").inc()
                return answer, opinions
        raise AssertionError("judge_attempts is 1 or more")  # pragma: no cover  # the loop returns or raises

    def _pause(self, attempt: int, error: AskError) -> float | None:
        """Seconds until the next call: what the endpoint asked for, else doubling with jitter; None for no more."""
        if not error.again or (error.after_s or 0) > MAX_PAUSE_S:
            return None
        doubled = self.first_pause_s * float(2 ** (attempt - 1)) * random.uniform(0.5, 1.5)  # noqa: S311  # jitter
        return max(error.after_s or 0, min(MAX_PAUSE_S, doubled))


def _read(answer: Answer, ids: Sequence[str]) -> dict[str, Opinion]:
    try:
        return read_reply(answer.text, ids)
    except ValueError as error:
        raise AskError(str(error), "unreadable") from error
