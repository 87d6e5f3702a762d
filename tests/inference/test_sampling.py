from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.sampling import distribution, draw, penalised


def reference(logits: np.ndarray, temperature: float, top_p: float, top_k: int = 0, min_p: float = 0) -> np.ndarray:
    """One row, written out: probabilities after temperature, min_p, top_k and top_p."""
    if temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    p = np.exp(logits / temperature - (logits / temperature).max())
    p[p < min_p] = 0
    p[np.argsort(-p)[top_k if top_k > 0 else len(p) :]] = 0
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


@given(st.integers(0, 2**32), st.floats(0.05, 2), st.floats(1e-300, 1), st.integers(-1, 25), st.floats(0, 1))
@settings(deadline=None)
def test_truncation_is_the_written_out_one(
    seed: int, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    logits = np.random.default_rng(seed).normal(size=(1, 20)) * 3
    asked = (torch.tensor([value], dtype=torch.double) for value in (temperature, top_p, top_k, min_p))
    got = distribution(torch.tensor(logits), *asked).exp().numpy()
    np.testing.assert_allclose(got[0], reference(logits[0], temperature, top_p, top_k, min_p), atol=1e-6)


def test_a_top_p_that_a_float_cannot_hold_keeps_the_most_probable() -> None:
    got = distribution(torch.tensor([[0.0, 1.0]]), torch.tensor([1.0]), torch.tensor([1e-300]))
    assert got.tolist() == [[-torch.inf, 0.0]]


def test_penalties_are_those_of_openai_and_vllm() -> None:
    logits, prompt, reply = torch.tensor([2.0, -2.0, 1.0, 1.0]), torch.tensor([0, 1]), torch.tensor([2, 2])

    def got(repetition: float = 1, presence: float = 0, frequency: float = 0) -> list[float]:
        found: list[float] = penalised(
            logits, prompt, reply, repetition=repetition, presence=presence, frequency=frequency
        ).tolist()
        return found

    assert got() == logits.tolist()
    assert got(repetition=2) == [1.0, -4.0, 0.5, 1.0]  # what the prompt says counts too
    assert got(presence=0.25) == [2.0, -2.0, 0.75, 1.0]
    assert got(frequency=0.25) == [2.0, -2.0, 0.5, 1.0]


def test_draws_have_the_probabilities_they_claim() -> None:
    logprobs = torch.tensor([0.0, 0.5, 0.2, 0.3, 0.0]).log()
    uniform = torch.linspace(0, 1, 1001)[:-1]
    counts = draw(logprobs.repeat(1000, 1), uniform).bincount(minlength=5)
    assert (counts - torch.tensor([0, 500, 200, 300, 0])).abs().max() <= 1


def test_the_last_draw_never_falls_on_an_impossible_token() -> None:
    logprobs = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert draw(logprobs, torch.tensor([1.0])).item() == 0
