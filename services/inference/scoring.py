"""How probable a model finds given tokens: read a part at a time, so that their logits never are in memory together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from services.inference.domain import Refused, Scored
from services.inference.rows import Version

LOGITS_AT_A_TIME = 2**25  # 128 MiB of float32
LEAST = -9999.0  # a probability of 0, as JSON can say it; vLLM's number


class Read(Protocol):
    def __call__(self, **given: Any) -> Any:
        """The model's outputs for one row of new tokens after those in its cache."""


def scored(read: Read, version: Version, ids: Sequence[int], vocabulary: int, device: str) -> Scored | Refused:
    """Log probabilities at temperature 1 of each token after those before it, and one token more, drawn."""
    import torch

    from services.inference.sampling import draw

    size = max(1, LOGITS_AT_A_TIME // vocabulary)
    logprobs: list[float | None] = [None]
    ranks: list[int | None] = [None]
    cache: Any = None
    with torch.inference_mode():
        given = torch.tensor([ids], device=device)
        for start in range(0, len(ids), size):
            part = given[:, start : start + size]
            out = read(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=part.shape[1])
            cache = out.past_key_values
            found = out.logits[0].float().log_softmax(dim=-1)
            following = given[0, start + 1 : start + 1 + part.shape[1], None]
            said = found[: len(following)].gather(-1, following)
            logprobs += said[:, 0].clamp(min=LEAST).tolist()
            ranks += ((found[: len(following)] > said).sum(dim=-1) + 1).tolist()
        if bool(found.isnan().any()) or any(math.isnan(value or 0) for value in logprobs):
            return Refused("the model's probabilities are not numbers; its weights are broken", "model_broken")
        drawn = int(draw(found[-1:], torch.rand(1, device=device)))
    texts = [version.tokenizer.decode([token]) for token in ids]
    return Scored(list(ids), logprobs, ranks, texts, (drawn, version.text([drawn])))
