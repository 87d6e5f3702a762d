"""What the outcome tracker can be told."""

from __future__ import annotations

from typing import Self

from pydantic import Field, SecretStr, model_validator

from shared.settings import Settings


class TrackerSettings(Settings):
    settle_min_s: float = Field(300.0, ge=0, description="how long a closed window waits for outcomes at the least")
    settle_max_s: float = Field(3600.0, ge=0, description="when it is settled with what is there, saying what is not")
    tick_s: float = Field(1.0, gt=0, description="how often waiting windows are looked at")
    correct_after_s: float = Field(
        60.0,
        gt=0,
        description="how long facts about a settled window gather before it is corrected; then twice as long",
    )
    correct_within_s: float = Field(
        1_209_600.0, ge=0, description="how long after a window's end later facts still correct it"
    )
    outcome_sources: str = Field(
        "", description="pull sources, between spaces: name=FILE.csv, name=FILE.parquet, name=https://..."
    )
    outcome_http_token: SecretStr | None = Field(None, description="bearer token for the HTTP sources")
    pull_every_s: float = Field(60.0, gt=0, description="how often pull sources are read while a window waits")
    pull_timeout_s: float = Field(20.0, gt=0, description="longest silence of an HTTP source")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.settle_max_s < self.settle_min_s:
            raise ValueError(
                f"settle_max_s ({self.settle_max_s:g}) must be settle_min_s ({self.settle_min_s:g}) or more"
            )
        return self
