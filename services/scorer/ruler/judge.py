"""The judge that is a language model: RULER's idea over any OpenAI-compatible endpoint, with hindsight."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations
from typing import Protocol

from prometheus_client import Counter, Histogram

from services.scorer.judge import Case, Hindsight, JudgeFailedError, JudgeWaitsError, Look, Opinion, Ruling
from services.scorer.looks_domain import averaged, disagreement, is_sampled, place_of, same_order, shown_order
from services.scorer.ruler.asking import FIRST_PAUSE_S, Ask, Asker, Ledger
from services.scorer.ruler.prompt import Attempts, ask_about, distinct
from services.scorer.ruler.rubrics import Rubric, RubricBook, book
from services.scorer.ruler.text import transcript
from services.scorer.settings import ScorerSettings
from shared.telemetry import logger
from shared.trajectories import RunKey, Trajectory

TENTHS = tuple(n / 10 for n in range(1, 11))
SCORE_BY_PLACE = Histogram(
    "ratchet_judge_score_by_place",
    "Scores by the place of the attempt in its question: the means differ where the judge is biased by position",
    ["place"],
    buckets=TENTHS,
)
DISAGREEMENT = Histogram(
    "ratchet_judge_disagreement",
    "Mean absolute difference of a member's scores between looks at its group",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 1),
)
SELF_AGREEMENT = Histogram(
    "ratchet_judge_self_agreement", "Share of a group's pairs that two looks order alike", buckets=TENTHS
)
UNCALIBRATED = Counter("ratchet_judge_calibration_failures_total", "Looks without hindsight that gave no scores")
ALL_ALIKE = "all attempts are the same"


class Evidence(Protocol):
    async def trajectories(self, keys: Sequence[RunKey]) -> dict[RunKey, Trajectory]: ...
    async def hindsight(self, window_id: str, keys: Sequence[RunKey]) -> Hindsight: ...


class RulerJudge:
    name = "ruler"

    def __init__(
        self,
        evidence: Evidence,
        ask: Ask,
        settings: ScorerSettings,
        *,
        ledger: Ledger | None = None,
        rubrics: RubricBook | None = None,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self.model: str | None = settings.judge_model
        self.evidence = evidence
        self.settings = settings
        self.book = rubrics or book(settings.judge_rubric, settings.judge_rubrics)
        self.rubrics: Collection[str] = frozenset(self.book.by_id)
        self.asker = Asker(ask, settings, ledger, first_pause_s=first_pause_s)

    async def judge(self, case: Case) -> Ruling:
        """The mean of several looks, each in another order. The same question is asked once and then remembered."""
        keys = sorted(case.members)
        runs = await self.evidence.trajectories(keys)
        if gone := [trajectory_id for agent_id, trajectory_id in keys if (agent_id, trajectory_id) not in runs]:
            raise JudgeFailedError(f"events are not stored any more: of {len(gone)} runs, {gone[0]} among them")
        rubric = self.book.chosen(case.scenario_id, case.rubric)
        attempts = distinct({key: transcript(runs[key]) for key in keys}, case.members)
        if len(attempts.lines) == 1:
            return Ruling(dict.fromkeys(keys, Opinion(0.5, ALL_ALIKE)), rubric.id)
        known = await self.evidence.hindsight(case.window_id, keys)
        looks = [await self._look(case, attempts, known, rubric, number) for number in range(self.settings.judge_looks)]
        _measure(looks)
        scores = [{key: opinion.score for key, opinion in look.opinions.items()} for look in looks]
        means = averaged(scores)
        first = looks[0].opinions
        opinions = {
            key: Opinion(means[key], first[key].explanation, first[key].strengths, first[key].weaknesses)
            for key in keys
        }
        blind = await self._calibration(case, attempts, rubric)
        return Ruling(opinions, rubric.id, (*looks, *blind), disagreement(scores))

    async def _look(self, case: Case, attempts: Attempts, known: Hindsight | None, rubric: Rubric, number: int) -> Look:
        order = shown_order(case.group_id, rubric.id, list(attempts.lines), number)
        question = ask_about(
            case,
            attempts,
            known,
            order=order,
            rubric=rubric,
            look=number,
            context_tokens=self.settings.judge_context_tokens,
        )
        asked = await self.asker(self.name, question, sorted(case.members))
        places = {key: n for n, first in enumerate(order, 1) for key in attempts.copies[first]}
        return Look(
            number,
            known is not None,
            places,
            {key: asked.opinions[question.ids[place - 1]] for key, place in places.items()},
            self.asker.endpoint,
            self.asker.content_sha256(question),
            question.hindsight_sha256,
            asked.reply.prompt_tokens,
            asked.reply.completion_tokens,
            0.0 if asked.remembered else asked.reply.cost_usd,
            asked.reply.latency_ms,
            asked.remembered,
        )

    async def _calibration(self, case: Case, attempts: Attempts, rubric: Rubric) -> list[Look]:
        """A look without hindsight, of a sample: it tells how good the judge is and counts for no score."""
        if not is_sampled(case.group_id, self.settings.judge_calibration_rate):
            return []
        try:
            return [await self._look(case, attempts, None, rubric, 0)]
        except (JudgeFailedError, JudgeWaitsError) as error:
            UNCALIBRATED.inc()
            logger().warning("not_calibrated", group_id=case.group_id, policy=case.policy, error=str(error))
            return []


def _measure(looks: Sequence[Look]) -> None:
    for look in looks:
        count = max(look.places.values())
        for key, place in look.places.items():
            SCORE_BY_PLACE.labels(place_of(place - 1, count)).observe(look.opinions[key].score)
    scores = [{key: opinion.score for key, opinion in look.opinions.items()} for look in looks]
    if (apart := disagreement(scores)) is not None:
        DISAGREEMENT.observe(apart)
    for one, other in combinations(scores, 2):
        if (alike := same_order(one, other)) is not None:
            SELF_AGREEMENT.observe(alike)
