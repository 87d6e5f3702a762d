"""LoRA as peft has it: a low-rank adapter made on whole weights, read again over its base, and kept as peft's files.

    h = W x + alpha / r * B A x        arXiv:2106.09685, eq. 3

W is frozen; A (r, in) is drawn, B (out, r) begins at zero, so that a new adapter changes nothing yet.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from services.trainer.training import Recipe
from shared.artifacts import RATCHET
from shared.errors import GiveUpError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # peft's own for a model's one adapter


def make(model: Any, recipe: Recipe) -> Any:
    """The model with a new adapter on every linear layer but the output; the same recipe gives the same numbers."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules="all-linear"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return get_peft_model(model, config)


def read(model: Any, directory: Path) -> Any:
    """The model with the adapter that lies in ``directory``, to be trained on.

    Raises GiveUpError for files that are no LoRA adapter, or none of this model.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        if (kind := json.loads((directory / CONFIG).read_text()).get("peft_type")) != "LORA":
            raise GiveUpError(f"the parent is an adapter of the kind {kind!r}; only LoRA is trained here")
        with safe_open(directory / WEIGHTS, "pt") as file:
            kept = set(file.keys())
        model = PeftModel.from_pretrained(model, str(directory), is_trainable=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise GiveUpError(f"the parent's adapter cannot be loaded over its base: {error}"[:500]) from error
    if strange := sorted(kept ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys()):
        raise GiveUpError(f"the parent's adapter is not of its base: {strange[0]} among {len(strange)} weights")
    return model


def merge(model: Any) -> Any:
    """Whole weights, the adapter's product added to each of them, all to be trained."""
    return model.merge_and_unload().requires_grad_(True)


def save(model: Any, directory: Path, base_sha256: str) -> None:
    """peft's two files and what the adapter is over. The same adapter over the same base gives the same bytes."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = copy.copy(model.peft_config[NAME])
    config.base_model_name_or_path, config.inference_mode = base_sha256, True
    config.target_modules = sorted(config.target_modules)  # a set: its order is another in each process
    config.save_pretrained(str(directory))
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)  # else it asks a hub about the base
    save_file({name: weight.contiguous() for name, weight in weights.items()}, directory / WEIGHTS, {"format": "pt"})
    (directory / RATCHET).write_text(json.dumps({"adapter_of": base_sha256}) + "\n")
