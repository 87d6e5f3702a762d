"""The distribution a token is drawn from, and the draw: pure functions of tensors."""

from __future__ import annotations

import torch

GREEDY_BELOW = 1e-5


def distribution(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log probabilities (rows, vocabulary) that are really sampled from; what cannot be drawn is -inf.

    ``logits`` (rows, vocabulary); the others (rows,). Logits over temperature; without what has less than min_p times
    the most probable token's probability (arXiv:2407.01082), and without what is not among the top_k most probable
    (0 and below: all are); of these the smallest set of most probable tokens whose mass reaches top_p (nucleus,
    arXiv:1904.09751); renormalised: vLLM's order. Temperature 0, and what is so close to it that dividing would
    overflow, is the limit: all mass on the most probable token.
    """
    top_k = torch.zeros_like(top_p) if top_k is None else top_k
    min_p = torch.zeros_like(top_p) if min_p is None else min_p
    greedy = temperature < GREEDY_BELOW
    scaled = logits / torch.where(greedy, torch.ones_like(temperature), temperature)[:, None]
    if bool(((top_p < 1) | (top_k > 0) | (min_p > 0)).any()):
        scaled = scaled.masked_fill(_outside(scaled, top_p, top_k, min_p), -torch.inf)
    best = scaled.argmax(dim=-1, keepdim=True)
    point = torch.full_like(scaled, -torch.inf).scatter_(-1, best, 0.0)
    return torch.where(greedy[:, None], point, scaled.log_softmax(dim=-1))


def _outside(scaled: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Which tokens are cut, (rows, vocabulary); never the most probable one."""
    ordered, order = scaled.sort(dim=-1, descending=True)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)[None]
    cut = (top_k > 0)[:, None] & (rank >= top_k[:, None])
    cut |= ordered < ordered[:, :1] + min_p.log()[:, None]
    probability = ordered.masked_fill(cut, -torch.inf).softmax(dim=-1)
    mass_before = probability.cumsum(dim=-1) - probability
    cut |= (top_p < 1)[:, None] & (mass_before >= top_p[:, None])
    cut[:, 0] = False
    return torch.zeros_like(cut).scatter_(-1, order, cut)


def penalised(
    logits: torch.Tensor,
    prompt: torch.Tensor,
    reply: torch.Tensor,
    *,
    repetition: float,
    presence: float,
    frequency: float,
) -> torch.Tensor:
    """One row's logits, (vocabulary,), less of what was said already; ``prompt`` and ``reply`` are token ids.

    What stands in prompt or reply: l / repetition where l > 0, else l * repetition (CTRL, arXiv:1909.05858). Then
    l - frequency * (how often it is in the reply) - presence * (whether it is), as OpenAI and vLLM define them.
    """
    counts = torch.bincount(reply, minlength=len(logits)).to(logits.dtype)
    said = (counts > 0) | (torch.bincount(prompt, minlength=len(logits)) > 0)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(said, repeated, logits) - frequency * counts - presence * (counts > 0)


def draw(logprobs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token a row, (rows,): the inverse of the cumulative distribution at ``uniform`` in [0, 1).

    Each row's draw depends on its own number alone, so a seeded request gets the same reply in any batch.
    """
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    point = uniform.double()[:, None] * cumulative[:, -1:]
    chosen = (cumulative <= point).sum(dim=-1).clamp(max=logprobs.shape[-1] - 1)
    impossible = logprobs.gather(-1, chosen[:, None])[:, 0] == -torch.inf  # rounding at the very end of the line
    return torch.where(impossible, logprobs.argmax(dim=-1), chosen)
