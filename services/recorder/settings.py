"""The recorder's own settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from ratchet_sdk.events import Policy

from shared.settings import Settings


class RecorderSettings(Settings):
    grace_s: float = Field(300, ge=0, description="how long a window waits after its end for what was sent within it")
    trajectory_limit_s: float = Field(900, gt=0, description="a run that has not ended this long after its start")
    tick_s: float = Field(1, gt=0, description="how often it is looked whether a window may close")
    batch_size: int = Field(1024, ge=1, le=5000, description="events that are stored in one transaction at most")
    gather_s: float = Field(0.05, gt=0, le=5, description="how long events are gathered for a batch")
    retention_days: int = Field(
        0, ge=0, le=1000, description="whole days that events' bodies are kept; 0 keeps them for ever"
    )
    retention_days_by_policy: dict[Policy, Annotated[int, Field(ge=0, le=1000)]] = Field(
        default_factory=dict, description='the same for single policies, as JSON: {"traders": 30, "posters": 0}'
    )
    purge_s: float = Field(60, gt=0, description="how often stored messages are let go of in the stream of steps")
    retention_s: float = Field(600, gt=0, description="how often it is looked for days that are over")
