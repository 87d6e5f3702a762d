"""The losses, each a pure function of tensors that reads like its formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IMPORTANCE_CAP = 2.0


@dataclass(frozen=True)
class GrpoTerms:
    """``loss`` to go down; ``clipped`` and ``ratio`` are sums over own tokens, to be shown."""

    loss: torch.Tensor
    clipped: torch.Tensor
    ratio: torch.Tensor


@dataclass(frozen=True)
class OwnTokens:
    """What is known of the tokens that a loss is over, each tensor (n,), one entry a token of the agent's own.

    ``sequence`` says by number which sequence of the part a token is of; ``weights`` are 1 but for stale tokens.
    """

    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    sequence: torch.Tensor


def grpo_loss(logprobs: torch.Tensor, own: OwnTokens, *, clip_epsilon: float, tokens: float) -> GrpoTerms:
    """GRPO with a token-level ratio, clipped, and without a KL term.

        r_t  = exp(logprob_t - old_logprob_t)
        L    = - 1/T  sum_t  w_t  min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t)

    GRPO, arXiv:2402.03300, eq. 3; normalised by the number T of own tokens in the whole minibatch, as in DAPO,
    arXiv:2503.14476, eq. 8, so that a long reply's tokens weigh as much as a short one's. ``logprobs`` is (n,), one
    entry an own token. ``tokens`` is T, given from outside because a minibatch may go through the model in parts
    whose gradients are added.
    """
    ratio = torch.exp(logprobs - own.old_logprobs)
    within = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon)
    gain = torch.minimum(ratio * own.advantages, within * own.advantages) * own.weights
    clipped = ratio * own.advantages > within * own.advantages
    return GrpoTerms(-gain.sum() / tokens, clipped.sum(), ratio.detach().sum())


def importance(parent_logprobs: torch.Tensor, recorded_logprobs: torch.Tensor) -> torch.Tensor:
    """Weight of a token that another version drew: w = min(parent's probability / that version's, cap).

    Truncated importance sampling (Ionides 2008); the ratio in ``grpo_loss`` is then taken against the parent, as
    in decoupled PPO, arXiv:2110.00641.
    """
    return torch.exp(parent_logprobs - recorded_logprobs).clamp(max=IMPORTANCE_CAP)


def imitation_loss(logprobs: torch.Tensor, *, tokens: float) -> torch.Tensor:
    """Mean cross-entropy of the assistant's own tokens: L = - 1/T sum_t logprob_t."""
    return -logprobs.sum() / tokens
