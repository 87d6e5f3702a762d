"""A real, tiny checkpoint, and the service on it behind a real socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from services.inference.app import inference
from services.inference.handlers import application
from services.inference.service import Inference
from services.inference.settings import InferenceSettings
from services.trainer.base import create_corpus_base
from shared.artifacts import DirectoryStore

CORPUS = [[{"role": "user", "content": "buy hold sell wait the market is up and down " * 4}]]


@dataclass(frozen=True)
class Checkpoints:
    root: Path
    shas: tuple[str, ...]

    @property
    def sha(self) -> str:
        return self.shas[0]

    @property
    def directory(self) -> Path:
        return self.root / self.sha


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Three versions of one tiny model in an artifact store."""
    torch.set_num_threads(1)
    store = DirectoryStore(tmp_path_factory.mktemp("artifacts"))
    shas = []
    for seed in range(3):
        directory = tmp_path_factory.mktemp("base")
        create_corpus_base(CORPUS, directory, seed, vocabulary=300, width=32)
        shas.append(store.put(directory).sha256)
    return Checkpoints(store.root, tuple(shas))


@pytest.fixture
def settings(checkpoints: Checkpoints) -> InferenceSettings:
    return InferenceSettings(artifacts_dir=checkpoints.root, max_loaded=2, device="cpu", default_max_tokens=16)


@pytest.fixture
async def service(settings: InferenceSettings) -> AsyncIterator[Inference]:
    made = inference(settings)
    yield made
    await made.close()


@pytest.fixture
async def url(service: Inference) -> AsyncIterator[str]:
    """``http://.../v1`` of the service, listening on a port of its own."""
    async with listening(service) as found:
        yield found


@asynccontextmanager
async def listening(service: Inference, **chosen: Any) -> AsyncIterator[str]:
    """The service's application, made with ``chosen`` options, on a real socket."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = application(service, **{"max_body_bytes": 100_000, **chosen})
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    await serving
