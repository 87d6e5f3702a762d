"""What the outcome tracker can be told."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from shared.settings import Settings


class TrackerSettings(Settings):
    settle_min_s: float = Field(300.0, ge=0, description="how long a closed window waits for outcomes at the least")
    settle_max_s: float = Field(3600.0, ge=0, description="when it is settled with what is there, saying what is not")
    tick_s: float = Field(1.0, gt=0, description="how often waiting windows are looked at")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.settle_max_s < self.settle_min_s:
            raise ValueError(
                f"settle_max_s ({self.settle_max_s:g}) must be settle_min_s ({self.settle_min_s:g}) or more"
            )
        return self
