"""What the scorer can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator

from shared.settings import Settings


class ScorerSettings(Settings):
    judge: Literal["outcome", "ruler"] = Field(
        "outcome", description="outcome: by the reward of record; ruler: a language model with hindsight"
    )
    judge_base_url: str | None = Field(None, description="OpenAI-compatible endpoint of the ruler judge, ends with /v1")
    judge_api_key: SecretStr | None = Field(None, description="its key; no other variable is ever read for it")
    judge_model: str = Field("gpt-4.1", min_length=1, description="the model that the ruler judge asks for")
    judge_temperature: float | None = Field(None, ge=0, le=2, description="unset leaves it to the endpoint")
    judge_timeout_s: float = Field(90.0, gt=0, description="how long one answer of the judge may take")
    judge_attempts: int = Field(4, ge=1, le=20, description="times one question is asked before it has failed")
    judge_rounds: int = Field(6, ge=1, description="times a failed group is taken up again before it is left alone")
    judge_concurrency: int = Field(8, ge=1, le=256, description="calls that one scorer makes at the same time")
    judge_lease_s: float = Field(60.0, gt=0, description="without a heartbeat for this long, another scorer takes over")
    judge_context_tokens: int = Field(
        100_000, ge=4_000, description="question and answer together, as a generous count; longer runs are cut"
    )
    judge_looks: int = Field(2, ge=1, le=8, description="times a group is judged, each in another order; averaged")
    judge_disagreement_max: float = Field(
        0.25, gt=0, le=1, description="mean difference between looks past which a group is set aside"
    )
    judge_rubric: str = Field("ratchet/1", description="for scenarios without one of their own; or art-default/1")
    judge_rubrics: Path | None = Field(None, description="YAML file of rubrics of your own, by scenario")
    judge_tokens_per_day: int = Field(0, ge=0, description="what all scorers may spend in a UTC day; 0 for no limit")
    judge_prompt_usd_per_million: float | None = Field(None, ge=0, description="price of a million prompt tokens")
    judge_completion_usd_per_million: float | None = Field(None, ge=0, description="and of a million that it answers")
    judge_calibration_rate: float = Field(
        0.1, ge=0, le=1, description="share of groups that are also looked at without hindsight, to measure the judge"
    )
    judge_calibration_windows: int = Field(50, ge=1, description="windows that the rolling calibration is taken over")
    judge_drift_max: float = Field(
        0.2, gt=0, le=2, description="how far tau may fall below that of the windows before, until an alert says so"
    )
    judge_probe_every_s: float = Field(
        86_400.0, gt=0, description="how long the verdict of a probe holds before the judge is probed again"
    )
    judge_probe_pass_mark: float = Field(
        0.9, gt=0, le=1, description="share of the planted cases that a judge must pass to be trusted"
    )
    group_max: int = Field(
        8, ge=2, le=64, description="members of a group at most; larger sets are split. The outcome judge can take more"
    )
    group_target: int = Field(
        0, ge=0, description="runs of a policy in a window over which some are dropped at random; 0 drops none"
    )
    group_drop_max: float = Field(0.5, ge=0, lt=1, description="share of them that is dropped at most")
    group_drop_seed: int = Field(0, description="of what is dropped")

    @model_validator(mode="after")
    def _ruler_is_told_whom_to_ask(self) -> Self:
        if self.judge == "ruler" and not self.judge_base_url:
            raise ValueError("RATCHET_JUDGE=ruler needs RATCHET_JUDGE_BASE_URL")
        return self
