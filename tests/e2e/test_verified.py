"""What the trainer saves is what inference serves, by the deployer's own verification, over a real socket."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from services.deployer.domain import Version
from services.deployer.serving.endpoint import Endpoint
from services.deployer.serving.inference import InferenceServing
from services.deployer.serving.intact import Intact
from services.deployer.serving.serving import Verified, Wrong
from services.inference.app import inference
from services.inference.handlers import application
from services.inference.settings import InferenceSettings
from services.trainer.engines.engine_torch import TorchEngine
from shared.artifacts import DirectoryStore, adapter_of
from shared.upstream import Place
from tests.gateway.standin import listening
from tests.trainer.conftest import base as base
from tests.trainer.test_adapter import lora
from tests.trainer.test_engine import quiet


@pytest.mark.parametrize("trains", ["full", "lora"])
async def test_what_was_trained_is_what_is_served(base: Path, tmp_path: Path, trains: str) -> None:
    store = DirectoryStore(tmp_path / "artifacts")
    store.put(base)
    (tmp_path / "made").mkdir()
    TorchEngine(device="cpu").train(lora(base, trains=trains), tmp_path / "made", quiet)
    true = store.put(tmp_path / "made")
    probe = json.loads((tmp_path / "made/probe.json").read_text())
    probe["prompts"][0]["logprobs"][0] -= 5.0
    (tmp_path / "made/probe.json").write_text(json.dumps(probe))
    false = store.put(tmp_path / "made")
    service = inference(InferenceSettings(artifacts_dir=store.root, device="cpu"))
    async with listening(application(service, max_body_bytes=2**20)) as url:
        endpoint = Endpoint(f"{url}/v1", timeout_s=30, keys={})
        serving = InferenceServing(
            Place(kind="inference", base_url=f"{url}/v1"), endpoint, Intact(store), tolerance=0.05
        )
        over = adapter_of(store.open(true.sha256))
        version = Version(policy="default", version="v1", number=1, artifact_sha256=true.sha256, adapter_of=over)
        match await serving.verify(version):
            case Verified(_, mismatch):
                assert mismatch == pytest.approx(0, abs=1e-4)
            case against:
                pytest.fail(str(against))
        assert isinstance(await serving.verify(replace(version, artifact_sha256=false.sha256)), Wrong)
        await serving.close()
    await service.close()
