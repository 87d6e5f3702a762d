"""The pages: what was read, through templates that escape everything. No text of an agent is ever markup."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from services.admin import domain

LONGEST = 4000  # characters of one text that a page shows; the API has all of it


class Pages:
    def __init__(self) -> None:
        self._templates = Environment(
            loader=PackageLoader("services.admin"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(
            when=when,
            number=number,
            percent=percent,
            short=short,
            text=text,
            signed=signed,
            phase=domain.phase,
            notes=domain.notes,
            tool_calls=domain.tool_calls,
        )

    def overview(self, found: Mapping[str, Any], nonce: str) -> str:
        charts = {policy: domain.chart(rows) for policy, rows in found["rewards"].items()}
        return self._render(
            "overview.html", nonce, charts=charts, lonely=domain.lonely(found["windows"]), refresh_s=3, **found
        )

    def window(self, window: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], nonce: str) -> str:
        return self._render("window.html", nonce, window=window, runs=runs, refresh_s=5)

    def run(self, document: Mapping[str, Any], nonce: str) -> str:
        steps = {step["step"]: step for step in document["steps"]}
        shown = [
            {
                "number": n,
                "step": steps.get(n, {}),
                "calls": [
                    {**call, "messages": domain.new_messages(document["calls"], call)}
                    for call in document["calls"]
                    if call["step"] == n
                ],
            }
            for n in sorted({*steps, *(call["step"] for call in document["calls"])})
        ]
        return self._render("run.html", nonce, refresh_s=0, **{**document, "steps": shown})

    def _render(self, template: str, nonce: str, **values: Any) -> str:
        return self._templates.get_template(template).render(nonce=nonce, now=datetime.now(UTC), **values)


def when(value: datetime | None) -> str:
    return "-" if value is None else value.astimezone(UTC).strftime("%b %d %H:%M:%S")


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+,.3f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def short(value: str | None, length: int = 12) -> str:
    return "-" if value is None else value if len(value) <= length else value[:length] + "…"


def text(value: Any) -> str:
    """Any value as text of bounded length; what moves the reading order or the cursor is made visible."""
    if value is None:
        return "-"
    whole = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    cut = whole if len(whole) <= LONGEST else f"{whole[:LONGEST]} … ({len(whole) - LONGEST:,} more)"
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in cut)
