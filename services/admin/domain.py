"""What the overview says, from what was read: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from shared.routing import RouteDocument, plan_at


@dataclass(frozen=True)
class Lag:
    """One durable consumer. ``waiting``: somebody asks it for messages now. ``floor``: all up to it is settled.

    ``active_at``: when it last gave a message out or had one acknowledged; None where the server does not know.
    """

    consumer: str
    stream: str
    pending: int
    unacknowledged: int
    redelivered: int
    waiting: int
    fault: str | None = None
    floor: int = 0
    active_at: datetime | None = None
    ack_wait_s: float = 30.0

    @property
    def behind(self) -> int:
        return self.pending + self.unacknowledged


def verdict(lag: Lag, before: Lag | None = None, now: datetime | None = None) -> str:
    """``missing`` has no consumer, ``idle`` has work and nobody who asks for it, ``busy`` is behind, else ``ok``.

    ``stuck``: it had work at the look ``before`` and has now, its floor has not moved between them, and nothing was
    given out or acknowledged for longer than one message may be worked on.
    """
    if lag.fault is not None:
        return "missing"
    still = before is not None and before.behind > 0 and lag.behind > 0 and before.floor == lag.floor
    if still and now and lag.active_at and now - lag.active_at > timedelta(seconds=lag.ack_wait_s):
        return "stuck"
    if lag.pending > 0 and lag.waiting == 0 and lag.unacknowledged == 0:
        return "idle"
    return "busy" if lag.behind > 1000 else "ok"


@dataclass(frozen=True)
class Replica:
    """A process of a service, as it answered for the last time. ``token`` is its place at the broker."""

    service: str
    token: str
    name: str
    heard_at: datetime
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Presence:
    """A service as its replicas answer. ``since``: when one that says nothing now was last heard, if it ever was."""

    service: str
    state: Literal["ok", "not ready", "hung", "absent"]
    replicas: int
    detail: str
    since: datetime | None = None


def presence(service: str, answering: Sequence[Replica], silent: Sequence[Replica], *, connected: bool) -> Presence:
    """What is to be said of a service. ``connected``: the broker knows somebody who should have answered."""
    known = len(answering) + len(silent)
    if silent:
        said = f"{', '.join(r.name for r in silent)} is connected and does not answer"
        return Presence(service, "hung", known, said, min(r.heard_at for r in silent))
    if not answering:
        if connected:
            return Presence(service, "hung", 1, "it is connected and does not answer")
        return Presence(service, "absent", 0, "it is not running")
    if faults := [f"{r.name}: {'; '.join(r.faults)}" for r in answering if r.faults]:
        return Presence(service, "not ready", known, ", ".join(faults))
    return Presence(service, "ok", known, ", ".join(r.name for r in answering))


def down(found: Sequence[Presence]) -> list[Presence]:
    """The services that stop the loop: those that hang or are not ready, and those that are absent beside others."""
    some = any(p.state != "absent" for p in found)
    return [p for p in found if p.state in ("hung", "not ready") or (some and p.state == "absent")]


# Of what waits in the view ``waits``.
WAITS = (
    "window",
    "settlement",
    "correction",
    "judgment",
    "announcement",
    "probe",
    "batch",
    "trial",
    "training",
)


def overdue(waits: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many of each kind wait longer than they may, zeros too."""
    counted = dict.fromkeys(WAITS, 0)
    for one in waits:
        if one["overdue"]:
            counted[one["kind"]] += 1
    return counted


def shares(document: RouteDocument, now: datetime) -> dict[str, float]:
    """Each version's share of the runs that start in a window beginning now; zero where it is quarantined.

    A quarantined version's share is answered by ``document.best()``.
    """
    found: dict[str, float] = {}
    for arm in plan_at(document, now).arms:
        version = document.best() if arm.version in document.quarantined else arm.version
        found[version] = found.get(version, 0.0) + arm.share
    return found


def service_of(consumer: str) -> str:
    """The service that a durable consumer belongs to: the longest service name that it starts with."""
    known = ("recorder", "outcome_tracker", "scorer", "trainer", "deployer")
    return next((name for name in known if consumer == name or consumer.startswith(f"{name}_")), consumer)


