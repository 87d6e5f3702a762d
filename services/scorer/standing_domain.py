"""How a run stands in its group: judged, last whatever a judge would say, or left out. Pure.

What leaves training must not be a way out of a bad grade: a policy learns to break its own runs where that costs it
less than a bad one (Cursor saw its model emit broken tool calls). So a run is left out for what no policy can bring
about, and ranks last, unasked, for what one can.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from shared.trajectories import RunKey, Trajectory

UNREWARDED_IS_LAST = ("failed", "truncated")  # the policy's own failure: no reward is the worst reward
# How the SDK words the end of a run whose way to the model broke. A timeout is not among them: a policy may well have
# talked until its time was up, and such a run stays.
BROKEN_WAY = re.compile(
    r"(APIConnectionError|InternalServerError|RateLimitError|NatsError"
    r"|Connect(ion)?(Refused|Reset|Aborted)?Error|BrokenPipeError|RemoteProtocolError|ReadError|gaierror)\b"
)
Whose = Literal["world", "agent"]


@dataclass(frozen=True)
class Checks:
    """What a run's record holds. What the wire contract calls optional is not asked for, only that all fits together.

    ``steps_expected``: as its end said, or its last step says. ``unreadable``: calls whose reply the agent gave in no
    form that can be read; ``promptless``: replies to nothing, and calls that extend one that is not there.
    """

    steps: int
    steps_expected: int
    unreadable: int = 0
    promptless: int = 0


@dataclass(frozen=True)
class Run:
    """What is known of a run when its window is resolved. ``signature`` is None where its events are forgotten.

    ``broken`` says how infrastructure broke it.
    """

    agent_id: str
    trajectory_id: str
    policy: str
    scenario_id: str
    status: str
    late: bool
    called: bool
    rewarded: bool
    signature: str | None
    broken: str | None = None
    checks: Checks | None = None

    @property
    def key(self) -> RunKey:
        return (self.agent_id, self.trajectory_id)


# the rule ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Judged:
    """Its score is the judge's."""


@dataclass(frozen=True)
class RanksLast:
    """A member that no judge is asked about: it scores 0, below all that are judged."""

    reason: str


@dataclass(frozen=True)
class LeftOut:
    """No member of its group, but named with it."""

    reason: str


Standing = Judged | RanksLast | LeftOut


def standing(run: Run, *, by_outcome: bool) -> Standing:
    """What the world did to a run leaves it out, whatever the agent did besides; what the agent did makes it last."""
    found = list(reasons(run, by_outcome=by_outcome))
    for whose, reason in found:
        if whose == "world":
            return LeftOut(reason)
    return RanksLast("; ".join(reason for _, reason in found)) if found else Judged()


def reasons(run: Run, *, by_outcome: bool) -> Iterator[tuple[Whose, str]]:
    """All that is wrong with a run, and whose fault that is. A run without a call has nothing to be trained on."""
    checks = run.checks or Checks(0, 0)
    if run.late:
        yield "world", "late: it was stored after its window had closed"
    if not run.called:
        yield "world", "no model call of it was recorded"
    if run.signature is None:
        yield "world", "its events are not stored any more"
    if run.broken is not None:
        yield "world", f"infrastructure broke it: {run.broken}"
    if run.status == "open":
        yield "agent", "it never ended"
    elif by_outcome and not run.rewarded and run.status not in UNREWARDED_IS_LAST:
        yield "world", "no reward of record"
    if checks.steps and checks.steps != checks.steps_expected:
        yield "agent", f"its record has a hole: {checks.steps} of its {checks.steps_expected} steps are stored"
    if checks.unreadable:
        yield "agent", f"replies that cannot be read: {checks.unreadable} of its calls"
    if checks.promptless:
        yield "agent", f"replies to no prompt: {checks.promptless} of its calls"


# what only its events tell ----------------------------------------------------------------------
def broken_by_infrastructure(run: Trajectory) -> str | None:
    """How the way to the model broke a run, or None. What the policy itself did, a timeout too, is not among it.

    Where the gateway saw calls of a run its word alone counts: a tool that cannot reach what the policy told it to
    reach ends a run with the same words. Where it saw none there is only the agent's.
    """
    seen = any(call.witnessed for call in run.calls)
    last_of_step = {call.step: call for call in run.calls}
    for number, call in sorted(last_of_step.items()):
        if (call.call.model_extra or {}).get("broken_off") is True and call.witnessed == seen:
            return f"the model's server broke off its reply in step {number}"
    unread = [fault.reason for fault in run.unread if fault.call_id is None]
    if unread:
        return unread[0]
    error = (run.ended.model_extra or {}).get("error") if run.ended else None
    if seen or run.ended is None or run.ended.status != "failed" or not isinstance(error, str):
        return None
    found = BROKEN_WAY.match(error)
    return f"it ended with {found[0]}" if found else None


def checked(stored: Checks, run: Trajectory) -> Checks:
    """The checks of the recorder's tables with what the events say. What the gateway took down is no agent's doing."""
    unreadable = sum(c.call.response is not None and c.reply is None and not c.witnessed for c in run.calls)
    answered = [call for call in run.calls if call.reply is not None and not call.call.prompt_token_ids]
    promptless = sum(call.broken_chain or not call.messages for call in answered)
    return replace(stored, unreadable=unreadable, promptless=promptless)
