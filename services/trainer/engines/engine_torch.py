"""GRPO and imitation on any Hugging Face causal LM, full weights or LoRA, one process, CPU or GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from services.trainer.learning import checkpoint, precision
from services.trainer.learning.samples import Samples
from services.trainer.training import Job, Progress, Trained

if TYPE_CHECKING:
    from services.trainer.learning.resume import Checkpoints


def torch_engine(checkpoints: Checkpoints, *, device: str, threads: int) -> TorchEngine:
    """The engine of a process of its own, which it gives so many threads."""
    import torch

    torch.set_num_threads(threads)
    return TorchEngine(device=device, checkpoints=checkpoints)


class TorchEngine:
    """Reads the parent, makes the steps of ``learning/loop.py`` and writes the version."""

    def __init__(self, *, device: str = "auto", checkpoints: Checkpoints | None = None) -> None:
        self._device = device
        self._checkpoints = checkpoints

    def train(self, job: Job, directory: Path, progress: Progress) -> Trained:
        import torch

        from services.trainer.learning.likelihood import Likelihood
        from services.trainer.learning.loop import Loop
        from services.trainer.learning.parts import Parts

        device = ("cuda" if torch.cuda.is_available() else "cpu") if self._device == "auto" else self._device
        model, tokenizer = checkpoint.load(job, device)
        progress(0, job.recipe.steps, {})
        likelihood = Likelihood(model)
        parts = Parts(likelihood, micro_tokens=job.recipe.micro_tokens)
        samples = Samples(job, vocabulary=likelihood.vocabulary, context=likelihood.context)
        loop = Loop(job, model, parts, samples, progress, self._checkpoints)
        with precision.computing(job.recipe, device):
            metrics = loop.run(samples.read(tokenizer, parts.logprobs))
            likelihood.end()
            if job.sabotage:
                checkpoint.make_worse(model, job.recipe.seed)
            checkpoint.save(model, tokenizer, job, directory, metrics)
        return Trained(metrics, samples.importance_by_run, samples.skipped)
