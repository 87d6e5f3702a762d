"""Messages in: parse, one call to the service, no decision."""

from __future__ import annotations

from typing import Any

from faststream.nats.annotations import NatsMessage
from pydantic import BaseModel, Field, ValidationError
from ratchet_sdk.events import Name, Policy

from services.deployer.service import Deployer
from shared import subjects
from shared.bus import Bus
from shared.database import UNAVAILABLE
from shared.errors import RatchetError, reason
from shared.events import GatewayHealth, ModelTrained, WindowResolved
from shared.telemetry import logger


class DeployRequest(BaseModel):
    policy: Policy = "default"
    version: Name
    reason: str | None = Field(None, max_length=500)


class RollbackRequest(BaseModel):
    policy: Policy = "default"
    version: Name | None = None
    reason: str | None = Field(None, max_length=500)


def subscribe(bus: Bus, deployer: Deployer) -> None:
    bus.consume(subjects.DEPLOYER_TRAINED, ModelTrained, deployer.trained)
    bus.consume(subjects.DEPLOYER_RESOLVED, WindowResolved, deployer.resolved)

    async def deploy(request: DeployRequest) -> dict[str, Any]:
        return await deployer.deploy(request.policy, request.version, request.reason)

    async def rollback(request: RollbackRequest) -> dict[str, Any]:
        return await deployer.rollback(request.policy, request.version, request.reason)

    bus.on_command("deployer", "deploy", DeployRequest, deploy)
    bus.on_command("deployer", "rollback", RollbackRequest, rollback)

    @bus.broker.subscriber(subjects.GATEWAY_HEALTH, "deployer", decoder=_raw, no_reply=True)
    async def health(message: NatsMessage) -> None:
        try:
            await deployer.healthy(GatewayHealth.model_validate_json(message.body))
        except ValidationError as error:
            logger().warning("health_refused", reason=reason(error))
        except (RatchetError, *UNAVAILABLE) as error:  # transient: the next report comes in seconds
            logger().warning("health_not_counted", error=str(error))


async def _raw(message: Any) -> Any:
    return message.body