def phase(window: Mapping[str, Any]) -> str:
    """How far a window is: open, closed, settled (its outcomes are in), judged (no group of it waits), or failed.

    Failed is one with a group that its judge has failed, whatever became of the others.
    """
    if window["state"] == "open":
        return "open"
    if window["settlement"] != "settled":
        return "closed"
    if window["failed"]:
        return "failed"
    return "judged" if window["groups"] and not window["pending"] else "settled"


def notes(window: Mapping[str, Any]) -> list[str]:
    """What of a window teaches nothing, each with its reasons, the commonest first."""
    found = []
    if window["failed"]:
        found.append(f"{window['failed']} of {window['groups']} groups failed: {_commonest(window['failures'])}")
    if window["small"]:
        found.append(f"{window['small']} of {window['groups']} groups are small: under two runs of them count")
    for name, words in (("left_out", "left out"), ("ranked_last", "last in their groups, unjudged")):
        if reasons := window[name]:
            found.append(f"{_runs(sum(reasons.values()))} {words}: {_commonest(reasons)}")
    return found


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _commonest(reasons: Mapping[str, int]) -> str:
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} ({count})" for reason, count in ordered)


def lonely(windows: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong where every group of the last windows is small; None where one is not, or none is there."""
    groups = sum(window["groups"] for window in windows)
    if not groups or groups != sum(window["small"] for window in windows):
        return None
    return f"all {groups} groups of the last windows are small: give runs a scenario_id that others share"


def new_messages(calls: Sequence[Mapping[str, Any]], call: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The part of a call's prompt that the longest earlier call, with its reply, does not hold already."""
    best = 0
    for earlier in calls:
        if earlier is call:
            break
        before = [*earlier["messages"], *([earlier["reply"]] if earlier["reply"] else [])]
        if len(before) > best and call["messages"][: len(before)] == before:
            best = len(before)
    return list(call["messages"][best:])


def tool_calls(message: Mapping[str, Any]) -> list[str]:
    """The tools that a message calls, a line each, whatever shape an agent gave them."""
    calls = message.get("tool_calls")
    lines = []
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and "name" in function:
            lines.append(f"{function['name']} {function.get('arguments', '')}")
        else:
            lines.append(str(call))
    return lines


@dataclass(frozen=True)
class Series:
    """A version's mean reward by window, as points of the picture; ``slot`` picks its colour."""

    version: str
    slot: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    width: float
    height: float
    low: float
    high: float
    series: tuple[Series, ...]

    @property
    def zero(self) -> float | None:
        """Where a reward of zero lies, if it lies in the picture."""
        return self.y(0.0) if self.low < 0 < self.high else None

    def y(self, value: float) -> float:
        return round(self.height * (1 - (value - self.low) / (self.high - self.low)), 1)


def chart(rows: Sequence[Mapping[str, Any]], *, width: float = 720, height: float = 120, most: int = 6) -> Chart | None:
    """Mean counted reward by window for each version; None below two windows. ``rows`` are in order of time.

    Windows are spread evenly. Of more than ``most`` versions the first (the base) and the newest are shown.
    """
    windows = list(dict.fromkeys(row["window_id"] for row in rows))
    versions = list(dict.fromkeys(row["version"] for row in rows))
    versions.sort(key=lambda v: (len(v), v))
    if len(windows) < 2:
        return None
    if len(versions) > most:
        versions = [versions[0], *versions[-(most - 1) :]]
    low, high = min(row["mean"] for row in rows), max(row["mean"] for row in rows)
    margin = (high - low) * 0.08 or 0.5
    empty = Chart(width, height, low - margin, high + margin, ())
    at = {window: round(width * n / (len(windows) - 1), 1) for n, window in enumerate(windows)}
    series = tuple(
        Series(
            version,
            slot,
            tuple((at[row["window_id"]], empty.y(row["mean"])) for row in rows if row["version"] == version),
        )
        for slot, version in enumerate(versions)
    )
    return replace(empty, series=series)
