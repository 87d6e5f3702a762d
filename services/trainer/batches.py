"""Readiness and claiming: what the rules say of the groups at hand, and the batch that comes of it."""

from __future__ import annotations

import hashlib
from collections import Counter as Counts
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from prometheus_client import Counter
from ratchet_sdk.events import uuid7

from services.trainer.domain import (
    ByGradient,
    ByImitation,
    Empty,
    Gate,
    Judged,
    Method,
    Never,
    NotYet,
    Plan,
    Ready,
    ScoredGroup,
    Terms,
    Wait,
    carries,
    drop_out,
    holds,
    plan,
)
from services.trainer.readiness_domain import Conditions, cools_until, held_to
from services.trainer.reading_domain import Reading
from services.trainer.readings import Readings
from services.trainer.recipes import Recipes
from services.trainer.store import Store
from services.trainer.training import recipe_of
from shared.database import UNAVAILABLE, Record
from shared.errors import GiveUpError, RetryLaterError
from shared.telemetry import logger

NOT_READ = "it is not read yet"


POLICY_FAILED = Counter("ratchet_trainer_policies_failed_total", "Times that a policy's batch could not be planned")


@dataclass(frozen=True)
class Wanted:
    """What a batch is asked to be. Set by the settings, or for one batch by an operator."""

    max_lag: int
    imitation_min_reward: float
    min_groups: int
    min_agents: int
    max_groups: int
    recipes: Recipes
    conditions: Conditions = field(default_factory=Conditions)
    min_quality: float = 0.0
    iterations: int | None = None
    dropout: float = 0.0
    lookback_windows: int | None = None
    trust_agent_tokens: bool = False
    force: bool = False
    windows: Sequence[str] = ()
    groups: Sequence[str] = ()

    def terms(
        self, parent: str, numbers: Mapping[str, int], quarantined: Mapping[str, str], endpoints: frozenset[str]
    ) -> Terms:
        return Terms(
            parent,
            numbers,
            self.max_lag,
            self.imitation_min_reward,
            self.min_groups,
            self.min_agents,
            quarantined,
            self.trust_agent_tokens,
            self.min_quality,
            endpoints,
        )


@dataclass(frozen=True)
class Readiness:
    """``missing`` says in words what a batch still needs; empty where it is ready.

    ``carried`` counts the runs at hand by label, of those that can be trained on; ``left_out`` the others by reason.
    """

    missing: tuple[str, ...]
    groups: int
    trajectories: int
    parent: str | None
    carried: Mapping[str, int]
    left_out: Mapping[str, int]


