"""What docker-compose.yml promises: every service, on loopback, health-checked, and free to be scaled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.cli.launch import SERVICES
from services.demo.story import Options
from services.local import broker

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
CONTAINERS: dict[str, dict[str, Any]] = COMPOSE["services"]
PACE = {
    f"RATCHET_{name}" for name in ("WINDOW_S", "TICK_S", "TRAJECTORY_LIMIT_S", "SETTLE_MAX_S")
}  # go with the window's length
ONCE = {"migrate", "demo"}


def test_every_service_runs_and_prometheus_asks_each() -> None:
    assert set(SERVICES) <= set(CONTAINERS)
    assert all(CONTAINERS[name]["command"] == ["run", name] for name in SERVICES)
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    [job] = [job for job in prometheus["scrape_configs"] if job["job_name"] == "ratchet"]
    assert set(job["dns_sd_configs"][0]["names"]) == set(SERVICES)


def test_every_port_is_published_on_loopback_alone() -> None:
    ports = [port for container in CONTAINERS.values() for port in container.get("ports", [])]
    assert len(ports) >= 6
    assert all(re.fullmatch(r"127\.0\.0\.1:\$\{RATCHET_\w+_PORT:-\d+\}:\d+", port) for port in ports)


def test_whatever_stays_up_has_a_health_check() -> None:
    for name, container in CONTAINERS.items():
        assert (name in ONCE) == bool(container["healthcheck"].get("disable")), name


@pytest.mark.parametrize("name", [name for name in SERVICES if name not in ("gateway", "admin")])
def test_a_service_can_be_scaled(name: str) -> None:
    assert "container_name" not in CONTAINERS[name]
    assert "ports" not in CONTAINERS[name]


def test_no_service_starts_before_the_schema_is_there() -> None:
    for name in SERVICES:
        assert CONTAINERS[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_a_secret_goes_only_where_it_is_used() -> None:
    def holders(variable: str) -> set[str]:
        return {name for name, container in CONTAINERS.items() if variable in container.get("environment", {})}

    assert holders("RATCHET_JUDGE_API_KEY") == {"scorer"}
    assert holders("RATCHET_ADMIN_TOKEN") == {"admin"}
    assert holders("RATCHET_UPSTREAM_KEYS") == {"gateway", "deployer"}


def test_the_broker_is_configured_as_the_rules_say() -> None:
    old = "run `python -m services.local.broker > deploy/nats/nats.conf`"
    assert (ROOT / "deploy/nats/nats.conf").read_text() == broker.of_compose(), old


def test_each_service_is_a_user_of_its_own_at_the_broker() -> None:
    users = {}
    for name, container in CONTAINERS.items():
        given = container.get("environment", {})
        if url := given.get("RATCHET_NATS_URL"):
            found = re.fullmatch(r"nats://(\w+):\$\{(\w+):\?[^}]+\}@nats:4222", url)
            assert found, url
            assert found[2] == broker.variable(found[1])
            users[name] = found[1]
        passwords = {variable for variable in given if variable.startswith("RATCHET_NATS_PASSWORD")}
        assert passwords == ({broker.variable(user) for user in broker.USERS} if name == "nats" else set())
    assert users == {**{name: name for name in SERVICES}, "migrate": broker.OPERATOR, "demo": broker.OPERATOR}


def test_the_broker_takes_what_make_env_makes(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    shutil.copy(ROOT / "deploy/make-env.sh", tmp_path / "deploy")
    subprocess.run([tmp_path / "deploy/make-env.sh"], check=True, capture_output=True)
    lines = (tmp_path / ".env").read_text().splitlines()
    passwords = dict(line.split("=", 1) for line in lines if line.startswith("RATCHET_NATS_PASSWORD"))
    assert set(passwords) == {broker.variable(user) for user in broker.USERS}
    server = Path(sys.executable).with_name("nats-server")
    command = [server, "-c", ROOT / "deploy/nats/nats.conf", "-t"]
    done = subprocess.run(command, env=passwords, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    passwords.popitem()
    assert subprocess.run(command, env=passwords, capture_output=True).returncode != 0


def test_passwords_are_made_and_never_written_down(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    shutil.copy(ROOT / "deploy/make-env.sh", tmp_path / "deploy")
    made = {}
    for option, name in (([], ".env"), (["--demo"], ".env.demo")):
        for _ in range(2):  # the second time it must leave the file as it is
            subprocess.run([tmp_path / "deploy/make-env.sh", *option], check=True, capture_output=True)
            text = (tmp_path / name).read_text()
            assert made.setdefault(name, text) == text
        assert (tmp_path / name).stat().st_mode & 0o077 == 0
        variables = dict(line.split("=", 1) for line in text.splitlines() if not line.startswith("#"))
        assert (ROOT / variables["RATCHET_SETTINGS_FILE"]).is_file()
    wanted = set(re.findall(r"\$\{(RATCHET_\w+):\?", (ROOT / "docker-compose.yml").read_text()))
    assert wanted <= set(variables)
    secrets = [value for text in made.values() for value in re.findall(r"=(r[0-9a-f]{48})\n", text)]
    assert len(secrets) == len(set(secrets)) == 2 * len(wanted)


def test_the_composed_demo_learns_as_the_local_one_does() -> None:
    lines = (ROOT / "deploy/demo.env").read_text().splitlines()
    composed = dict(line.split("=", 1) for line in lines if line.startswith("RATCHET_"))
    local = Options().settings()
    compared = {name for name in local if name in composed} - PACE
    assert len(compared) >= 7
    assert {name: float(composed[name]) for name in compared} == {name: float(local[name]) for name in compared}


def test_compose_itself_takes_the_file(tmp_path: Path) -> None:
    if (compose := shutil.which("docker-compose")) is None:
        assert not os.environ.get("CI"), "CI installs docker-compose, so that this test runs there"
        pytest.skip("docker-compose is not installed; deploy/compose-check.sh runs it for real")
    wanted = set(re.findall(r"\$\{(RATCHET_\w+):\?", (ROOT / "docker-compose.yml").read_text()))
    (tmp_path / "env").write_text("".join(f"{name}=x\n" for name in wanted))
    done = subprocess.run(
        [compose, "--env-file", tmp_path / "env", "--profile", "demo", "config", "--quiet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["deploy/make-env.sh", "deploy/images.sh", "deploy/compose-check.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / script], check=True)
