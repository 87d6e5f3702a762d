"""Run by tests with the Python of a venv that has ART: what its own objects hold of an exported file, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from openai.types.chat.chat_completion import Choice

from services.trainer.engines.groups_art import read_groups


def items(history: Any) -> list[dict[str, Any]]:
    return [
        {"choice": item.model_dump(exclude_unset=True)} if isinstance(item, Choice) else {"message": dict(item)}
        for item in history.messages_and_choices
    ]


def dump(group: Any) -> dict[str, Any]:
    return {
        "metadata": group.metadata,
        "trajectories": [
            {
                "type": f"{type(run).__module__}.{type(run).__name__}",
                "histories": [items(history) for history in (run, *run.additional_histories)],
                "tools": run.tools,
                "reward": run.reward,
                "metadata": run.metadata,
            }
            for run in group
        ],
    }


if __name__ == "__main__":
    with Path(sys.argv[1]).open(encoding="utf-8") as file:
        found = [dump(group) for group in read_groups(file)]
    print("\n" + json.dumps(found))
