from __future__ import annotations

import numpy as np
import torch

from services.inference.sampling import distribution, draw


def reference(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """One row, written out: probabilities after temperature and top_p."""
    if temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    p = np.exp(logits / temperature - (logits / temperature).max())
    p /= p.sum()
    kept, mass = np.zeros_like(p), 0.0
    for token in np.argsort(-p):
        kept[token] = p[token]
        mass += p[token]
        if mass >= top_p:
            break
    return kept / kept.sum()


def test_the_distribution_is_the_written_out_one() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 20)) * 3
    temperature, top_p = [1.0, 0.7, 0.0, 1.3], [1.0, 0.8, 1.0, 0.3]
    got = distribution(torch.tensor(logits), torch.tensor(temperature), torch.tensor(top_p)).exp().numpy()
    for row in range(4):
        np.testing.assert_allclose(got[row], reference(logits[row], temperature[row], top_p[row]), atol=1e-6)


def test_draws_have_the_probabilities_they_claim() -> None:
    logprobs = torch.tensor([0.0, 0.5, 0.2, 0.3, 0.0]).log()
    uniform = torch.linspace(0, 1, 1001)[:-1]
    counts = draw(logprobs.repeat(1000, 1), uniform).bincount(minlength=5)
    assert (counts - torch.tensor([0, 500, 200, 300, 0])).abs().max() <= 1


def test_the_last_draw_never_falls_on_an_impossible_token() -> None:
    logprobs = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert draw(logprobs, torch.tensor([1.0])).item() == 0
