"""Which prompt follows which: so that a long conversation's calls are recorded as what each of them added."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import Any

from services.gateway.record_domain import Prompt

Key = tuple[str, str, str]


class Prefixes:
    """The conversations that calls ended with, of the newest ``size`` calls that this replica recorded.

    A call whose base is not known here, or whose prompt does not begin with it, is recorded whole: forgetting
    costs bytes and nothing else.
    """

    def __init__(self, size: int = 20_000) -> None:
        self._size = size
        self._known: OrderedDict[Key, tuple[int, bytes]] = OrderedDict()

    def remember(self, agent_id: str, trajectory_id: str, call_id: str, conversation: list[dict[str, Any]]) -> None:
        self._known[agent_id, trajectory_id, call_id] = len(conversation), fingerprint(conversation)
        if len(self._known) > self._size:
            self._known.popitem(last=False)

    def prompt(
        self, agent_id: str, trajectory_id: str, base_call_id: str | None, messages: list[dict[str, Any]]
    ) -> Prompt:
        """``messages`` less what the base call's own record already holds."""
        if base_call_id is None:
            return Prompt(messages)
        length, known = self._known.get((agent_id, trajectory_id, base_call_id), (0, b""))
        if not known or fingerprint(messages[:length]) != known:
            return Prompt(messages)
        return Prompt(messages[length:], base_call_id)


def fingerprint(messages: list[dict[str, Any]]) -> bytes:
    """A hash that sees neither the order of fields nor those that are null: clients send a reply back as they like."""
    bare = [{name: value for name, value in message.items() if value is not None} for message in messages]
    return hashlib.sha256(json.dumps(bare, sort_keys=True, separators=(",", ":")).encode()).digest()
