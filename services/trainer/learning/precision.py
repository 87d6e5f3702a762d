"""What a batch is computed in: float32, or bfloat16 with everything that is trained kept in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.trainer.training import Recipe

if TYPE_CHECKING:
    import torch


def computing(recipe: Recipe, device: str) -> torch.autocast:
    """A context in which matrices are multiplied in the recipe's type; the weights stay what they are."""
    import torch

    lower = dtype(recipe, device) is not torch.float32
    # uncached: a cast that is kept until the context ends would be of the weights before an optimizer step
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=lower, cache_enabled=False)


def dtype(recipe: Recipe, device: str) -> torch.dtype:
    """The type that the recipe's ``dtype`` comes to on this device."""
    import torch

    if recipe.dtype == "auto":
        on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if on_gpu else torch.float32
    return torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
