"""Messages in, one call, nothing decided."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, field_validator
from ratchet_sdk.events import Finite, Policy

from services.trainer.batches import Batches
from services.trainer.lines import Lines
from services.trainer.service import Trainer
from shared import subjects
from shared.bus import Bus
from shared.events import GroupScored
from shared.upstream import Place


class RegisterBase(BaseModel):
    policy: Policy = "default"
    artifact_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    note: Annotated[str, Field(max_length=2000)] | None = None


class RegisterEndpoint(BaseModel):
    policy: Policy = "default"
    serving: Place
    note: Annotated[str, Field(max_length=2000)] | None = None

    @field_validator("serving")
    @classmethod
    def _is_fixed(cls, serving: Place) -> Place:
        if serving.kind != "openai":
            raise ValueError(f"a fixed endpoint is of kind openai, got {serving.kind}")
        return serving


class Train(BaseModel):
    policy: Policy = "default"
    min_agents: Annotated[int, Field(ge=1)] | None = None
    iterations: Annotated[int, Field(ge=1, le=100_000)] | None = None
    dropout: Annotated[Finite, Field(ge=0, lt=1)] | None = None
    lookback_windows: Annotated[int, Field(ge=1)] | None = None
    force: bool = False
    windows: Annotated[list[str], Field(max_length=1000)] = []
    groups: Annotated[list[str], Field(max_length=1000)] = []


class Cancel(BaseModel):
    """The batch of that id, or the one of the policy that is being trained."""

    policy: Policy = "default"
    batch_id: Annotated[str, Field(max_length=200)] | None = None
    by: Annotated[str, Field(max_length=200)] = "an operator"
    reason: Annotated[str, Field(max_length=2000)] | None = None


class AskReadiness(BaseModel):
    policy: Policy = "default"


def subscribe(bus: Bus, trainer: Trainer, batches: Batches, lines: Lines) -> None:
    async def scored(_: GroupScored) -> None:
        trainer.wake()

    async def register_base(request: RegisterBase) -> dict[str, Any]:
        return await lines.register_base(request.policy, request.artifact_sha256, request.note)

    async def register_endpoint(request: RegisterEndpoint) -> dict[str, Any]:
        return await lines.register_endpoint(request.policy, request.serving, request.note)

    async def train(request: Train) -> dict[str, Any]:
        batch_id, why_not = await batches.claim_now(**request.model_dump())
        trainer.wake()
        return {"batch_id": batch_id, "why_not": list(why_not)}

    async def cancel(request: Cancel) -> dict[str, Any]:
        return {"cancelled": await trainer.cancel(request.policy, request.batch_id, request.by, request.reason)}

    async def readiness(request: AskReadiness) -> dict[str, Any]:
        found = await batches.readiness(request.policy)
        return {
            "ready": not found.missing,
            "missing": list(found.missing),
            "groups": found.groups,
            "trajectories": found.trajectories,
            "parent": found.parent,
            "carried": dict(found.carried),
            "left_out": dict(found.left_out),
        }

    bus.consume(subjects.TRAINER_SCORED, GroupScored, scored, batch_size=256)
    bus.on_command("trainer", "register_base", RegisterBase, register_base)
    bus.on_command("trainer", "register_endpoint", RegisterEndpoint, register_endpoint)
    bus.on_command("trainer", "train", Train, train)
    bus.on_command("trainer", "cancel", Cancel, cancel)
    bus.on_command("trainer", "readiness", AskReadiness, readiness)
