"""Use cases of the deployer: a version from trained to promoted, rolled back, refused or held."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

from prometheus_client import Gauge

from services.deployer import domain, planning, verdict_domain
from services.deployer.deciding import Deciding
from services.deployer.domain import Deployment, Line, Tally, Version
from services.deployer.sequential import Interval
from services.deployer.serving.serving import NotYet, Outcome, Verified, Wrong
from services.deployer.settings import DeployerSettings
from services.deployer.store import Store
from services.deployer.verdict_domain import Hold, Promote, RollBack
from shared.aside import Aside
from shared.database import Connection
from shared.delivery import Ack, Disposition, Retry
from shared.errors import GiveUpError, RetryLaterError
from shared.events import GatewayHealth, LoopEvent, ModelTrained, WindowResolved
from shared.routing import Target, plan_at
from shared.telemetry import logger

VERIFY_FACTOR = 2  # of verify_timeout_s: the files are hashed before the call
MISMATCH = Gauge(
    "ratchet_deployer_logprob_mismatch", "Nats a token between server and trainer, of the newest version", ["policy"]
)
TOLERANCE = Gauge("ratchet_deployer_logprob_tolerance", "Nats a token that they may differ by; beyond it is refused")
UNLOADED = Gauge(
    "ratchet_deployer_unloaded", "Versions that their server should hold, or let go of, and does not", ["policy"]
)


class Servings(Protocol):
    """The places that versions answer at, each asked about its own."""

    def target(self, version: Version) -> Target: ...

    async def verify(self, version: Version) -> Outcome: ...

    async def keep(self, known: Sequence[Version], used: Callable[[Version], bool]) -> list[str]: ...


class Routes(Protocol):
    async def publish(self, policy: str) -> None:
        """The newest document of the policy, to all gateways."""


class Announcer(Protocol):
    async def announce(self, event: LoopEvent) -> None: ...


class Deployer:
    def __init__(
        self,
        store: Store,
        servings: Servings,
        routes: Routes,
        announcer: Announcer,
        settings: DeployerSettings,
        aside: Aside | None = None,
    ) -> None:
        self._store = store
        self._servings = servings
        self._routes = routes
        self._announcer = announcer
        self._settings = settings
        self._aside = aside or Aside("deployer")
        self._deciding = Deciding(store, servings.target, settings)
        self._lacking: dict[str, list[str]] = {}

    # a new version ------------------------------------------------------------------------------
    async def trained(self, event: ModelTrained) -> Disposition:
        """The version waits for its verification in the table. Another undecided one goes first."""
        if await self._store.put_verifying(event, self._settings.verify_patience_s):
            return Ack()
        if await self._store.registered(event.policy, event.version) is None:
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

    async def end_overdue(self) -> None:
        """End each trial whose time is over, with what was lacking for a verdict; no event needs to come for that."""
        await self._aside.each("end trial", await self._store.overdue(), str, self._look_at)

    async def _look_at(self, policy: str) -> None:
        async with self._store.policy(policy) as c:
            decided = await self._judge(c, policy)
        if decided:
            await self._publish(policy)

    async def _verified(self, version: Version) -> Outcome:
        """What its place says of a version; one that breaks or hangs is an endpoint that does not answer."""
        limit_s = VERIFY_FACTOR * self._settings.verify_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._servings.verify(version)
        except GiveUpError as error:
            return Wrong(str(error))
        except TimeoutError:
            return NotYet(f"its verification took over {limit_s:g} s")
        except Exception as error:
            logger().exception("verification_failed", policy=version.policy, version=version.version)
            return NotYet(f"its verification failed: {type(error).__name__}")

    async def _verify(self, waiting: Deployment) -> None:
        outcome = await self._verified(waiting)
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
            await self._keep_verification(c, present, outcome)
            match outcome:
                case Wrong(reason):
                    await self._deciding.refuse(c, line, present, reason)
                case Verified():
                    await self._admit(c, line, present)
        await self._publish(waiting.policy)

    async def _keep_verification(self, c: Connection, version: Version, outcome: Verified | Wrong) -> None:
        told = outcome.told if isinstance(outcome, Verified) else outcome.reason
        await self._store.put_verification(c, version.policy, version.version, outcome.mismatch, told)

    async def _admit(self, c: Connection, line: Line, version: Deployment) -> None:
        """The first version answers at once; any later one is tried on its share from a coming window on.

        One whose parent fell meanwhile is held: what it learned from is not to be tried on anybody.
        """
        if why := line.why_held(version):
            await self._deciding.hold(c, line, version, why)
        elif line.best is not None:
            await self._deciding.try_out(c, version, line.best.version)
        elif version.method == "base":
            await self._deciding.promote(c, version.policy, version.version, "first version", {})
        else:
            await self._deciding.refuse(c, line, version, "no version is promoted that it could be measured against")

    # a window -----------------------------------------------------------------------------------
    async def resolved(self, event: WindowResolved) -> None:
        """Count the window's runs, compare versions, decide; one transaction a policy, the same when done twice.

        Raises RetryLaterError where a policy could not be counted, after all others are.
        """
        policies = await self._store.policies_of_window(event.window_id)
        counted = await self._aside.each(
            "count window", policies, lambda policy: f"{policy} {event.window_id}", partial(self._count, event)
        )
        if missing := len(policies) - len(counted):
            raise RetryLaterError(
                f"{missing} of {len(policies)} policies of window {event.window_id} are not counted; "
                "`ratchet doctor` has the reasons"
            )

    async def _count(self, event: WindowResolved, policy: str) -> None:
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
        over = candidate.deadline_at is not None and candidate.deadline_at <= datetime.now(UTC)
        verdict = verdict_domain.decide(
            await self._store.differences(c, candidate),
            alpha=settings.alpha,
            min_windows=settings.min_windows,
            deadline_windows=settings.deadline_windows,
            over=over,
        )
        match verdict:
            case Promote(found):
                evidence = self._deciding.summary(found)
                await self._deciding.promote(c, policy, candidate.version, "its reward is higher", evidence)
            case RollBack("deadline", Interval(n=n)) if n < settings.deadline_windows:
                detail = verdict_domain.lacking(await self._store.met(c, candidate), n)
                await self._deciding.roll_back(c, candidate, verdict, detail=detail)
            case RollBack():
                await self._deciding.roll_back(c, candidate, verdict)
            case Hold(found):
                await self._store.put_summary(c, policy, candidate.version, self._deciding.summary(found))
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
            await self._deciding.roll_back(c, candidate, RollBack("broken endpoint"))
        await self._publish(report.policy)

    # an operator --------------------------------------------------------------------------------
    async def deploy(self, policy: str, version: str, reason: str | None) -> dict[str, Any]:
        """Promote by hand, at once. Raises GiveUpError for a version that is unknown or does not answer."""
        registered = await self._store.registered(policy, version)
        if registered is None:
            raise GiveUpError(f"policy {policy} has no version {version}; `ratchet models` lists them")
        outcome = await self._verified(registered)
        if not isinstance(outcome, Verified):
            raise GiveUpError(f"{version} was not deployed: {outcome.reason}")
        async with self._store.policy(policy) as c:
            former = (await self._store.line(c, policy)).best
            if former is None or former.version != version:
                await self._deciding.promote(c, policy, version, f"operator: {reason}" if reason else "operator", {})
            await self._keep_verification(c, registered, outcome)
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
                await self._deciding.roll_back(c, taken, RollBack("operator"), detail=reason)
        await self._publish(policy)
        return {"policy": policy, "version": taken.version, "back_to": back_to.version}

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
        TOLERANCE.set(self._settings.logprob_tolerance)
        for policy, mismatch in (await self._store.mismatches()).items():
            MISMATCH.labels(policy).set(mismatch)

    async def keep_served(self) -> None:
        """What may be asked is loaded where it answers, also after that server began anew; what may not is unloaded."""
        await self._aside.each("serve policy", await self._store.routed_policies(), str, self._keep_served)

    async def _keep_served(self, policy: str) -> None:
        document = await self._store.newest_document(policy)
        if document is None:
            return
        asked = planning.in_use(document, datetime.now(UTC), self._settings.keep_loaded_s)
        line = await self._store.line(None, policy)
        waiting = {d.version for d in line.deployments if d.state == "verifying"}
        lacking = await self._servings.keep(line.deployments, lambda version: version.version in asked | waiting)
        if lacking and lacking != self._lacking.get(policy):
            logger().warning("not_served", policy=policy, reasons=lacking[:5])
        self._lacking[policy] = lacking
        UNLOADED.labels(policy).set(len(lacking))

    async def _renew(self, policy: str) -> None:
        async with self._store.policy(policy) as c:
            await self._deciding.route(c, policy)
        await self._routes.publish(policy)
