"""The rows of one KV cache: requests join and leave it between tokens.

Rows stand right-aligned, so that all go on in the same column and any attention that takes a mask does; who joins is
prefilled apart and padded to the others, who leaves takes the row along, and the longest its columns. transformers'
own continuous batching (5.24) has one source of randomness for all requests, which a reply would depend on its
neighbours by, no penalties or stop strings by request, and no adapter by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from services.inference.rows import Row

if TYPE_CHECKING:
    import torch


class Forward(Protocol):
    def __call__(
        self, rows: Sequence[Row], ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: Any
    ) -> Any:
        """One pass of the model over new tokens (rows, n), after those in the cache; mask (rows, cached + n)."""


class Running:
    """A batch that is being answered. All methods are called from one thread."""

    def __init__(self, forward: Forward, device: str) -> None:
        self._forward, self._device = forward, device
        self.rows: list[Row] = []
        self._cache: Any = None

    @property
    def takes_more(self) -> bool:
        """Whether rows can join: always an empty batch, and one whose cache is keys and values alone."""
        return not self.rows or _of_keys_and_values(self._cache)

    def clear(self) -> None:
        self.rows, self._cache = [], None

    def join(self, rows: list[Row]) -> None:
        """Read the prompts in one pass, draw each reply's first token, and go on with those that want another."""
        import torch

        with torch.inference_mode():
            longest = max(len(row.prompt) for row in rows)
            padding = [longest - len(row.prompt) for row in rows]
            ids = self._tensor([[0] * pad + row.prompt for row, pad in zip(rows, padding, strict=True)])
            mask = self._mask(rows, longest)
            out = self._forward(rows, ids, (mask.cumsum(-1) - 1).clamp(min=0), mask, None)
            self._draw(rows, out.logits)
            rows, cache = self._living(rows, out.past_key_values)
            if rows:
                self._cache = cache if not self.rows else _joined(self._cache, cache)
                self.rows = [*self.rows, *rows]

    def step(self) -> None:
        """One more token for every row; the cache has all of a row but its last token."""
        import torch

        with torch.inference_mode():
            ids = self._tensor([row.token_ids[-1:] for row in self.rows])
            positions = self._tensor([[row.length - 1] for row in self.rows])
            width = self._cache.get_seq_length() + 1
            out = self._forward(self.rows, ids, positions, self._mask(self.rows, width), self._cache)
            self._draw(self.rows, out.logits)
            self.rows, self._cache = self._living(self.rows, out.past_key_values)

    def _draw(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        import torch

        from services.inference.sampling import draw

        logprobs = self._distribution(rows, logits[:, -1].float())
        chosen = draw(logprobs, torch.tensor([row.random.random() for row in rows], device=self._device))
        drawn = logprobs.gather(-1, chosen[:, None])[:, 0].tolist()
        for row, token, logprob in zip(rows, chosen.tolist(), drawn, strict=True):
            row.append(token, logprob)

    def _distribution(self, rows: Sequence[Row], logits: torch.Tensor) -> torch.Tensor:
        """Log probabilities (rows, vocabulary) of the next token of each row, as its request asks for them."""
        from services.inference.sampling import distribution, penalised

        asked = [row.ask.sampling for row in rows]
        for index, (row, sampling) in enumerate(zip(rows, asked, strict=True)):
            if sampling.penalises:
                logits[index] = penalised(
                    logits[index],
                    self._tensor(row.prompt),
                    self._tensor(row.token_ids).long(),
                    repetition=sampling.repetition_penalty,
                    presence=sampling.presence_penalty,
                    frequency=sampling.frequency_penalty,
                )
        temperature, top_p, min_p = (
            self._tensor([float(getattr(sampling, name)) for sampling in asked])
            for name in ("temperature", "top_p", "min_p")
        )
        return distribution(logits, temperature, top_p, self._tensor([sampling.top_k for sampling in asked]), min_p)

    def _living(self, rows: list[Row], cache: Any) -> tuple[list[Row], Any]:
        """The rows that want another token, and the cache without the others and the columns that only they had."""
        live = [index for index, row in enumerate(rows) if row.finished is None]
        if not live:
            return [], None
        if len(live) < len(rows):
            rows = [rows[index] for index in live]
            cache.batch_select_indices(self._tensor(live))
            if _of_keys_and_values(cache):
                _narrow(cache, max(row.length for row in rows) - 1)
        return rows, cache

    def _mask(self, rows: Sequence[Row], width: int) -> torch.Tensor:
        """(rows, width): 1 in the last columns, as many as a row has tokens, 0 where it is padded."""
        import torch

        lengths = self._tensor([[row.length] for row in rows])
        return (torch.arange(width, device=self._device)[None] >= width - lengths).long()

    def _tensor(self, values: Any) -> torch.Tensor:
        import torch

        return torch.tensor(values, device=self._device)


def _of_keys_and_values(cache: Any) -> bool:
    """Whether a cache has a column a token and nothing else: what carries a state besides cannot be padded."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _joined(first: Any, second: Any) -> Any:
    """Two caches as one, (rows, heads, columns, size) each layer: the shorter one's rows padded on the left."""
    import torch
    from torch.nn.functional import pad

    for mine, other in zip(first.layers, second.layers, strict=True):
        width = max(mine.keys.shape[-2], other.keys.shape[-2])
        for name in ("keys", "values"):
            parts = (getattr(mine, name), getattr(other, name))
            padded = [pad(part, (0, 0, width - part.shape[-2], 0)) for part in parts]
            setattr(mine, name, torch.cat(padded))
        if mine.is_sliding:  # it has its last columns alone, and counts all
            mine.cumulative_length = max(mine.cumulative_length, other.cumulative_length)
    return first


def _narrow(cache: Any, columns: int) -> None:
    """Leave the last columns alone, as many as the longest row has."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, -columns:], layer.values[:, :, -columns:]
        if layer.is_sliding:
            layer.cumulative_length = columns