class Batches:
    def __init__(self, store: Store, readings: Readings, wanted: Wanted, *, retry_s: float) -> None:
        self._store = store
        self._readings = readings
        self._wanted = wanted
        self._retry_s = retry_s
        self._seen: dict[str, str] = {}  # policy -> what was last found wanting; only saves looking again

    async def claim_ready(self) -> list[str]:
        """Claim a batch for every policy that is ready for one; the ids of those that were made.

        A policy whose plan fails is looked at again when something of it has changed; the others are not held up.
        """
        made = []
        for gate in await self._store.gates():
            if holds(gate) or await self._rests(gate.policy) or await self._cools_until(gate.policy):
                continue
            try:
                made.append(await self._claim_if_new(gate))
            except (RetryLaterError, *UNAVAILABLE):
                self._seen.pop(gate.policy, None)  # nothing of it was found wanting
                raise
            except Exception as error:
                POLICY_FAILED.inc()
                logger().exception("policy_failed", policy=gate.policy, error=str(error))
        return [batch_id for batch_id in made if batch_id is not None]

    async def _rests(self, policy: str) -> bool:
        failures = await self._store.failures(policy)
        return failures is not None and datetime.now(UTC) < failures.again_at(self._retry_s)

    async def _cools_until(self, policy: str) -> datetime | None:
        last = await self._store.last_trained(policy)
        return cools_until(last, datetime.now(UTC), self._wanted.conditions.cool_down_s)

    async def _claim_if_new(self, gate: Gate) -> str | None:
        rows, judged = await self._judged(gate.policy, self._wanted)
        quarantined = await self._store.quarantined(gate.policy)
        facts = (gate.parent, quarantined, [tuple(row) for row in rows], [tuple(row) for row in judged])
        looked_at = hashlib.sha256(repr(facts).encode()).hexdigest()
        if len(rows) < self._wanted.min_groups or self._seen.get(gate.policy) == looked_at:
            return None
        self._seen[gate.policy] = looked_at
        batch_id, _ = await self.claim(gate, self._wanted)
        return batch_id

    async def claim_now(
        self,
        policy: str,
        *,
        min_agents: int | None = None,
        iterations: int | None = None,
        dropout: float | None = None,
        lookback_windows: int | None = None,
        force: bool = False,
        windows: Sequence[str] = (),
        groups: Sequence[str] = (),
    ) -> tuple[str | None, tuple[str, ...]]:
        """An operator's wish: one group is enough, the gate holds nevertheless. (batch id, None) or (None, why not).

        ``windows`` and ``groups``, where given, are all that it is made of. With ``force`` one agent is enough, and a
        version on trial is no hindrance; a batch that is being trained always is.
        """
        gate = await self._gate(policy)
        if force:
            gate = replace(gate, undecided=None, untried=None)
        if reasons := holds(gate):
            return None, tuple(reasons)
        wanted = replace(
            self._wanted,
            min_groups=1,
            min_agents=min_agents or (1 if force else self._wanted.min_agents),
            dropout=dropout or 0.0,
            lookback_windows=lookback_windows,
            conditions=self._wanted.conditions.at_an_operators_wish(),
            iterations=iterations,
            force=force,
            windows=tuple(windows),
            groups=tuple(groups),
        )
        await self._readings.sweep()
        if lacking := await self._lacking(policy, wanted):
            return None, lacking
        return await self.claim(gate, wanted)

    async def _lacking(self, policy: str, wanted: Wanted) -> tuple[str, ...]:
        """What of the windows and groups that were asked for cannot be had, in words."""
        rows, _ = await self._judged(policy, wanted)
        windows, groups = {row["window_id"] for row in rows}, {row["group_id"] for row in rows}
        why = "nothing of it is scored for this policy, or a batch holds it already"
        return (
            *(f"window {window}: {why}" for window in wanted.windows if window not in windows),
            *(f"group {group}: {why}" for group in wanted.groups if group not in groups),
        )

    async def claim(self, gate: Gate, wanted: Wanted) -> tuple[str | None, tuple[str, ...]]:
        """Keep the batch that the rules make of the groups at hand; (None, why not) where they make none."""
        batch_id = f"batch-{uuid7()}"
        match found := await self._plan(gate, wanted, batch_id):
            case Wait(missing):
                return None, missing
            case Ready(method, entries):
                entries = drop_out(entries, wanted.dropout, batch_id)
            case Empty(entries):
                method = "grpo"
        kept = await self._store.claim(
            batch_id,
            gate.policy,
            gate.parent or "",
            method,
            entries,
            self._config(batch_id, gate.policy, method, wanted),
            empty=isinstance(found, Empty),
            force=wanted.force,
        )
        if not kept:
            return None, ("another trainer was faster",)
        logger().info(
            "batch_empty" if isinstance(found, Empty) else "batch_claimed",
            policy=gate.policy,
            batch=batch_id,
            method=method,
            parent=gate.parent,
            runs=sum(entry.left_out is None for entry in entries),
            left_out=sum(entry.left_out is not None for entry in entries),
        )
        return (None, tuple(_missing(found))) if isinstance(found, Empty) else (batch_id, ())

    async def readiness(self, policy: str) -> Readiness:
        """What the next batch would be made of, and what is missing for it; no run's body is read."""
        gate = await self._gate(policy)
        groups, unread = await self._groups(policy, self._wanted)
        missing = holds(gate)
        carried: Counts[str] = Counts()
        left_out: Counts[str] = Counts({NOT_READ: unread} if unread else {})
        if gate.parent is not None:
            terms = await self._terms(gate, self._wanted)
            missing += _missing(held_to(plan(groups, terms), groups, self._wanted.conditions, policy))
            for verdict in (carries(member, group, terms) for group in groups for member in group.members):
                match verdict:
                    case ByGradient(label) | ByImitation(label):
                        carried[label] += 1
                    case NotYet(_, reason) | Never(_, reason):
                        left_out[reason] += 1
        if await self._rests(policy) and (failures := await self._store.failures(policy)):
            again = failures.again_at(self._retry_s)
            missing.append(f"{failures.batch_id} failed ({failures.reason}); the next is made at {again:%H:%M:%S} UTC")
        if rested := await self._cools_until(policy):
            missing.append(f"the last batch has just been trained; the next is made at {rested:%H:%M:%S} UTC")
        runs = sum(len(group.members) for group in groups) + unread
        return Readiness(tuple(missing), len(groups), runs, gate.parent, carried, dict(left_out.most_common(20)))

    # inside -----------------------------------------------------------------------------------------
    async def _gate(self, policy: str) -> Gate:
        gates = await self._store.gates(policy)
        if not gates:
            raise GiveUpError(
                f"policy {policy} has no base model; bring one with `ratchet base register`, name one that answers"
                " elsewhere with `ratchet base endpoint`, or make one with `ratchet base create`"
            )
        return gates[0]

    async def _plan(self, gate: Gate, wanted: Wanted, seed: str) -> Plan:
        if gate.parent is None:
            return Wait(tuple(holds(gate)))
        groups, _ = await self._groups(gate.policy, wanted)
        return held_to(plan(groups, await self._terms(gate, wanted)), groups, wanted.conditions, seed)

    async def _terms(self, gate: Gate, wanted: Wanted) -> Terms:
        numbers = await self._store.version_numbers(gate.policy)
        quarantined = await self._store.quarantined(gate.policy)
        return wanted.terms(gate.parent or "", numbers, quarantined, await self._store.endpoints(gate.policy))

    async def _judged(self, policy: str, wanted: Wanted) -> tuple[list[Record], list[Record]]:
        rows = await self._store.unused_groups(
            policy, wanted.max_groups, wanted.lookback_windows, windows=wanted.windows, groups=wanted.groups
        )
        return rows, await self._store.judged([row["group_id"] for row in rows])

    async def _groups(self, policy: str, wanted: Wanted) -> tuple[list[ScoredGroup], int]:
        """Groups whose runs were all read, and the number of runs in the others."""
        rows, judged = await self._judged(policy, wanted)
        by_group = {name: list(found) for name, found in groupby(judged, key=lambda row: row["group_id"])}
        groups, unread = [], 0
        for row in rows:
            found = by_group.get(row["group_id"], [])
            if all(one["read"] or one["barred"] for one in found):
                members = tuple(_member(one) for one in found)
                groups.append(ScoredGroup(**row, members=members))
            else:
                unread += len(found)
        return [group for group in groups if group.members], unread

    def _config(self, batch_id: str, policy: str, method: Method, wanted: Wanted) -> dict[str, Any]:
        numbers = wanted.recipes.of(policy, method)
        if wanted.iterations is not None:
            numbers["steps"] = wanted.iterations
        return {
            "recipe": recipe_of(batch_id, numbers),
            "max_lag": wanted.max_lag,
            "imitation_min_reward": wanted.imitation_min_reward,
            "min_groups": wanted.min_groups,
            "min_agents": wanted.min_agents,
            "min_quality": wanted.min_quality,
            **asdict(wanted.conditions),
            "dropout": wanted.dropout,
            "lookback_windows": wanted.lookback_windows,
        }


def _member(row: Record) -> Judged:
    facts = Reading(
        frozenset(row["versions"] or ()),
        bool(row["has_tokens"]),
        bool(row["witnessed"]),
        row["no_gradient"],
        row["no_imitation"],
    )
    return Judged(row["agent_id"], row["trajectory_id"], row["score"], row["reward"], facts, row["barred"])


def _missing(found: Plan) -> list[str]:
    match found:
        case Wait(reasons):
            return list(reasons)
        case Empty(entries):
            counts = Counts(entry.left_out for entry in entries).most_common(3)
            return [f"none of the runs can be trained on: {'; '.join(f'{why} ({n})' for why, n in counts)}"]
        case Ready():
            return []
