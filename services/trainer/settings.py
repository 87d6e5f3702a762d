"""What only the trainer is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from services.trainer.recipes import checked
from shared.settings import Settings


class TrainerSettings(Settings):
    engine: Literal["torch", "art"] = Field("torch", description="what trains: the torch engine here, or ART")
    min_groups: int = Field(8, ge=1, description="groups that must teach something before a batch is made")
    min_agents: int = Field(2, ge=1, description="different agents that a batch must hear")
    max_groups: int = Field(256, ge=1, description="groups in a batch at most; the newest are taken")
    min_trajectories: int = Field(1, ge=1, description="runs that a batch trains on at least")
    min_windows: int = Field(1, ge=1, description="different windows that a batch's groups are of at least")
    max_agent_share: float = Field(
        1.0, gt=0, le=1, description="share of a batch that one agent's runs have at most; more are left out by lot"
    )
    min_quality: float = Field(
        0.95, ge=0, le=1, description="quality of a window (`ratchet windows`) from which its groups are trained on"
    )
    cool_down_s: float = Field(0.0, ge=0, description="pause after a batch that made a version")
    learning_rate: float | None = Field(
        None, gt=0, description="of AdamW; unset: as suits what is trained and its size"
    )
    recipes: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description='for single policies, or "*", as JSON: {"traders": {"loss": "cispo", "train_steps": 4}}',
    )
    trains: Literal["full", "lora"] = Field(
        "full", description="all weights, or a LoRA adapter over frozen ones: a fraction of the memory and of the file"
    )
    lora_rank: int = Field(16, ge=1, description="with trains lora: rank of a new adapter")
    lora_alpha: int = Field(32, ge=1, description="with trains lora: a new adapter counts alpha / rank times")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="what training computes in; auto: bfloat16 on a GPU that has it, else float32"
    )
    train_steps: int = Field(8, ge=1, description="optimizer steps a batch")
    minibatch: int = Field(64, ge=1, description="trajectories a GRPO step, more where a batch would not be seen whole")
    imitation_minibatch: int = Field(4, ge=1, description="conversations a step of imitation, more likewise")
    max_lag: int = Field(1, ge=0, description="versions between a trajectory and the parent before it is left out")
    imitation_min_reward: float = Field(1.0, description="reward of record from which a run is worth imitating")
    clip_epsilon: float = Field(0.2, gt=0, lt=1, description="how far a token's probability may move in one batch")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are scaled down to this")
    lease_s: float = Field(60.0, gt=0, description="without a heartbeat for this long, another trainer takes over")
    retry_s: float = Field(30.0, ge=0, description="pause after a failure; each further one doubles it, to an hour")
    checkpoint_s: float = Field(
        30.0, gt=0, description="seconds of training between checkpoints that a killed one goes on from"
    )
    trust_agent_tokens: bool = Field(
        False, description="train by gradient on tokens that the gateway did not see: agents can invent them"
    )
    tick_s: float = Field(1.0, gt=0, description="how often readiness is looked at when no event says so")
    sabotage_version: int | None = Field(None, description="fire drill: the version that gets its weights made worse")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto takes a GPU where there is one")
    torch_threads: int = Field(2, ge=1, description="threads of one tensor operation on the CPU")
    micro_tokens: int = Field(
        16_384, ge=1, description="tokens at once through the model, padding too, shared ones once"
    )
    wandb_mode: Literal["offline", "online", "disabled"] = Field("offline", description="where batches are logged")
    wandb_dir: Path = Field(Path(".ratchet/wandb"), description="where offline runs are kept")
    wandb_project: str = Field("ratchet", description="project that runs are logged to")
    art_backend: Literal["serverless", "local"] = Field("serverless", description="with engine art: where it trains")
    art_project: str = Field("ratchet", description="with engine art: the W&B project")
    art_base_model: str = Field("OpenPipe/Qwen3-14B-Instruct", description="with engine art: what v0 was")

    @field_validator("recipes")
    @classmethod
    def _that_can_be_trained_by(cls, by_policy: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return checked(by_policy)
