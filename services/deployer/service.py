"""Use cases of the deployer: a version from trained to promoted, rolled back or refused."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from prometheus_client import Counter

from services.deployer import domain
from services.deployer.domain import Deployment, Hold, Line, Promote, RollBack, Tally
from services.deployer.planning import Shares, next_document
from services.deployer.sequential import Interval
from services.deployer.settings import DeployerSettings
from services.deployer.store import Store
from shared.aside import Aside
from shared.database import Connection
from shared.delivery import Ack, Disposition, Retry
from shared.errors import GiveUpError
from shared.events import GatewayHealth, LoopEvent, ModelTrained, WindowResolved
from shared.routing import plan_at
from shared.telemetry import logger

VERDICTS = Counter("ratchet_deployer_verdicts_total", "Verdicts on versions, by what was decided and why", ["verdict"])


@dataclass(frozen=True)
class Verified:
    pass


@dataclass(frozen=True)
class Wrong:
    """The artifact is not what its name says, or something else answers for it."""

    reason: str


@dataclass(frozen=True)
class NotYet:
    """The endpoint does not answer for it: it may still start, or it may be broken."""

    reason: str


class Probe(Protocol):
    async def verify(self, sha256: str) -> Verified | Wrong | NotYet: ...


class Routes(Protocol):
    async def publish(self, policy: str) -> None:
        """The newest document of the policy, to all gateways."""


class Announcer(Protocol):
    async def announce(self, event: LoopEvent) -> None: ...


class Deployer:
    def __init__(
        self,
        store: Store,
        probe: Probe,
        routes: Routes,
        announcer: Announcer,
        settings: DeployerSettings,
        aside: Aside | None = None,
    ) -> None:
        self._store = store
        self._probe = probe
        self._routes = routes
        self._announcer = announcer
        self._settings = settings
        self._aside = aside or Aside("deployer")
        self._shares = Shares(settings.canary_share, settings.base_share, settings.anchor_share)

    # a new version ------------------------------------------------------------------------------
    async def trained(self, event: ModelTrained) -> Disposition:
        """The version waits for its verification in the table. Another undecided one goes first."""
        if await self._store.put_verifying(event):
            return Ack()
        if await self._store.artifact_of(event.policy, event.version) is None:
            raise GiveUpError(f"{event.policy} {event.version} was announced and is no row of models")
        return Retry(5.0)

    async def verify_due(self) -> None:
        """Verify every version that waits, each at its own pace."""
        alone = map(self._verify_alone, await self._store.verifying())
        for result in await asyncio.gather(*alone, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _verify_alone(self, waiting: Deployment) -> None:
        async with self._aside.row("verify version", f"{waiting.policy} {waiting.version}"):
            await self._verify(waiting)

    async def _verify(self, waiting: Deployment) -> None:
        outcome = await self._probe.verify(waiting.artifact_sha256)
        if isinstance(outcome, NotYet):
            if not domain.patience_is_over(waiting, datetime.now(UTC), self._settings.verify_patience_s):
                logger().debug(
                    "not_verified_yet", policy=waiting.policy, version=waiting.version, reason=outcome.reason
                )
                return
            outcome = Wrong(outcome.reason)
        async with self._store.policy(waiting.policy) as c:
            line = await self._store.line(c, waiting.policy)
            present = line.get(waiting.version)
            if present is None or present.state != "verifying":
                return
            match outcome:
                case Wrong(reason):
                    await self._refuse(c, line, present, reason)
                case Verified():
                    await self._admit(c, line, present)
        await self._publish(waiting.policy)

    async def _refuse(self, c: Connection, line: Line, version: Deployment, reason: str) -> None:
        control = line.best.version if line.best else None
        told = f"refused: {reason}"
        await self._store.decide(c, version.policy, version.version, "refused", told, control=control)
        await self._store.put_incident(c, version.policy, version.version, "refused", {"reason": reason})
        self._log("refused", version, reason=reason)

    async def _admit(self, c: Connection, line: Line, version: Deployment) -> None:
        """The first version answers at once; any later one is tried on its share from a coming window on."""
        if line.best is not None:
            await self._store.start_canary(c, version.policy, version.version, line.best.version)
            await self._route(c, version.policy)
            self._log("canary", version, control=line.best.version)
        elif version.method == "base":
            await self._promote(c, version.policy, version.version, "first version", {})
        else:
            await self._refuse(c, line, version, "no version is promoted that it could be measured against")

    # a window -----------------------------------------------------------------------------------
    async def resolved(self, event: WindowResolved) -> None:
        """Count the window's runs, compare versions, decide; one transaction a policy, the same when done twice."""
        for policy in await self._store.policies_of_window(event.window_id):
            async with self._store.policy(policy) as c:
                await self._measure(c, policy, event)
                decided = await self._judge(c, policy)
            if decided:
                await self._publish(policy)

    async def _measure(self, c: Connection, policy: str, event: WindowResolved) -> None:
        document = await self._store.document_at(c, policy, event.starts_at)
        if document is None:
            return
        runs = await self._store.runs(c, policy, event.window_id)
        worst = await self._store.worst_reward(c, policy, event.window_id)
        counted = domain.assignments(runs, document, event.starts_at, worst)
        await self._store.put_assignments(c, policy, event.window_id, counted)
        pairs = domain.pairs(plan_at(document, event.starts_at))
        found = [domain.compared(counted, version, control) for version, control in pairs]
        await self._store.put_evidence(c, policy, event.window_id, [one for one in found if one is not None])

    async def _judge(self, c: Connection, policy: str) -> bool:
        """Whether the candidate was decided."""
        candidate = (await self._store.line(c, policy)).candidate
        if candidate is None:
            return False
        settings = self._settings
        verdict = domain.decide(
            await self._store.differences(c, candidate),
            alpha=settings.alpha,
            min_windows=settings.min_windows,
            deadline_windows=settings.deadline_windows,
        )
        match verdict:
            case Promote(found):
                evidence = self._summary(found)
                await self._promote(c, policy, candidate.version, "its reward is higher", evidence)
            case RollBack():
                await self._roll_back(c, candidate, verdict)
            case Hold(found):
                await self._store.put_summary(c, policy, candidate.version, self._summary(found))
                return False
        return True

    async def healthy(self, report: GatewayHealth) -> None:
        """Add a gateway's report to the tally of the candidate it concerns; roll that back if it is broken."""
        candidate = await self._store.undecided(report.policy)
        if candidate is None or report.version not in (candidate.version, candidate.control):
            return
        async with self._store.policy(report.policy) as c:
            candidate = (await self._store.line(c, report.policy)).candidate
            if candidate is None or report.version not in (candidate.version, candidate.control):
                return
            tally = Tally(**candidate.evidence.get("health", {}))
            tally = tally.plus(report, control=report.version == candidate.control)
            if not tally.broken:
                kept = Tally() if tally.due else tally
                await self._store.put_summary(c, report.policy, candidate.version, {"health": vars(kept)})
                return
            await self._store.put_summary(c, report.policy, candidate.version, {"health": vars(tally)})
            await self._roll_back(c, candidate, RollBack("broken endpoint"))
        await self._publish(report.policy)

    # an operator --------------------------------------------------------------------------------
    async def deploy(self, policy: str, version: str, reason: str | None) -> dict[str, Any]:
        """Promote by hand, at once. Raises GiveUpError for a version that is unknown or does not answer."""
        sha256 = await self._store.artifact_of(policy, version)
        if sha256 is None:
            raise GiveUpError(f"policy {policy} has no version {version}; `ratchet models` lists them")
        outcome = await self._probe.verify(sha256)
        if not isinstance(outcome, Verified):
            raise GiveUpError(f"{version} was not deployed: {outcome.reason}")
        async with self._store.policy(policy) as c:
            former = (await self._store.line(c, policy)).best
            if former is None or former.version != version:
                await self._promote(c, policy, version, f"operator: {reason}" if reason else "operator", {})
        await self._publish(policy)
        return {"policy": policy, "version": version, "previous": former.version if former else None}

    async def rollback(self, policy: str, version: str | None, reason: str | None) -> dict[str, Any]:
        """Take a version (the promoted one by default) out, at once. Raises GiveUpError where nothing is left."""
        async with self._store.policy(policy) as c:
            line = await self._store.line(c, policy)
            if line.best is None:
                raise GiveUpError(f"policy {policy} has no promoted version to roll back")
            taken = line.get(version) if version else line.best
            if taken is None:
                raise GiveUpError(f"policy {policy} has not deployed {version}; `ratchet models` lists its versions")
            back_to = line.previous if taken.version == line.best.version else line.best
            if back_to is None:
                raise GiveUpError(f"{taken.version} is the first version of {policy}: there is none to go back to")
            if taken.state not in ("rolled_back", "refused"):
                await self._roll_back(c, taken, RollBack("operator"), detail=reason)
        await self._publish(policy)
        return {"policy": policy, "version": taken.version, "back_to": back_to.version}

    # decisions, inside a transaction ------------------------------------------------------------
    async def _promote(self, c: Connection, policy: str, version: str, reason: str, evidence: dict[str, Any]) -> None:
        former = (await self._store.line(c, policy)).best
        await self._store.supersede(c, policy)
        control = former.version if former else None
        await self._store.decide(c, policy, version, "promoted", reason, evidence=evidence, control=control)
        await self._store.lift_quarantine(c, policy, version)
        await self._store.measure_against(c, policy, version)
        await self._route(c, policy)
        VERDICTS.labels("promoted").inc()
        logger().info("promoted", policy=policy, version=version, previous=control, reason=reason, **evidence)

    async def _roll_back(
        self, c: Connection, version: Deployment, verdict: RollBack, *, detail: str | None = None
    ) -> None:
        """Its runs go to the best version; if it was that itself, to the one promoted before it."""
        policy, name = version.policy, version.version
        line = await self._store.line(c, policy)
        heir = line.previous if line.best and line.best.version == name else None
        back_to = heir or line.best
        told = f"{verdict.reason}: {detail}" if detail else verdict.reason
        evidence = self._summary(verdict.evidence)
        control = back_to.version if back_to else None
        await self._store.decide(c, policy, name, "rolled_back", told, evidence=evidence, control=control)
        if heir is not None:
            why = f"rollback of {name}"
            await self._store.decide(c, policy, heir.version, "promoted", why, control=name)
            await self._store.measure_against(c, policy, heir.version)
        if verdict.quarantines:
            await self._store.quarantine(c, policy, name, told)
        await self._store.put_incident(c, policy, name, "rolled_back", {"reason": told, **evidence})
        await self._route(c, policy)
        self._log(f"rolled back, {verdict.reason}", version, back_to=control, **evidence)

    async def _route(self, c: Connection, policy: str) -> None:
        """Write the next document where the line asks for another one."""
        last = await self._store.newest_document(policy, c)
        document = next_document(
            last,
            await self._store.line(c, policy),
            shares=self._shares,
            quarantined=await self._store.quarantined(c, policy),
            inference_url=self._settings.inference_url,
            now=datetime.now(UTC),
            window_s=self._settings.window_s,
            salt=last.salt if last else secrets.token_hex(8),
        )
        if document == last:
            return
        await self._store.put_document(c, document)
        plan = document.plans[-1]
        deadline = timedelta(seconds=self._settings.deadline_windows * self._settings.window_s)
        shares = {arm.version: arm.share for arm in plan.arms}
        await self._store.set_route(c, policy, shares, plan.effective_from, plan.effective_from + deadline)

    def _summary(self, evidence: Interval | None) -> dict[str, Any]:
        return domain.summary(evidence, self._settings.alpha)

    def _log(self, verdict: str, version: Deployment, **more: Any) -> None:
        VERDICTS.labels(verdict).inc()
        logger().info("verdict", policy=version.policy, version=version.version, verdict=verdict, **more)

    # after a commit -----------------------------------------------------------------------------
    async def _publish(self, policy: str) -> None:
        await self._routes.publish(policy)
        await self.announce_due()

    async def announce_due(self) -> None:
        rows = await self._store.unannounced()
        await self._aside.each("announce verdict", rows, lambda row: f"{row.policy} {row.version}", self._announce)

    async def _announce(self, row: Deployment) -> None:
        await self._announcer.announce(domain.announcement(row))
        await self._store.set_announced(row)

    async def sweep(self) -> None:
        """What a crash left behind: documents that no gateway has, or that name an old endpoint; silent verdicts."""
        await self._aside.each("route policy", await self._store.routed_policies(), str, self._renew)
        await self.announce_due()

    async def _renew(self, policy: str) -> None:
        async with self._store.policy(policy) as c:
            await self._route(c, policy)
        await self._routes.publish(policy)
