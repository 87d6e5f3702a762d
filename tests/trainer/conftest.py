from __future__ import annotations

from pathlib import Path

import pytest

from services.trainer.base import create_corpus_base
from services.trainer.process import prepare
from shared.artifacts import Artifact, DirectoryStore
from shared.database import Pool
from tests.trainer.world import World

CORPUS = [[{"role": "user", "content": "buy hold sell wait the market is up and down " * 4}]]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint: two layers, width 32."""
    import torch  # here, so that the tests of the ART engine run in a venv that has none

    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("base")
    create_corpus_base(CORPUS, directory, 0, vocabulary=300, width=32)
    return directory


@pytest.fixture(scope="session")
def forks() -> None:
    """Trainings are forked from a process that has imported torch, as those of the service are."""
    prepare(["services.trainer.engines.preload_torch"])


@pytest.fixture
def artifacts(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "artifacts")


@pytest.fixture
def artifact(artifacts: DirectoryStore, base: Path) -> Artifact:
    return artifacts.put(base)


@pytest.fixture
def world(pool: Pool) -> World:
    return World(pool)
