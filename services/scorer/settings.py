"""What the scorer can be told."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator

from shared.settings import Settings


class ScorerSettings(Settings):
    judge: Literal["outcome", "ruler"] = Field(
        "outcome", description="outcome: by the reward of record; ruler: a language model with hindsight"
    )
    judge_base_url: str | None = Field(None, description="OpenAI-compatible endpoint of the ruler judge, ends with /v1")
    judge_api_key: SecretStr | None = Field(None, description="its key; no other variable is ever read for it")
    judge_model: str | None = Field(None, description="the model that the ruler judge asks for")
    judge_temperature: float | None = Field(None, ge=0, le=2, description="unset leaves it to the endpoint")
    judge_timeout_s: float = Field(90.0, gt=0, description="how long one answer of the judge may take")
    judge_attempts: int = Field(4, ge=1, le=20, description="times one question is asked before it has failed")
    judge_rounds: int = Field(6, ge=1, description="times a failed group is taken up again before it is left alone")
    judge_concurrency: int = Field(8, ge=1, le=256, description="groups that one scorer judges at the same time")
    judge_context_chars: int = Field(200_000, ge=2_000, description="of all runs in one question; longer ones are cut")
    group_max: int = Field(8, ge=2, le=64, description="members of a group at most; larger sets are split")

    @model_validator(mode="after")
    def _ruler_is_told_whom_to_ask(self) -> Self:
        if self.judge == "ruler" and not (self.judge_base_url and self.judge_model):
            raise ValueError("RATCHET_JUDGE=ruler needs RATCHET_JUDGE_BASE_URL and RATCHET_JUDGE_MODEL")
        return self
