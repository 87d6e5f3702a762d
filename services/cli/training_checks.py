"""What doctor says of training: of each policy whether its runs teach, and whether its newest batches failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from services.cli import store, training
from services.cli.checks import Finding

if TYPE_CHECKING:
    from shared.bus import Bus
    from shared.database import Pool

# What the trainer's reasons speak of, and what changes it; the other reasons say that themselves.
MENDS = {
    "max_lag": "RATCHET_MAX_LAG, or a shorter RATCHET_WINDOW_S: versions come faster than runs are judged",
    "reward of record": "RATCHET_IMITATION_MIN_REWARD, or publish the reward of each run",
    "start alike": "give runs of one task the same scenario_id and the same first prompt",
    "token ids": "let the gateway call a server that gives token ids: RATCHET_INFERENCE_URL",
    "did not see": "route the agents through the gateway, or set RATCHET_TRUST_AGENT_TOKENS",
    "sampled with": "send the sampling that the reason names",
    "not read yet": "look again in a moment: the trainer is reading them",
}


async def policies(bus: Bus | None, pool: Pool) -> list[Finding]:
    """One finding a policy. Without a trainer it goes by what is stored."""
    from services.admin.service import readiness, unknown_readiness
    from services.admin.store import Store
    from shared.errors import RetryLaterError

    failures = {row["policy"]: row for row in await store.failed_batches(pool, None)}
    found = []
    for policy in await Store(pool).policies():
        away = unknown_readiness(policy, RetryLaterError("the broker is away"))
        told = await readiness(bus, policy) if bus else away
        found.append(verdict(await training.with_reasons(pool, told), failures.get(policy)))
    nothing = Finding("training", "warn", "no policy has a version or runs", "`ratchet base create` makes a version")
    return found or [nothing]


def verdict(told: dict[str, Any], failure: store.Row | None) -> Finding:
    """Fails where the newest batches failed; warns where most judged runs carry nothing, or one agent is too few."""
    policy, why = told["policy"], training.left_out(told)
    if failure is not None and failure["in_a_row"]:
        mend = "mend what the reason says: the trainer tries again by itself; `ratchet batches` has them all"
        return Finding("training", "fail", f"{policy}: {training.failed(failure)}", mend)
    if told["ready"] is None:
        detail = "; ".join(filter(None, [f"{policy}: {told['fault']}", why]))
        mend = "`ratchet up` runs a trainer, `ratchet base create` makes the version to start from"
        return Finding("training", "warn", detail, mend_of(why) if why else mend)
    have = f"{policy}: {told.get('groups', 0)} groups, {told.get('trajectories', 0)} runs"
    if told["ready"]:
        return Finding("training", "ok", f"{have}, ready to train on")
    said = "; ".join([have, *told.get("missing", []), *([why] if why else [])])
    few = any(missing.endswith(" agents") for missing in told.get("missing", []))
    if few or sum(told.get("left_out", {}).values()) > sum(told.get("carried", {}).values()):
        return Finding("training", "warn", said, "RATCHET_MIN_AGENTS" if few else mend_of(why or ""))
    return Finding("training", "ok", said)


def mend_of(why: str) -> str:
    """What changes the reason that comes first, the commonest."""
    first = min((word for word in MENDS if word in why), key=why.index, default=None)
    return MENDS[first] if first else "change what the reason says"
