"""Ask a Prometheus for what every panel of a Grafana dashboard shows: `ask-panels.py URL DASHBOARD`.

Prints a line a query, and ends with 1 if one of them has no data. Needs nothing but Python.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

LOOK_BACK_S = 900
STEP_S = 5


def ask(prometheus: str, expression: str) -> list[dict[str, Any]]:
    """The series of the last 15 minutes, as a panel asks for them. Raises HTTPError for what is no PromQL."""
    now = time.time()
    # What Grafana puts in for its variables.
    expression = expression.replace("$__rate_interval", "30s").replace("$__range", f"{LOOK_BACK_S}s")
    query = urllib.parse.urlencode({"query": expression, "start": now - LOOK_BACK_S, "end": now, "step": STEP_S})
    url = f"{prometheus}/api/v1/query_range?{query}"
    with urllib.request.urlopen(url, timeout=20) as reply:  # noqa: S310  # the operator names the server
        series: list[dict[str, Any]] = json.load(reply)["data"]["result"]
    return series


def main(prometheus: str, dashboard: str) -> int:
    empty = 0
    for panel in json.loads(Path(dashboard).read_text())["panels"]:
        for target in panel.get("targets", []):
            series = ask(prometheus, target["expr"])
            points = [value for one in series for _, value in one["values"] if value != "NaN"]
            empty += not points
            last = f", last {float(points[-1]):.4g}" if points else ""
            print(f"{'ok   ' if points else 'EMPTY'} {panel['title']}: {len(series)} series{last}  <- {target['expr']}")
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
