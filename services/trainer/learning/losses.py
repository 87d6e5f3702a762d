"""The losses, each a pure function of flat tensors that reads like its formula, and the choice that a recipe makes.

``r_t = exp(logprob_t - old_logprob_t)`` throughout: how much more probable a token is than it was to the parent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from services.trainer.training import Importance, LossName, MaskName, Recipe

TOKEN_CAP = 2.0
SEQUENCE_CAP = 3.0
OFF_POLICY_BOUND = 0.5
TOTAL_VARIATION_BOUND = 0.2


@dataclass(frozen=True)
class OwnTokens:
    """What is known of the tokens that a loss is over, each tensor (n,), one entry a token of the agent's own.

    ``old_logprobs`` are the parent's, ``drawn_logprobs`` those of the version that drew the token. ``sequence`` says by
    number which sequence of the part a token is of; ``weights`` are 1 but for stale tokens.
    """

    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    sequence: torch.Tensor
    drawn_logprobs: torch.Tensor


@dataclass(frozen=True)
class Clip:
    """How far a token may move: its ratio counts within [1 - low, 1 + high]; ``dual`` bounds what a bad one costs."""

    low: float
    high: float
    dual: float


@dataclass(frozen=True)
class Gain:
    """Of each token (n,): ``value`` is to go up, ``held`` where a bound holds it."""

    value: torch.Tensor
    held: torch.Tensor


@dataclass(frozen=True)
class Terms:
    """``loss`` to go down, and sums over own tokens by the name under which they are shown."""

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


# what is to go up -----------------------------------------------------------------------------------
def clipped(logprobs: torch.Tensor, own: OwnTokens, clip: Clip) -> Gain:
    """What GRPO raises: min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t).

    ``low = high`` in GRPO, arXiv:2402.03300, eq. 3, without its KL term. Clip-higher has the upper bound further away,
    so that what is improbable can become probable: 0.2 and 0.28 in DAPO, arXiv:2503.14476, eq. 10.
    """
    ratio = torch.exp(logprobs - own.old_logprobs)
    free = ratio * own.advantages
    within = ratio.clamp(1 - clip.low, 1 + clip.high) * own.advantages
    return Gain(torch.minimum(free, within), free > within)


def dual_clipped(logprobs: torch.Tensor, own: OwnTokens, clip: Clip) -> Gain:
    """The same, and no bad token costs more than ``dual`` times its advantage: max(clipped_t, dual A_t) where A_t < 0.

    Else a token that the parent all but ruled out, and that was bad, would have a loss without a bound.
    arXiv:1912.09729, with dual = 3.
    """
    once = clipped(logprobs, own, clip)
    floor = clip.dual * own.advantages
    held = (own.advantages < 0) & (once.value < floor)
    return Gain(torch.where(held, floor, once.value), once.held | held)


def cispo(logprobs: torch.Tensor, own: OwnTokens, clip: Clip) -> Gain:
    """REINFORCE under a bounded weight: sg(clip(r_t, 1 - low, 1 + high)) A_t logprob_t, where sg stops the gradient.

    The weight is held, never the token: each keeps a gradient. CISPO, arXiv:2506.13585, eq. 4 and 5, which leaves the
    lower bound away (low = 1); weights up to 5 as in ScaleRL, arXiv:2510.13786, and TRL.
    """
    ratio = torch.exp(logprobs - own.old_logprobs).detach()
    weight = ratio.clamp(1 - clip.low, 1 + clip.high)
    return Gain(weight * own.advantages * logprobs, weight != ratio)


GAINS: Mapping[LossName, Callable[[torch.Tensor, OwnTokens, Clip], Gain]] = {
    "grpo": clipped,
    "clip_higher": clipped,
    "dual_clip": dual_clipped,
    "cispo": cispo,
}


def clip_of(recipe: Recipe) -> Clip:
    """The bounds of a recipe: as they stand in it, and where they do not, as the loss's source has them."""
    low, high = {"cispo": (1.0, 4.0), "clip_higher": (0.2, 0.28)}.get(recipe.loss, (recipe.clip_epsilon,) * 2)
    return Clip(
        low if recipe.clip_low is None else recipe.clip_low,
        high if recipe.clip_high is None else recipe.clip_high,
        recipe.dual_clip,
    )


# what is left out -----------------------------------------------------------------------------------
def near_policy(logprobs: torch.Tensor, own: OwnTokens, bound: float) -> torch.Tensor:
    """(n,) bool: False for each token of a bad sequence that the policy has moved away from.

    Those with A < 0 and mean_t(drawn_logprob_t - logprob_t) > bound, the mean over the sequence. DeepSeek-V3.2,
    arXiv:2512.02556, section 3.1; 0.5 is where TRL begins.
    """
    distance = _sequence_mean(own.drawn_logprobs - logprobs.detach(), own.sequence)
    return ~((own.advantages < 0) & (distance > bound))


def near_token(logprobs: torch.Tensor, own: OwnTokens, bound: float) -> torch.Tensor:
    """(n,) bool: False for a token whose probability has moved by more than ``bound`` the way its advantage points.

    The total variation of "this token or another", p_t against the p_t that drew it. DPPO, arXiv:2602.04879; 0.2 is
    prime-rl's.
    """
    moved = torch.exp(logprobs.detach()) - torch.exp(own.drawn_logprobs)
    return moved * own.advantages.sign() <= bound


