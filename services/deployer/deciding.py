"""What becomes of a version, and what follows from it for the line: each inside the transaction of its policy."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from prometheus_client import Counter

from services.deployer import verdict_domain
from services.deployer.domain import Deployment, Line, Version
from services.deployer.planning import Shares, next_document
from services.deployer.sequential import Interval
from services.deployer.settings import DeployerSettings
from services.deployer.store import Store
from services.deployer.verdict_domain import RollBack
from shared.database import Connection
from shared.routing import Target
from shared.telemetry import logger

VERDICTS = Counter("ratchet_deployer_verdicts_total", "Verdicts on versions, by what was decided and why", ["verdict"])


class Deciding:
    def __init__(self, store: Store, target_of: Callable[[Version], Target], settings: DeployerSettings) -> None:
        self._store = store
        self._target_of = target_of
        self._settings = settings
        self._shares = Shares(settings.canary_share, settings.base_share, settings.anchor_share)

    async def try_out(self, c: Connection, version: Deployment, control: str) -> None:
        """A trial on its share of the runs, from a coming window on."""
        await self._store.start_canary(c, version.policy, version.version, control)
        await self.route(c, version.policy)
        self._log("canary", version, control=control)

    async def promote(self, c: Connection, policy: str, version: str, reason: str, evidence: dict[str, Any]) -> None:
        former = (await self._store.line(c, policy)).best
        await self._store.supersede(c, policy)
        control = former.version if former else None
        await self._store.decide(c, policy, version, "promoted", reason, evidence=evidence, control=control)
        await self._store.lift_quarantine(c, policy, version)
        await self._store.measure_against(c, policy, version)
        await self.route(c, policy)
        VERDICTS.labels("promoted").inc()
        logger().info("promoted", policy=policy, version=version, previous=control, reason=reason, **evidence)

    async def roll_back(
        self, c: Connection, version: Deployment, verdict: RollBack, *, detail: str | None = None
    ) -> None:
        """Its runs go to the best version; if it was that itself, to the one promoted before it."""
        policy, name = version.policy, version.version
        line = await self._store.line(c, policy)
        heir = line.previous if line.best and line.best.version == name else None
        back_to = heir or line.best
        told = f"{verdict.reason}: {detail}" if detail else verdict.reason
        evidence = self.summary(verdict.evidence)
        control = back_to.version if back_to else None
        await self._store.decide(c, policy, name, "rolled_back", told, evidence=evidence, control=control)
        if heir is not None:
            why = f"rollback of {name}"
            await self._store.decide(c, policy, heir.version, "promoted", why, control=name)
            await self._store.measure_against(c, policy, heir.version)
        await self._hold_child(c, policy)
        if verdict.quarantines:
            await self._store.quarantine(c, policy, name, told)
        await self._store.put_incident(c, policy, name, "rolled_back", {"reason": told, **evidence})
        await self.route(c, policy)
        self._log(f"rolled back, {verdict.reason}", version, back_to=control, **evidence)

    async def hold(self, c: Connection, line: Line, version: Deployment, why: str) -> None:
        """Take a version out that nothing is known against but its parent; an operator's deploy lets it answer."""
        told = f"held: {why}; `ratchet deploy {version.version}` lets it answer"
        control = line.best.version if line.best else None
        await self._store.decide(c, version.policy, version.version, "held", told, control=control)
        await self._store.put_incident(c, version.policy, version.version, "held", {"reason": why})
        self._log("held", version, reason=why)

    async def _hold_child(self, c: Connection, policy: str) -> None:
        """The candidate, where the version it was trained from has just fallen."""
        line = await self._store.line(c, policy)
        if line.candidate and (why := line.why_held(line.candidate)):
            await self.hold(c, line, line.candidate, why)

    async def route(self, c: Connection, policy: str) -> None:
        """Write the next document where the line asks for another one."""
        last = await self._store.newest_document(policy, c)
        document = next_document(
            last,
            await self._store.line(c, policy),
            shares=self._shares,
            quarantined=await self._store.quarantined(c, policy),
            target_of=self._target_of,
            now=datetime.now(UTC),
            window_s=self._settings.window_s,
            salt=last.salt if last else secrets.token_hex(8),
        )
        if document == last:
            return
        await self._store.put_document(c, document)
        plan = document.plans[-1]
        deadline = timedelta(seconds=self._settings.trial_s)
        shares = {arm.version: arm.share for arm in plan.arms}
        await self._store.set_route(c, policy, shares, plan.effective_from, plan.effective_from + deadline)

    def summary(self, evidence: Interval | None) -> dict[str, Any]:
        return verdict_domain.summary(evidence, self._settings.alpha)

    def _log(self, verdict: str, version: Deployment, **more: Any) -> None:
        VERDICTS.labels(verdict).inc()
        logger().info("verdict", policy=version.policy, version=version.version, verdict=verdict, **more)

    async def refuse(self, c: Connection, line: Line, version: Deployment, reason: str) -> None:
        control = line.best.version if line.best else None
        told = f"refused: {reason}"
        await self._store.decide(c, version.policy, version.version, "refused", told, control=control)
        await self._store.put_incident(c, version.policy, version.version, "refused", {"reason": reason})
        self._log("refused", version, reason=reason)
