"""An alert or panel that names a metric nobody counts stays silent for ever: every name must exist in the code."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from services.cli.launch import SERVICES
from shared import subjects

ROOT = Path(__file__).parents[2]
RULES = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/overview.json").read_text())
SUFFIXES = {"Counter": ("",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}


def defined() -> dict[str, tuple[set[str], set[str]]]:
    """Every series the code has, with its labels and the services that have it (all, for what is shared)."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for path in [*ROOT.glob("services/**/*.py"), *ROOT.glob("shared/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SUFFIXES):
                continue
            if not (node.args and isinstance(node.args[0], ast.Constant)):
                continue
            labels = {item.value for arg in node.args[2:3] if isinstance(arg, ast.List) for item in arg.elts}
            where = {path.relative_to(ROOT).parts[1]} if "services" in path.relative_to(ROOT).parts else set(SERVICES)
            for suffix in SUFFIXES[node.func.id]:
                found[node.args[0].value + suffix] = (labels, where)
    return found


SERIES = defined()


def alerts() -> Iterator[tuple[str, str]]:
    for group in RULES["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def panels() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


@pytest.mark.parametrize(("where", "expression"), [*alerts(), *panels()])
def test_every_metric_exists_with_the_labels_that_are_asked_for(where: str, expression: str) -> None:
    names = set(re.findall(r"\bratchet_\w+", expression))
    assert names or "up{" in expression, where
    for name in names:
        assert name in SERIES, f"{where}: nothing counts {name}"
    known = {label for name in names for label in SERIES[name][0]} | {"service", "instance", "job", "le"}
    asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression))
    for labels in re.findall(r"\b(?:by|on|without)\s*\(([^)]*)\)", expression):
        asked |= {label.strip() for label in labels.split(",") if label.strip()}
    assert asked <= known, f"{where}: {asked - known} is no label of {names}"


def test_consumers_named_in_rules_and_panels_exist() -> None:
    durables = {consumer.durable for consumer in subjects.CONSUMERS}
    for where, expression in [*alerts(), *panels()]:
        for named in re.findall(r'consumer="([^"]*)"', expression):
            assert named in durables, where


def test_every_alert_says_what_to_do() -> None:
    runbook = (ROOT / "docs/operations.md").read_text()
    for group in RULES["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"]
            assert f"### {rule['alert']}\n" in runbook, (
                f"docs/operations.md does not say what to do about {rule['alert']}"
            )


def test_prometheus_takes_the_configuration() -> None:
    if (promtool := shutil.which("promtool")) is None:
        assert not os.environ.get("CI"), "CI installs prometheus, so that this test runs there"
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    subprocess.run([promtool, "check", "config", ROOT / "deploy/prometheus/prometheus.yml"], check=True)


def test_the_dashboard_uses_the_provisioned_source_and_places_each_panel_once() -> None:
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    uid = source["datasources"][0]["uid"]
    places = set()
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == uid
        place = (panel["gridPos"]["x"], panel["gridPos"]["y"])
        assert place not in places
        places.add(place)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
