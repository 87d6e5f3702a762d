"""Route documents as the broker's KV bucket has them."""

from __future__ import annotations

from pydantic import ValidationError

from services.gateway.watching import Watched
from shared import subjects
from shared.bus import Bus
from shared.errors import reason
from shared.routing import RouteDocument
from shared.telemetry import logger

CHECK_S = 2.0


class RouteTable(Watched):
    """The newest document of each policy."""

    def __init__(self, bus: Bus, *, check_s: float = CHECK_S) -> None:
        super().__init__(bus, subjects.ROUTES_BUCKET, check_s=check_s)
        self._documents: dict[str, RouteDocument] = {}

    def get(self, policy: str) -> RouteDocument | None:
        return self._documents.get(policy)

    def policies(self) -> list[str]:
        return sorted(self._documents)

    def drop(self, name: str) -> None:
        self._documents.pop(name, None)

    def take(self, name: str, value: bytes) -> None:
        try:
            document = RouteDocument.model_validate_json(value)
        except ValidationError as error:
            logger().error("route_refused", policy=name, reason=reason(error), action="the one before stays")
            return
        self._documents[name] = document
        logger().info("route", policy=name, revision=document.revision, quarantined=document.quarantined)
