"""SQL of a judgment's looks, and of what they say about the judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.scorer.judge import Look
from services.scorer.looks_domain import Pairs
from shared.database import Pool

# Two parts of the statement that writes a judgment, where ``done`` says that it is to be: $1 group, $2 revision,
# $8 judge, $9 model, $10 rubric, $16 and $17 what ``rows_of`` gives. Twice is once.
KEEP_LOOKS = """looked as (
    insert into looks (group_id, revision, judge, model, rubric, look, hindsight, endpoint, content_sha256,
                       hindsight_sha256, prompt_tokens, completion_tokens, cost_usd, latency_ms, remembered)
    select $1, $2, $8, $9, $10, look, hindsight, endpoint, decode(content, 'hex'), decode(known, 'hex'), prompt_tokens,
           completion_tokens, cost_usd, latency_ms, remembered
      from done, jsonb_to_recordset($16) as l (look integer, hindsight boolean, endpoint text, content text, known text,
           prompt_tokens integer, completion_tokens integer, cost_usd float8, latency_ms float8, remembered boolean)
    on conflict do nothing
), told as (
    insert into look_scores (group_id, revision, look, hindsight, agent_id, trajectory_id, place, score, rank,
                             explanation, strengths, weaknesses)
    select $1, $2, s.*
      from done, jsonb_to_recordset($17) as s (look integer, hindsight boolean, agent_id text, trajectory_id text,
           place integer, score float8, rank integer, explanation text, strengths text[], weaknesses text[])
    on conflict do nothing
)"""


def rows_of(looks: Sequence[Look]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Looks as rows, and what each said of each member."""
    return [_look_row(look) for look in looks], [row for look in looks for row in _score_rows(look)]


def _look_row(look: Look) -> dict[str, Any]:
    return {
        "look": look.number,
        "hindsight": look.hindsight,
        "endpoint": look.endpoint,
        "content": look.content_sha256.hex(),
        "known": look.hindsight_sha256.hex() if look.hindsight_sha256 else None,
        "prompt_tokens": look.prompt_tokens,
        "completion_tokens": look.completion_tokens,
        "cost_usd": look.cost_usd,
        "latency_ms": look.latency_ms,
        "remembered": look.remembered,
    }


def _score_rows(look: Look) -> list[dict[str, Any]]:
    scores = [opinion.score for opinion in look.opinions.values()]
    return [
        {
            "look": look.number,
            "hindsight": look.hindsight,
            "agent_id": agent_id,
            "trajectory_id": trajectory_id,
            "place": look.places[agent_id, trajectory_id],
            "score": opinion.score,
            "rank": 1 + sum(score > opinion.score for score in scores),
            "explanation": opinion.explanation,
            "strengths": opinion.strengths,
            "weaknesses": opinion.weaknesses,
        }
        for (agent_id, trajectory_id), opinion in look.opinions.items()
    ]


@dataclass(frozen=True)
class WindowPairs:
    """How the judge's order of a window's pairs stands to that of the rewards, in one of the two views."""

    window_id: str
    view: str
    pairs: Pairs


class CalibrationStore:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def newest(self, judge: str, windows: int) -> list[WindowPairs]:
        """Of the newest windows that were sampled, newest first, all policies, models and rubrics together."""
        rows = await self.pool.fetch(
            """select window_id, view, sum(pairs)::bigint as pairs, sum(concordant)::bigint as concordant,
                      sum(discordant)::bigint as discordant, sum(tied_by_judge)::bigint as tied_a,
                      sum(tied_by_reward)::bigint as tied_b
                 from judge_calibration
                where judge = $1 and window_id in (
                      select w.window_id from windows w
                       where exists (select from groups g join looks l using (group_id)
                                      where g.window_id = w.window_id and l.judge = $1 and not l.hindsight)
                       order by w.starts_at desc limit $2)
                group by window_id, starts_at, view order by starts_at desc, view""",
            judge,
            windows,
        )
        return [
            WindowPairs(
                row["window_id"],
                row["view"],
                Pairs(row["pairs"], row["concordant"], row["discordant"], row["tied_a"], row["tied_b"]),
            )
            for row in rows
        ]
