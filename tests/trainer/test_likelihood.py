"""Log probabilities in little memory are the plain ones, and so are their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from services.trainer.learning import likelihood
from services.trainer.learning.likelihood import Likelihood

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 11, 12, 0, 0]])
OWN = torch.tensor([[False, True, True, False, True], [True, False, True, False, False]])
TEMPERATURES = torch.tensor([[1.0, 0.5, 0.5, 1.0, 2.0], [1.0, 1.0, 0.7, 1.0, 1.0]])


def capped() -> Any:
    """A model that does more than one product to its last states: its logits are capped."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def gradients(model: Any, values: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    (values * torch.arange(1.0, len(values) + 1)).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("family", ["llama", "capped"])
@pytest.mark.parametrize(("logits", "activations"), [(2**24, 2**29), (1, 1)])
def test_they_are_the_plain_ones(
    base: Path, monkeypatch: pytest.MonkeyPatch, family: str, logits: int, activations: int
) -> None:
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", logits)
    monkeypatch.setattr(likelihood, "ACTIVATION_BYTES", activations)
    model = capped() if family == "capped" else AutoModelForCausalLM.from_pretrained(base)
    model.eval()
    plain = (model(IDS).logits[:, :-1] / TEMPERATURES[..., None]).log_softmax(-1)
    plain = plain.gather(-1, IDS[:, 1:, None])[..., 0][OWN]
    want = gradients(model, plain)
    found = Likelihood(model).of(IDS, OWN, TEMPERATURES)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients(model, found), want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
