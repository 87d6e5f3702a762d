"""Which version answers a run: a pure function of the route document, the agent and the run's start window.

A document is a short history of plans. A run follows the plan that was in force when its window began, so
a change never moves a run that has started, and every replica that has read the document agrees.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator
from ratchet_sdk.events import Instant, Policy
from ratchet_sdk.sampling import NEUTRAL

Kind = Literal["inference", "vllm", "openai"]
Adds = Literal["logprobs", "return_token_ids", "stream_options"]
ADDS: tuple[Adds, ...] = ("logprobs", "return_token_ids", "stream_options")
Credential = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


def _known(name: str) -> str:
    if name not in NEUTRAL:
        raise ValueError(f"no neutral value is known of {name}; choose of {list(NEUTRAL)}")
    return name


Neutral = Annotated[str, AfterValidator(_known)]


class Arm(BaseModel):
    """A version and its share of runs. ``anchor`` is the best so far, or the demo's base, kept for comparison."""

    version: str
    share: Annotated[float, Field(ge=0, le=1)]
    role: Literal["best", "candidate", "anchor"]


class Plan(BaseModel):
    effective_from: Instant
    arms: list[Arm]

    @model_validator(mode="after")
    def _shares_are_whole(self) -> Self:
        total = sum(arm.share for arm in self.arms)
        if not self.arms or abs(total - 1) > 1e-9:
            raise ValueError(f"the shares of a plan must sum to 1, got {total:g}")
        return self


class Target(BaseModel):
    """Where a version answers: ``model`` is what to ask the server at ``base_url`` for.

    ``credential`` names a key in the caller's own settings. ``neutral`` names the sampling parameters that the gateway
    writes out at their neutral value where a client says nothing, so that the server does not fill in its own;
    ``adds`` what else it may add to a request. A server that refuses a name is given a shorter list.
    """

    kind: Kind = "inference"
    base_url: str
    model: str
    artifact_sha256: str | None = None
    credential: Credential | None = None
    neutral: list[Neutral] = Field(default_factory=lambda: list(NEUTRAL))
    adds: list[Adds] = Field(default_factory=lambda: list(ADDS))


class RouteDocument(BaseModel):
    """``plans`` are in order of ``effective_from``; ``quarantined`` versions answer nothing from now on."""

    policy: Policy
    revision: int
    salt: str
    plans: list[Plan]
    targets: dict[str, Target]
    quarantined: list[str] = Field(default_factory=list)

    def best(self) -> str:
        """The version that stands in where an assigned one cannot answer."""
        arms = self.plans[-1].arms
        return next((arm.version for arm in arms if arm.role == "best"), arms[0].version)


def draw(salt: str, agent_id: str, window_start: datetime) -> float:
    """A number in [0, 1) for an agent in a window: 53 bits of SHA-256, independent from window to window."""
    text = f"{salt}\n{agent_id}\n{int(window_start.timestamp())}"
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53


def plan_at(document: RouteDocument, window_start: datetime) -> Plan:
    """The last plan in force when the window began; the first one for runs older than the document."""
    in_force = [plan for plan in document.plans if plan.effective_from <= window_start]
    return in_force[-1] if in_force else document.plans[0]


def assigned(document: RouteDocument, agent_id: str, window_start: datetime) -> str:
    """The version that a run of this agent, started in this window, counts for."""
    arms = plan_at(document, window_start).arms
    point = draw(document.salt, agent_id, window_start)
    edge = 0.0
    for arm in arms:
        edge += arm.share
        if point < edge:
            return arm.version
    return arms[-1].version
