"""The distribution a token is drawn from, and the draw: pure functions of tensors."""

from __future__ import annotations

import torch

GREEDY_BELOW = 1e-5


def distribution(logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Log probabilities (rows, vocabulary) that are really sampled from; what cannot be drawn is -inf.

    ``logits`` (rows, vocabulary); ``temperature`` and ``top_p`` (rows,). Logits over temperature, then the smallest
    set of most probable tokens whose mass reaches top_p (nucleus, arXiv:1904.09751), renormalised. Temperature 0,
    and what is so close to it that dividing would overflow, is the limit: all mass on the most probable token.
    """
    greedy = temperature < GREEDY_BELOW
    scaled = logits / torch.where(greedy, torch.ones_like(temperature), temperature)[:, None]
    if bool((top_p < 1).any()):
        ordered, order = scaled.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        mass_before = probability.cumsum(dim=-1) - probability
        outside = torch.zeros_like(mass_before, dtype=torch.bool)
        outside.scatter_(-1, order, mass_before >= top_p[:, None])
        outside &= (top_p < 1)[:, None]
        scaled = scaled.masked_fill(outside, -torch.inf)
    best = scaled.argmax(dim=-1, keepdim=True)
    point = torch.full_like(scaled, -torch.inf).scatter_(-1, best, 0.0)
    return torch.where(greedy[:, None], point, scaled.log_softmax(dim=-1))


def draw(logprobs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token a row, (rows,): the inverse of the cumulative distribution at ``uniform`` in [0, 1).

    Each row's draw depends on its own number alone, so a seeded request gets the same reply in any batch.
    """
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    point = uniform.double()[:, None] * cumulative[:, -1:]
    chosen = (cumulative <= point).sum(dim=-1).clamp(max=logprobs.shape[-1] - 1)
    impossible = logprobs.gather(-1, chosen[:, None])[:, 0] == -torch.inf  # rounding at the very end of the line
    return torch.where(impossible, logprobs.argmax(dim=-1), chosen)
