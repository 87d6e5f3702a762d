"""The log probability of tokens under a causal LM, in memory that neither the vocabulary nor the depth multiplies.

A step's memory was the logits of whole sequences: 16,384 tokens of a vocabulary of 49,152 are 3.2 GB in float32, three
times over (logits, log-softmax, gradient), and below them the activations of every layer. Here logits are made for the
agent's own tokens alone, some at a time and again for the gradient; and where a part's activations are more than
``ACTIVATION_BYTES``, so are those of each layer (gradient checkpointing, arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24  # numbers: 64 MB in float32
ACTIVATION_BYTES = 2**29


class Likelihood:
    """Of one model. ``tokens_at_once``: about as many as go through it within ``ACTIVATION_BYTES``, 1 at least."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device: torch.device = model.device
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.context = int(getattr(model.config, "max_position_embeddings", None) or 2**31)
        self._head = _plain_head(model)
        self._recomputing = False
        config = model.config.get_text_config()
        hidden = int(getattr(config, "hidden_size", 0) or 0)
        inner = int(getattr(config, "intermediate_size", 0) or 4 * hidden)
        layers = int(getattr(config, "num_hidden_layers", 0) or 0)
        self.tokens_at_once = max(1, ACTIVATION_BYTES // max(1, 4 * layers * (12 * hidden + 4 * inner)))
        for layer in getattr(model.get_decoder(), "layers", ()):
            layer.forward = self._recomputed(layer.forward)

    def of(self, ids: torch.Tensor, own: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
        """(n,): log_softmax(logits / temperature) of each next token that is the agent's own, row by row.

        ``ids`` (rows, positions); ``own`` and ``temperatures`` (rows, positions - 1), of the token that comes next.
        Padding stands on the right, where a causal model's real tokens never see it: no mask is needed.
        """
        self._recomputing = ids.numel() > self.tokens_at_once
        targets, divisor = ids[:, 1:][own], temperatures[own]
        if self._head is None:
            wanted = own.any(dim=0).nonzero()[:, 0]
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=wanted).logits
            return _logprobs(logits[own[:, wanted]], targets, divisor)
        hidden = self._model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][own]
        return self._in_chunks(hidden, targets, divisor)

    def _in_chunks(self, hidden: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
        head = self._head
        assert head is not None

        def chunk(states: torch.Tensor, wanted: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
            return _logprobs(head(states), wanted, temperature)

        size = max(1, LOGITS_AT_ONCE // int(head.weight.shape[0]))
        if len(targets) <= size:
            return chunk(hidden, targets, divisor)
        parts = zip(*(torch.split(whole, size) for whole in (hidden, targets, divisor)), strict=True)
        return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])

    def _recomputed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self._recomputing and torch.is_grad_enabled():
                return checkpoint(forward, *arguments, use_reentrant=False, **named)
            return forward(*arguments, **named)

        return call


def _logprobs(logits: torch.Tensor, targets: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    tempered = logits.float() / temperatures[:, None]
    return -torch.nn.functional.cross_entropy(tempered, targets, reduction="none")


def _plain_head(model: Any) -> Any | None:
    """The model's output layer, where logits are nothing but it over the decoder's last states; else None.

    Some families scale or cap what comes of it; a few tokens tell.
    """
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    if head is None or decoder is model:
        return None
    probe = torch.arange(4, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        whole = model(input_ids=probe, use_cache=False).logits
        apart = head(decoder(input_ids=probe, use_cache=False).last_hidden_state)
    return head if whole.shape == apart.shape and torch.allclose(whole, apart, atol=1e-4, rtol=1e-3) else None
