"""LoRA adapters over one base, by peft: the base's weights are in memory once, and each row has its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.errors import GiveUpError

NONE = "__base__"  # peft's name for a row without an adapter
WEIGHTS = "adapter_model.safetensors"  # peft reads pickles too, which are programs


class Adapters:
    """A model, and forward passes through it with an adapter a row. Without adapters it is the model alone."""

    def __init__(self, model: Any, device: str) -> None:
        self.model, self._device = model, device
        self._over: Any = None

    def add(self, name: str, directory: Path) -> None:
        """Raises GiveUpError for what is no LoRA adapter of this base, or not all of one."""
        from peft import PeftConfig, PeftModel

        try:
            config = PeftConfig.from_pretrained(str(directory))
            if (fault := _fault(config, directory)) is not None:
                raise GiveUpError(fault)
            config.inference_mode = True
            if self._over is None:
                self._over = PeftModel(self.model, config, name)
            report = self._over.load_adapter(directory, name, torch_device=self._device)
            self._over.eval()
            if wrong := sorted([*report.missing_keys, *report.unexpected_keys]):
                raise GiveUpError(f"the adapter is of another base: {wrong[0]} among {len(wrong)} does not fit")
        except Exception as error:  # files of any making: whatever they break, the others are served on
            self.remove(name)
            known = isinstance(error, GiveUpError)
            said = str(error) if known else f"the adapter cannot be loaded: {type(error).__name__}: {error}"
            raise GiveUpError(said[:500]) from error

    def remove(self, name: str) -> None:
        """Free an adapter's weights; with the last, the base is as it was."""
        if self._over is None or name not in self._over.peft_config:
            return
        if len(self._over.peft_config) > 1:
            self._over.delete_adapter(name)
        else:
            self.model, self._over = self._over.unload(), None

    def forward(self, names: Sequence[str], **given: Any) -> Any:
        """The model's outputs for a batch whose rows are answered by these adapters, "" by none."""
        if self._over is None:
            return self.model(**given)
        return self._over(adapter_names=[name or NONE for name in names], **given)


def _fault(config: Any, directory: Path) -> str | None:
    if config.peft_type != "LORA" or config.use_dora or config.bias != "none":
        return "only plain LoRA adapters are served here (no DoRA, no trained biases)"
    if not (directory / WEIGHTS).exists():
        return f"the adapter has no {WEIGHTS}"
    return None
