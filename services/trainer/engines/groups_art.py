"""Exported groups (`ratchet export --format groups`) as ART's own objects, for whoever trains with ART by hand.

    from services.trainer.engines.groups_art import read_groups
    groups = read_groups(open("groups.jsonl"))          # list[art.TrajectoryGroup]

It needs openpipe-art and nothing of a running installation. Groups are built from trajectories and choices one by one:
``art.TrajectoryGroup.model_validate`` makes an empty group of any JSON and says nothing (openpipe-art 0.5.18).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from shared.errors import GiveUpError


def read_groups(lines: Iterable[str]) -> list[Any]:
    """An ``art.TrajectoryGroup`` for each line. Raises GiveUpError naming the first line that is not a group."""
    groups = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                groups.append(group_of(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:  # pydantic's own is a ValueError
                words = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                raise GiveUpError(f"line {number} is not an exported group: {words}") from error
    return groups


def group_of(exported: dict[str, Any]) -> Any:
    """One group; what is known of it besides its runs is in its metadata."""
    import art

    runs = [_trajectory(run) for run in exported["trajectories"]]
    known = {key: value for key, value in exported.items() if isinstance(value, (str, int, float, bool))}
    group = art.TrajectoryGroup(runs, metadata=known)
    if len(group.trajectories) != len(runs):
        raise ValueError(f"ART kept {len(group.trajectories)} of {len(runs)} trajectories")
    return group


def _trajectory(run: dict[str, Any]) -> Any:
    import art

    histories = [
        art.trajectories.History(messages_and_choices=_items(history), tools=history["tools"])
        for history in run["additional_histories"]
    ]
    return art.Trajectory(
        messages_and_choices=_items(run),
        tools=run["tools"],
        additional_histories=histories,
        reward=run["reward"],
        metrics=run["metrics"],
        metadata=run["metadata"],
        logs=run["logs"],
    )


def _items(history: dict[str, Any]) -> list[Any]:
    """A choice where the model spoke, a message elsewhere, in their order."""
    from openai.types.chat.chat_completion import Choice

    return [
        Choice.model_validate(item) if "message" in item and "role" not in item else item
        for item in history["messages_and_choices"]
    ]
