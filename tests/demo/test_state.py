"""``env`` of an installation: the user's lines stay, ours are found again, and nobody inherits a password."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from dotenv import dotenv_values
from hypothesis import given
from hypothesis import strategies as st

from services.local.state import given_settings, read_env, turn_to, write_env
from shared.errors import ConfigurationError

MADE = {"RATCHET_DIR": "/x", "RATCHET_NATS_URL": "nats://127.0.0.1:1", "RATCHET_WINDOW_S": "60"}
lines = st.lists(
    st.sampled_from(("", "# mine", "RATCHET_WINDOW_S=5", "export RATCHET_JUDGE=ruler", "A='b c'")), max_size=6
)


@pytest.fixture
def env(tmp_path: Path) -> Path:
    return tmp_path / "env"


@given(lines, lines)
def test_the_users_lines_stay_where_they_are(
    tmp_path_factory: pytest.TempPathFactory, a: list[str], b: list[str]
) -> None:
    env = tmp_path_factory.mktemp("x") / "env"
    env.write_text("\n".join(a) + "\n" if a else "")
    write_env(env, MADE, {})
    env.write_text(env.read_text() + "".join(f"{line}\n" for line in b))
    for _ in range(2):
        write_env(env, {**MADE, "RATCHET_NATS_URL": "nats://127.0.0.1:2"}, {})
    there = read_env(env)
    assert (there.before, there.after) == (a, b)
    assert there.ours.get("RATCHET_NATS_URL") == "nats://127.0.0.1:2"
    mine = [line for line in (*a, *b) if line.startswith("RATCHET_WINDOW_S")]
    assert ("RATCHET_WINDOW_S" in there.ours) == (not mine)


def test_what_is_written_is_read_alike_by_a_shell_and_by_commands(env: Path) -> None:
    made = {"RATCHET_DIR": "/tmp/Ann's runs", "RATCHET_ARTIFACTS_DIR": "/a b/c", "RATCHET_NATS_URL": "nats://x:1"}
    write_env(env, made, {"RATCHET_DATABASE_URL": "postgresql://u:p@h/d?a=b&c=d"})
    assert os.stat(env).st_mode & 0o077 == 0
    shell = subprocess.run(
        ["bash", "-c", f'. "{env}"; exec env'],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"]},
    )
    exported = dict(line.split("=", 1) for line in shell.stdout.splitlines() if line.startswith("RATCHET_"))
    assert exported == dotenv_values(env) == {**made, "RATCHET_DATABASE_URL": "postgresql://u:p@h/d?a=b&c=d"}


def test_a_shell_that_sourced_env_gives_nothing_of_its_own(env: Path, tmp_path: Path) -> None:
    write_env(env, {**MADE, "RATCHET_DIR": str(tmp_path)}, {"RATCHET_DATABASE_URL": "postgresql://real"})
    sourced = {name: value for name, value in dotenv_values(env).items() if value is not None}
    assert given_settings(tmp_path, read_env(env), sourced) == {"RATCHET_DATABASE_URL": "postgresql://real"}
    own = {**sourced, "RATCHET_WINDOW_S": "7", "HOME": "/root"}
    assert given_settings(tmp_path, read_env(env), own)["RATCHET_WINDOW_S"] == "7"


def test_the_environment_goes_before_what_the_user_wrote_and_that_before_ours(env: Path, tmp_path: Path) -> None:
    env.write_text("export RATCHET_INFERENCE_URL=http://mine/v1\nRATCHET_JUDGE=ruler\n")
    found = given_settings(tmp_path, read_env(env), {"RATCHET_JUDGE": "outcome", "RATCHET_ARTIFACTS_DIR": "here"})
    assert found == {
        "RATCHET_INFERENCE_URL": "http://mine/v1",
        "RATCHET_JUDGE": "outcome",
        "RATCHET_ARTIFACTS_DIR": str(Path("here").absolute()),
    }


def test_what_cannot_be_honoured_is_refused(env: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="of the installation in /elsewhere"):
        given_settings(tmp_path, read_env(env), {"RATCHET_DIR": "/elsewhere"})
    with pytest.raises(ConfigurationError, match="RATCHET_HTTP_PORT is one service's"):
        given_settings(tmp_path, read_env(env), {"RATCHET_HTTP_PORT": "80"})
    env.mkdir()
    with pytest.raises(ConfigurationError, match="env cannot be read"):
        read_env(env)


def test_the_file_of_an_older_version_is_not_the_users(env: Path) -> None:
    env.write_text("RATCHET_NATS_URL=nats://operator:x@127.0.0.1:1\nRATCHET_ADMIN_TOKEN=y\n")
    assert read_env(env).users == {}


def test_one_installation_after_another(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_env(tmp_path / "a/env", {**MADE, "RATCHET_DIR": str(tmp_path / "a")}, {})
    environ = {
        "RATCHET_DIR": str(tmp_path / "a"),
        "RATCHET_NATS_URL": MADE["RATCHET_NATS_URL"],
        "RATCHET_WINDOW_S": "9",
    }
    turn_to(tmp_path / "b", environ)
    assert environ == {"RATCHET_DIR": str(tmp_path / "b"), "RATCHET_WINDOW_S": "9"}
