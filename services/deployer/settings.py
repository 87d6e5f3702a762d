from __future__ import annotations

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from shared.settings import Settings
from shared.upstream import Place, UpstreamKeys

# Of deadline_windows, by the clock: where half of the windows bring evidence, all that is asked for fits in.
PATIENCE_FACTOR = 2


class DeployerSettings(Settings):
    inference_url: str = Field(
        "http://127.0.0.1:8100/v1", pattern=r"^https?://.+/v1$", description="OpenAI API that serves the checkpoints"
    )
    inference_token: SecretStr | None = Field(None, description="sent to inference, where it asks for one")
    serving: dict[str, Place] = Field(
        default_factory=dict,
        description=(
            "policies that something else than inference serves, as JSON: "
            '{"traders": {"kind": "vllm", "base_url": "http://gpu:8000/v1", "model": "base", "artifacts": "/a"}}'
        ),
    )
    upstream_keys: UpstreamKeys = Field(
        default_factory=dict, description='keys of other models\' servers by name, as JSON: {"openai": "sk-..."}'
    )
    logprob_tolerance: float = Field(
        0.05, ge=0, description="nats a token that server and trainer may differ by on average; 0 compares nothing"
    )
    keep_loaded_s: float = Field(
        1800.0, gt=0, description="how long an adapter stays loaded for runs that began while it was routed"
    )
    canary_share: float = Field(0.1, gt=0, lt=1, description="share of runs that a candidate is tried on")
    base_share: float = Field(0.0, ge=0, lt=1, description="share that v0 keeps as a concurrent control")
    anchor_share: float = Field(0.05, ge=0, lt=1, description="share that the best previous version keeps")
    alpha: float = Field(0.05, gt=0, lt=0.5, description="chance of a false verdict over a whole rollout, at most")
    min_windows: int = Field(3, ge=2, description="windows of evidence before a promotion")
    deadline_windows: int = Field(
        48, ge=2, description="windows of evidence after which no verdict rolls back; or twice as many by the clock"
    )
    verify_patience_s: float = Field(
        120.0, gt=0, description="how long a new version may fail to answer its first call"
    )
    verify_timeout_s: float = Field(30.0, gt=0, description="longest time such a call may take: it loads the model")
    tick_s: float = Field(1.0, gt=0, description="how often versions that wait for verification are looked for")

    def place_of(self, policy: str) -> Place:
        return self.serving.get(policy) or Place(kind="inference", base_url=self.inference_url)

    @property
    def trial_s(self) -> float:
        """How long a trial may take by the clock."""
        return PATIENCE_FACTOR * self.deadline_windows * self.window_s

    @field_validator("anchor_share")
    @classmethod
    def _leave_room_for_the_best(cls, value: float, info: ValidationInfo) -> float:
        others = info.data.get("canary_share", 0.0) + info.data.get("base_share", 0.0)
        if others + value >= 1:
            raise ValueError(
                f"canary_share, base_share and anchor_share must leave the best one a share, got {others + value:g}"
            )
        return value
