"""Readiness and claiming: what the rules say of the groups at hand, and the batch that comes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

from ratchet_sdk.events import uuid7

from services.trainer.domain import (
    Empty,
    Gate,
    Judged,
    Method,
    Plan,
    Ready,
    ScoredGroup,
    Terms,
    Wait,
    drop_out,
    holds,
    plan,
)
from services.trainer.records import records_of
from services.trainer.store import Store
from services.trainer.training import recipe_of
from shared.database import Record
from shared.errors import GiveUpError
from shared.telemetry import logger
from shared.trajectories import RunKey, Trajectory


class Runs(Protocol):
    async def load(self, keys: Sequence[RunKey]) -> dict[RunKey, Trajectory]:
        """Stored runs by key, put together from their events; what was forgotten is absent."""


@dataclass(frozen=True)
class Wanted:
    """What a batch is asked to be. Set by the settings, or for one batch by an operator."""

    max_lag: int
    imitation_min_reward: float
    min_groups: int
    min_agents: int
    max_groups: int
    numbers: Mapping[str, Any]  # of the recipe, without its seed
    imitation_minibatch: int
    dropout: float = 0.0
    lookback_windows: int | None = None

    def terms(self, parent: str, numbers: Mapping[str, int]) -> Terms:
        return Terms(parent, numbers, self.max_lag, self.imitation_min_reward, self.min_groups, self.min_agents)


@dataclass(frozen=True)
class Readiness:
    """``missing`` says in words what a batch still needs; empty where it is ready."""

    missing: tuple[str, ...]
    groups: int
    trajectories: int
    parent: str | None


class Batches:
    def __init__(self, store: Store, runs: Runs, wanted: Wanted) -> None:
        self._store = store
        self._runs = runs
        self._wanted = wanted
        self._seen: dict[str, str] = {}  # policy -> what was last found wanting; only saves looking again

    async def claim_ready(self) -> list[str]:
        """Claim a batch for every policy that is ready for one; the ids of those that were made."""
        gates = [gate for gate in await self._store.gates() if not holds(gate)]
        made = [await self._claim_if_new(gate) for gate in gates]
        return [batch_id for batch_id in made if batch_id is not None]

    async def _claim_if_new(self, gate: Gate) -> str | None:
        rows, judged = await self._judged(gate.policy, self._wanted)
        facts = (gate.parent, [tuple(row) for row in rows], [tuple(row) for row in judged])
        looked_at = hashlib.sha256(repr(facts).encode()).hexdigest()
        if len(rows) < self._wanted.min_groups or self._seen.get(gate.policy) == looked_at:
            return None
        batch_id, _ = await self.claim(gate, self._wanted)
        self._seen[gate.policy] = looked_at
        return batch_id

    async def claim_now(
        self,
        policy: str,
        *,
        min_agents: int | None = None,
        iterations: int | None = None,
        dropout: float | None = None,
        lookback_windows: int | None = None,
    ) -> tuple[str | None, tuple[str, ...]]:
        """An operator's wish: one group is enough, the gate holds nevertheless. (batch id, None) or (None, why not)."""
        gate = await self._gate(policy)
        if reasons := holds(gate):
            return None, tuple(reasons)
        wanted = replace(
            self._wanted,
            min_groups=1,
            min_agents=self._wanted.min_agents if min_agents is None else min_agents,
            dropout=dropout or 0.0,
            lookback_windows=lookback_windows,
            numbers={**self._wanted.numbers, **({"steps": iterations} if iterations else {})},
        )
        return await self.claim(gate, wanted)

    async def claim(self, gate: Gate, wanted: Wanted) -> tuple[str | None, tuple[str, ...]]:
        """Keep the batch that the rules make of the groups at hand; (None, why not) where they make none."""
        batch_id = f"batch-{uuid7()}"
        match found := await self._plan(gate, wanted):
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
            self._config(batch_id, method, wanted),
            empty=isinstance(found, Empty),
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
        return (None, ("none of the runs can be trained on",)) if isinstance(found, Empty) else (batch_id, ())

    async def readiness(self, policy: str) -> Readiness:
        """What the next batch would be made of, and what is missing for it."""
        gate = await self._gate(policy)
        groups = await self._groups(policy, self._wanted)
        runs = sum(len(group.members) for group in groups)
        missing = holds(gate)
        if gate.parent is not None:
            terms = self._wanted.terms(gate.parent, await self._store.version_numbers(policy))
            match plan(groups, terms):
                case Wait(reasons):
                    missing += reasons
                case Empty():
                    missing.append("none of the runs can be trained on")
                case Ready():
                    pass
        return Readiness(tuple(missing), len(groups), runs, gate.parent)

    # inside -----------------------------------------------------------------------------------------
    async def _gate(self, policy: str) -> Gate:
        gates = await self._store.gates(policy)
        if not gates:
            raise GiveUpError(f"policy {policy} has no base model; make one with `ratchet base create`")
        return gates[0]

    async def _plan(self, gate: Gate, wanted: Wanted) -> Plan:
        if gate.parent is None:
            return Wait(tuple(holds(gate)))
        numbers = await self._store.version_numbers(gate.policy)
        return plan(await self._groups(gate.policy, wanted), wanted.terms(gate.parent, numbers))

    async def _judged(self, policy: str, wanted: Wanted) -> tuple[list[Record], list[Record]]:
        rows = await self._store.unused_groups(policy, wanted.max_groups, wanted.lookback_windows)
        return rows, await self._store.judged([row["group_id"] for row in rows])

    async def _groups(self, policy: str, wanted: Wanted) -> list[ScoredGroup]:
        rows, judged = await self._judged(policy, wanted)
        keys = [(row["agent_id"], row["trajectory_id"]) for row in judged]
        calls = {key: records_of(run) for key, run in (await self._runs.load(keys)).items()}
        members = {
            group_id: tuple(
                Judged(row["agent_id"], row["trajectory_id"], row["score"], row["reward"], calls.get(key, ()))
                for row in found
                for key in [(row["agent_id"], row["trajectory_id"])]
            )
            for group_id, found in groupby(judged, key=lambda row: row["group_id"])
        }
        return [
            ScoredGroup(row["group_id"], row["revision"], row["homogeneous"], members[row["group_id"]])
            for row in rows
            if row["group_id"] in members
        ]

    def _config(self, batch_id: str, method: Method, wanted: Wanted) -> dict[str, Any]:
        numbers = dict(wanted.numbers)
        if method == "imitation":
            numbers["minibatch"] = wanted.imitation_minibatch
        return {
            "recipe": recipe_of(batch_id, numbers),
            "max_lag": wanted.max_lag,
            "imitation_min_reward": wanted.imitation_min_reward,
            "min_groups": wanted.min_groups,
            "min_agents": wanted.min_agents,
            "dropout": wanted.dropout,
            "lookback_windows": wanted.lookback_windows,
        }
