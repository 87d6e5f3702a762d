"""Composition root of the inference service."""

from __future__ import annotations

from pathlib import Path

from services.inference.engine_torch import TorchModel
from services.inference.handlers import application
from services.inference.service import Inference
from services.inference.settings import InferenceSettings
from shared.artifact_bucket import artifacts_of
from shared.bus import Bus
from shared.service import run_service, serve
from shared.settings import load
from shared.telemetry import configure_logging


def inference(settings: InferenceSettings) -> Inference:
    """The service on the torch engine, reading from the artifact store that the settings name."""

    def read(directory: Path) -> TorchModel:
        return TorchModel(
            directory,
            device=settings.device,
            batch_max=settings.batch_max,
            batch_tokens=settings.batch_tokens,
            max_tokens=settings.default_max_tokens,
        )

    return Inference(
        artifacts_of(settings),
        read,
        max_loaded=settings.max_loaded,
        batch_max=settings.batch_max,
        batch_wait_s=settings.batch_wait_ms / 1000,
        adapters_max=settings.adapters_max,
        answer_s=settings.answer_timeout_s,
        waiting_max=settings.waiting_max,
    )


async def main() -> None:
    settings = load(InferenceSettings)
    configure_logging("inference", settings.log_level)
    import torch
    import transformers  # noqa: F401  # read now, so that the first request does not wait for it

    torch.set_num_threads(settings.torch_threads)
    service = inference(settings)
    api = application(
        service,
        max_body_bytes=settings.max_body_bytes,
        body_timeout_s=settings.body_timeout_s,
        token=settings.inference_token.get_secret_value() if settings.inference_token else None,
    )
    try:
        await serve("inference", settings, Bus(settings.nats_url, name="inference"), http=api)
    finally:
        await service.close()


def run() -> None:
    run_service(main)