MASKS: Mapping[MaskName, tuple[Callable[[torch.Tensor, OwnTokens, float], torch.Tensor], float]] = {
    "off_policy": (near_policy, OFF_POLICY_BOUND),
    "total_variation": (near_token, TOTAL_VARIATION_BOUND),
}


def _sequence_mean(values: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """(n,): at each token the mean over its sequence."""
    counts = torch.bincount(sequence)
    return (values.new_zeros(len(counts)).index_add_(0, sequence, values) / counts)[sequence]


def importance(
    parent_logprobs: torch.Tensor, recorded_logprobs: torch.Tensor, kind: Importance = "token"
) -> torch.Tensor:
    """(n,): weights of the tokens of one sequence that another version drew, by parent's / that version's probability.

    - ``token``: w_t = min(ratio_t, 2). Truncated importance sampling (Ionides 2008).
    - ``sequence_truncate``: w = min(prod_t ratio_t, 3), one for all its tokens.
    - ``sequence_mask``: w = prod_t ratio_t, and 0 where that is over 3. TRL's default.

    The ratio in the losses is then taken against the parent, as in decoupled PPO, arXiv:2110.00641.
    """
    difference = parent_logprobs - recorded_logprobs
    if kind == "token":
        return torch.exp(difference).clamp(max=TOKEN_CAP)
    whole = torch.exp(difference.sum()).expand_as(difference)
    if kind == "sequence_truncate":
        return whole.clamp(max=SEQUENCE_CAP)
    return torch.where(whole > SEQUENCE_CAP, 0.0, whole)


# how far the policy has come ------------------------------------------------------------------------
def kl(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(n,): an estimate of KL(policy | reference) from each token: exp(d) - d - 1, d = reference - logprob.

    Never below 0. Schulman's k3 (joschu.net/blog/kl-approx.html), as GRPO's penalty: arXiv:2402.03300, eq. 4.
    """
    difference = reference - logprobs
    return torch.exp(difference) - difference - 1


def overshoot(measured: Mapping[str, float], recipe: Recipe) -> str | None:
    """Why a batch is to end before this step is made, or None: its tokens have moved as far as the recipe lets them.

    PPO's early stop, mean KL > stop_kl (github.com/openai/spinningup); or |mean ratio - 1| > stop_ratio, a mean that is
    1 as long as the policy is near the one that drew the tokens.
    """
    if recipe.stop_kl is not None and measured.get("kl", 0.0) > recipe.stop_kl:
        return f"KL {measured['kl']:.3g} is over stop_kl {recipe.stop_kl:g}"
    if recipe.stop_ratio is not None and abs(measured.get("ratio", 1.0) - 1) > recipe.stop_ratio:
        return f"mean ratio {measured['ratio']:.3g} is further than stop_ratio {recipe.stop_ratio:g} from 1"
    return None


# the loss of a recipe -------------------------------------------------------------------------------
def policy_loss(logprobs: torch.Tensor, own: OwnTokens, recipe: Recipe, *, tokens: float) -> Terms:
    """The loss that a recipe names, with its mask and its penalty.

        L = - 1/T  sum_t  m_t w_t gain_t  +  kl_weight/T  sum_t  kl_t

    Normalised by the number T of own tokens in the whole minibatch, as in DAPO, arXiv:2503.14476, eq. 8, so that a long
    reply's tokens weigh as much as a short one's. ``logprobs`` is (n,), one entry an own token. ``tokens`` is T, given
    from outside because a minibatch may go through the model in parts whose gradients are added.
    ``sums`` has, over its tokens: ``clipped``, ``ratio``, ``kl`` to the parent, ``masked`` (left out by mask or
    weight), and ``entropy_estimate``, - logprob, whose mean is the entropy as far as the policy drew the tokens itself.
    """
    gain = GAINS[recipe.loss](logprobs, own, clip_of(recipe))
    value, masked = gain.value * own.weights, own.weights == 0
    if recipe.mask != "none":
        keep, bound = MASKS[recipe.mask]
        masked = masked | ~keep(logprobs, own, bound if recipe.mask_bound is None else recipe.mask_bound)
        value = torch.where(masked, 0.0, value)
    distance = kl(logprobs, own.old_logprobs)
    loss = -value.sum() / tokens
    if recipe.kl_weight:
        loss = loss + recipe.kl_weight * distance.sum() / tokens
    sums = {
        "clipped": gain.held.sum(),
        "ratio": torch.exp(logprobs - own.old_logprobs).sum(),
        "kl": distance.sum(),
        "masked": masked.sum(),
        "entropy_estimate": -logprobs.sum(),
    }
    return Terms(loss, {name: total.detach() for name, total in sums.items()})


def imitation_loss(logprobs: torch.Tensor, *, tokens: float) -> torch.Tensor:
    """Mean cross-entropy of the assistant's own tokens: L = - 1/T sum_t logprob_t."""
    return -logprobs.sum() / tokens
