"""What the services tell each other. Each event carries ids and small facts, never texts.

``subject`` is where it is published and ``key`` what makes it one event: the ``Nats-Msg-Id`` is derived
from both, so that a second announcement of the same row is the same message.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from ratchet_sdk.events import AgentId, Finite, Instant, Policy, RunId, ScenarioId

from shared import subjects


class LoopEvent(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)
    subject: ClassVar[str]

    schema_: Literal[1] = Field(1, alias="schema")

    @property
    def key(self) -> str:
        raise NotImplementedError(f"{type(self).__name__} names what makes it one event")

    @property
    def message_id(self) -> str:
        return f"{self.subject}:{self.key}"


class WindowClosed(LoopEvent):
    subject: ClassVar[str] = subjects.WINDOW_CLOSED

    window_id: str
    starts_at: Instant
    ends_at: Instant
    revision: int = 1
    agents: int
    trajectories: int
    late: int
    quality: Finite | None = None

    @property
    def key(self) -> str:
        return f"{self.window_id}:{self.revision}"


class WindowResolved(LoopEvent):
    """The first settlement of a window has revision 1. A later one corrects it, and ``changed`` says what is new.

    ``missing`` and ``contradictions`` say what the facts lack and where they do not agree.
    """

    subject: ClassVar[str] = subjects.WINDOW_RESOLVED

    window_id: str
    starts_at: Instant
    ends_at: Instant
    close_revision: int
    revision: int = 1
    outcomes: int
    missing: list[str] = Field(default_factory=list)
    contradictions: list[str] = Field(default_factory=list)
    changed: list[str] = Field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.window_id}:{self.close_revision}:{self.revision}"


class MemberScore(BaseModel):
    agent_id: AgentId
    trajectory_id: RunId
    score: Annotated[Finite, Field(ge=0, le=1)]
    rank: Annotated[int, Field(ge=1)]


class GroupScored(LoopEvent):
    """``state``: ``scored`` has spread and teaches; ``tie`` has none; ``small`` has fewer than two members.

    Of a ``disputed`` group the judge's own looks disagree too much: it is set aside, without scores.
    """

    subject: ClassVar[str] = subjects.GROUP_SCORED

    group_id: str
    policy: Policy
    window_id: str
    scenario_id: ScenarioId
    revision: int
    judge: str
    state: Literal["scored", "tie", "small", "disputed"]
    homogeneous: bool
    spread: Finite
    scores: list[MemberScore]

    @property
    def key(self) -> str:
        return f"{self.group_id}:{self.revision}"


class TrainingProgress(LoopEvent):
    subject: ClassVar[str] = subjects.TRAINING_PROGRESS

    policy: Policy
    batch_id: str
    fencing_token: int
    step: int
    steps: int
    metrics: dict[str, Finite] = Field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.batch_id}:{self.fencing_token}:{self.step}"


class ModelTrained(LoopEvent):
    """A new version exists. ``method`` is ``base`` for a version that was registered and not trained.

    It has an artifact, in ``adapter_of`` the artifact that this is an adapter over, or in ``serving`` an endpoint that
    answers for it: kind, base_url, model, and the name of a credential.
    """

    subject: ClassVar[str] = subjects.MODEL_TRAINED

    policy: Policy
    version: str
    parent: str | None = None
    batch_id: str | None = None
    artifact_sha256: str | None = None
    serving: dict[str, Any] | None = None
    adapter_of: str | None = None
    method: Literal["base", "grpo", "imitation"]

    @property
    def key(self) -> str:
        return f"{self.policy}:{self.version}"


class ModelDeployed(LoopEvent):
    subject: ClassVar[str] = subjects.MODEL_DEPLOYED

    policy: Policy
    version: str
    previous: str | None
    reason: str
    evidence: dict[str, Any] = Field(default_factory=dict)
    decision: int

    @property
    def key(self) -> str:
        return f"{self.policy}:{self.version}:{self.decision}"


class ModelRolledBack(LoopEvent):
    subject: ClassVar[str] = subjects.MODEL_ROLLED_BACK

    policy: Policy
    version: str
    back_to: str | None
    reason: str
    evidence: dict[str, Any] = Field(default_factory=dict)
    decision: int

    @property
    def key(self) -> str:
        return f"{self.policy}:{self.version}:{self.decision}"


class GatewayHealth(BaseModel):
    """What one gateway replica saw of one version since its last report; transient, on core NATS."""

    gateway: str
    policy: Policy
    version: str
    requests: int
    failures: int
    fallbacks: int
    unrecorded: int = 0
    latency_ms_sum: Finite
    at: Instant
