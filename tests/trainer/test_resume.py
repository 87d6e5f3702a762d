"""A training that is killed goes on from its last checkpoint, and ends with the weights of one left alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.child import Done, Order, Refused, Step
from services.trainer.domain import CallRecord
from services.trainer.engines.engine_torch import TorchEngine, torch_engine
from services.trainer.job_files import Head, JobWriter, episode_bytes, episode_of, head_bytes, head_of, read_job
from services.trainer.process import Died, Ended, Outcome, TrainingProcess
from services.trainer.training import Episode, Recipe
from shared.objects import Objects
from tests.trainer.test_engine import BAD, GOOD, PROMPT, RECIPE, episode, exact, job, quiet

ENGINE = partial(torch_engine, device="cpu", threads=1)
HEAD = Head("batch-1", "default", "v1", "v0", "grpo", "0" * 64, replace(RECIPE, steps=6, minibatch=2))


@dataclass
class Bench:
    """A job's files, and trainings of it one after another."""

    base: Path
    home: Path
    attempts: int = 0

    def write(self) -> None:
        self.episodes = [episode(str(n), n - 2.0, exact(self.base, PROMPT, GOOD if n % 2 else BAD)) for n in range(5)]
        writer = JobWriter(Objects(self.home), "jobs/batch-1/1")
        for one in self.episodes:
            writer.add(one)
        writer.close(HEAD)

    def train(self, told: Callable[[TrainingProcess, Step], None] = lambda *_: None) -> tuple[Outcome, list[int], Path]:
        """What came of an attempt, which steps it told, and what it wrote."""
        self.attempts += 1
        directory = self.home / f"result-{self.attempts}"
        directory.mkdir()
        order = Order(
            "batch-1",
            self.attempts,
            "jobs/batch-1/1",
            partial(Objects, self.home),
            self.base,
            directory,
            ENGINE,
            checkpoint_s=1e-9,
        )
        process = TrainingProcess(order, 60.0)
        steps: list[int] = []

        def heard(step: Step) -> None:
            steps.append(step.step)
            told(process, step)

        return process.run(heard), steps, directory

    def undisturbed(self) -> bytes:
        directory = self.home / "undisturbed"
        directory.mkdir()
        TorchEngine(device="cpu").train(job(self.base, *self.episodes, steps=6, minibatch=2), directory, quiet)
        return (directory / "model.safetensors").read_bytes()


@pytest.fixture
def bench(base: Path, tmp_path: Path, forks: None) -> Bench:
    made = Bench(base, tmp_path)
    made.write()
    return made


def kill_at(*steps: int) -> Callable[[TrainingProcess, Step], None]:
    def told(process: TrainingProcess, step: Step) -> None:
        if step.step in steps:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)

    return told


def test_killed_at_several_steps_it_ends_with_the_very_weights(bench: Bench) -> None:
    died, _, _ = bench.train(kill_at(3))
    assert isinstance(died, Died)
    assert "killed by signal 9 (SIGKILL)" in died.why
    newest = max((bench.home / "checkpoints/batch-1").glob("*/*.pt"))
    died, steps, _ = bench.train(kill_at(5))
    assert isinstance(died, Died)
    assert steps[0] > 1, "it went on"
    newest = max((bench.home / "checkpoints/batch-1").glob("*/*.pt"))
    newest.write_bytes(newest.read_bytes()[:-9])  # and the last is damaged: the one before it is as good
    done, _, directory = bench.train()
    assert isinstance(done, Done)
    assert len(done.trained.metrics["curve"]) == 6
    assert (directory / "model.safetensors").read_bytes() == bench.undisturbed()


def test_one_that_is_ended_leaves_no_result(bench: Bench) -> None:
    ended, _, directory = bench.train(lambda process, _: process.end())
    assert isinstance(ended, Ended)
    assert list(directory.iterdir()) == []


def test_a_frozen_one_that_wakes_after_its_lease_leaves_nothing_that_counts(bench: Bench) -> None:
    def freeze(process: TrainingProcess, step: Step) -> None:
        if step.step == 2:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
            before.extend(bench.home.glob("checkpoints/batch-1/*/*.json"))
            process.held_for(-1.0)  # the lease is over while it does not run
            os.kill(process.pid, signal.SIGCONT)

    before: list[Path] = []
    outcome, steps, directory = bench.train(freeze)
    assert isinstance(outcome, Died)
    assert steps[-1] < 6
    assert list(directory.iterdir()) == []
    assert len(list(bench.home.glob("checkpoints/batch-1/*/*.json"))) <= max(1, len(before))


def test_a_job_without_all_of_its_episodes_is_not_trained(bench: Bench) -> None:
    (bench.home / "jobs/batch-1/1/job.json").unlink()
    outcome, _, _ = bench.train()
    assert isinstance(outcome, Refused)
    assert "job.json is not in" in outcome.why


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), json_values, max_size=3)
calls = st.builds(
    CallRecord,
    messages=st.lists(objects, max_size=4),
    response=st.none() | objects,
    tools=st.none() | st.lists(objects, max_size=2),
    prompt_token_ids=st.none() | st.lists(st.integers(0, 9), max_size=3),
    logprobs=st.none() | st.lists(st.floats(allow_nan=False), max_size=3),
    temperature=st.none() | st.floats(0, 2),
    sampling=st.none() | objects,
    witnessed=st.booleans(),
)


@settings(max_examples=40)
@given(st.lists(calls, max_size=4).map(tuple), st.floats(allow_nan=False), st.text())
def test_an_episode_comes_back_as_it_was(made: tuple[CallRecord, ...], advantage: float, name: str) -> None:
    whole = Episode(name, "run", "g", "exact", advantage, 0.5, made)
    again = episode_of(episode_bytes(whole))
    assert repr(again) == repr(whole), "True is not 1, nor 1 1.0"


def test_a_head_comes_back_as_it_was() -> None:
    assert head_of(head_bytes(HEAD, 3)) == (HEAD, 3)


def test_a_job_is_read_over_its_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.trainer.job_files.CHUNK_BYTES", 300)
    episodes = tuple(
        Episode(f"a{n}", "run", "g", "exact", 1.0, 0.5, (CallRecord([{"role": "user"}], None),)) for n in range(7)
    )
    writer = JobWriter(Objects(tmp_path), "jobs/b/1")
    for one in episodes:
        writer.add(one)
    head = replace(HEAD, recipe=Recipe(1e-3, 1, 1, 0.2, 1.0, 10, 7))
    writer.close(head)
    assert len(list((tmp_path / "jobs/b/1").glob("*.zst"))) > 2
    assert read_job(Objects(tmp_path), "jobs/b/1", tmp_path) == head.job(tmp_path, episodes)
