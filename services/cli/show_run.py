"""One run for people: a tree of its steps, then what became of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from services.admin.domain import tool_calls
from services.terminal.output import console, json_text, printable, shown

if TYPE_CHECKING:
    from rich.tree import Tree

LONGEST = 2000  # characters of one message that the tree shows; --raw and --json show all


def raw(bodies: Sequence[bytes]) -> None:
    """The bytes of each event as they were sent, one a line."""
    for body in bodies:
        sys.stdout.buffer.write(body + b"\n")
    sys.stdout.buffer.flush()


def pretty(document: Mapping[str, Any]) -> None:
    from rich.tree import Tree

    run = document["run"]
    tree = Tree(_text(f"run {run['trajectory_id']} of agent {run['agent_id']}", "bold"))
    _head(tree, run)
    _events(tree, document)
    _fate(tree, document)
    console().print(tree)


def _head(tree: Tree, run: Mapping[str, Any]) -> None:
    _line(tree, "policy", f"{run['policy']}, window {run['window_id']}, scenario {run['scenario_id']}")
    flags = [name for name in ("late", "clock_skewed") if run[name]]
    _line(tree, "status", ", ".join([run["status"], *flags]))
    _line(
        tree, "model", f"{shown(run['model_name'])} {shown(run['model_version'])}, started {shown(run['started_at'])}"
    )
    if run["forgotten_at"] is not None:
        _line(tree, "forgotten", forgotten(run))
    if run["reward"] is not None:
        _line(tree, "reward of record", f"{run['reward']:g} from {run['reward_source']}")
    if run["counts_for"] is not None:
        why = f" ({run['penalty']})" if run["penalty"] else ""
        _line(tree, "counts for", f"{run['counts_for']} with {shown(run['counted'])}{why}")


def forgotten(run: Mapping[str, Any]) -> str:
    """When, by whom and why a run's bodies were erased, and how many there were."""
    erased = f"{run['forgotten_events']} events, {run['forgotten_bytes']:,} bytes"
    why = f", {run['forgotten_reason']}" if run["forgotten_reason"] else ""
    return f"{shown(run['forgotten_at'])} by {run['forgotten_by']}{why}: {erased}"


def _events(tree: Tree, document: Mapping[str, Any]) -> None:
    calls: dict[int, list[Mapping[str, Any]]] = {}
    for call in document["calls"]:
        calls.setdefault(call["step"], []).append(call)
    seen: dict[str, int] = {}
    steps = {step["step"]: step for step in document["steps"]}
    for number in sorted({*steps, *calls}):
        _step(tree, number, steps.get(number, {}), calls.get(number, []), seen)
    forgotten = sum(e["matches"] is None for e in document["events"])
    wrong = sum(e["matches"] is False for e in document["events"])
    hashes = f"{len(document['events'])} events, " + (f"{wrong} do NOT match" if wrong else "all match their SHA-256")
    _line(tree, "stored", hashes + (f", {forgotten} forgotten" if forgotten else ""))
    for fault in document["faults"]:
        _line(tree, "not used", f"{fault['call_id']}: {fault['reason']}" if fault["call_id"] else fault["reason"])


def _step(
    tree: Tree, number: int, step: Mapping[str, Any], calls: Sequence[Mapping[str, Any]], seen: dict[str, int]
) -> None:
    branch = tree.add(_text(f"step {number}", "bold"))
    for access in step.get("provider_accesses", []):
        _line(branch, f"asked {access['provider']}", _short(access.get("data")))
    for call in calls:
        version = call["model_version"] or call["model"]
        node = branch.add(_text(f"call {call['call_id']} ({call['purpose']}, {shown(version)})", "cyan"))
        for message in _new(call["messages"], seen):
            _message(node, message)
        if call["reply"]:
            _message(node, call["reply"])
            seen[_identity(call["reply"])] = 1
    if action := step.get("action"):
        outcome = action.get("error") or action.get("result")
        _line(branch, f"action {action['type']}", _short(action.get("parameters")))
        _line(branch, "  failed" if action.get("success") is False else "  result", _short(outcome))
    if step.get("reward") is not None:
        _line(branch, "the agent's own reward", f"{step['reward']:g}")


def _new(messages: Sequence[Mapping[str, Any]], seen: dict[str, int]) -> list[Mapping[str, Any]]:
    """The messages that no earlier call of this run has shown."""
    fresh = [message for message in messages if _identity(message) not in seen]
    seen.update((_identity(message), 1) for message in messages)
    return fresh


def _identity(message: Mapping[str, Any]) -> str:
    return json.dumps(message, sort_keys=True)


def _message(node: Tree, message: Mapping[str, Any]) -> None:
    text = message.get("content")
    _line(node, str(message.get("role", "?")), text if isinstance(text, str) else _short(text))
    for call in tool_calls(message):
        _line(node, "  calls", call)


def _fate(tree: Tree, document: Mapping[str, Any]) -> None:
    for group in document["groups"]:
        branch = tree.add(_text(f"group {group['group_id']}: {group['state']}", "bold"))
        if group["left_out"]:
            _line(branch, "left out", group["left_out"])
        elif group["score"] is None and group["failure"]:
            _line(branch, "its judge failed", group["failure"])
        elif group["score"] is not None:
            _line(branch, "judgment", f"score {group['score']:.3g}, rank {group['rank']}, by {group['judge']}")
            if group["explanation"]:
                _line(branch, "because", group["explanation"])
    for batch in document["training"]:
        branch = tree.add(_text(f"batch {batch['batch_id']}: {batch['state']}, {batch['method']}", "bold"))
        used = "trained on" if batch["trained"] else f"not trained on: {batch['left_out'] or 'no reason kept'}"
        _line(branch, used, f"{batch['label']}, advantage {batch['advantage']:+.3g}")
        if batch["version"]:
            _line(branch, "helped to train", f"{batch['version']} ({(batch['artifact_sha256'] or 'no artifact')[:12]})")


def _line(tree: Tree, label: str, value: Any) -> None:
    from rich.text import Text

    tree.add(Text.assemble((printable(label), "dim"), "  ", printable(_cut(shown(value)))))


def _text(words: str, style: str) -> Any:
    from rich.text import Text

    return Text(printable(words), style=style)


def _short(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else json_text(value, ascii_only=False)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} characters more; --json)"
