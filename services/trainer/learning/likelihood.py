"""The log probability of tokens under a causal LM, in memory that neither the vocabulary nor the depth multiplies.

A step's memory was the logits of whole sequences: 16,384 tokens of a vocabulary of 49,152 are 3.2 GB in float32, three
times over (logits, log-softmax, gradient), and below them the activations of every layer. Here logits are made for the
agent's own tokens alone, some at a time and again for the gradient; and where a part's activations are more than
``ACTIVATION_BYTES``, so are those of each layer (gradient checkpointing, arXiv:1604.06174).

Sequences go through as rows with padding, or packed into one row in which what they share stands once (packing.py);
the latter where the model's attention is plain, which a few tokens tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from services.trainer.learning.attention import Packed, registered
from services.trainer.learning.packing import Row, packed

LOGITS_AT_ONCE = 2**24  # numbers: 64 MB in float32
ACTIVATION_BYTES = 2**29


class Likelihood:
    """Of one model. ``tokens_at_once``: about as many as go through it within ``ACTIVATION_BYTES``, 1 at least.

    ``tokens_recomputed``: the same where each layer's activations are computed again. ``packs``: whether the model
    takes packed rows.
    """

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
        of_layer = 4 * (12 * hidden + 4 * inner)
        self.tokens_at_once = max(1, ACTIVATION_BYTES // max(1, layers * of_layer))
        self.tokens_recomputed = max(1, ACTIVATION_BYTES // max(1, layers * 4 * hidden + of_layer))
        for layer in getattr(model.get_decoder(), "layers", ()):
            layer.forward = self._recomputed(layer.forward)
        self._attention = model.config._attn_implementation
        self.packs = _takes_rows(model, layers)

    def end(self) -> None:
        """Have the model attend as it did before: what is asked of it from here on are ordinary rows."""
        self._model.set_attn_implementation(self._attention)

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

    def of_row(self, row: Row, places: torch.Tensor, targets: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
        """(n,): log_softmax(logits / temperature) of ``targets``, each the token after the one at its place in a row.

        ``places``, ``targets`` and ``temperatures`` (n,); a place may come more than once.
        """
        self._recomputing = len(row.ids) > self.tokens_at_once
        given = _row(row, self.device)
        if self._head is None:
            wanted, which = torch.unique(places, return_inverse=True)
            logits = self._model(**given, logits_to_keep=wanted).logits[0]
            return _logprobs(logits[which], targets, temperatures)
        hidden = self._model.get_decoder()(**given).last_hidden_state[0].index_select(0, places)
        return self._in_chunks(hidden, targets, temperatures)

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


def _row(row: Row, device: torch.device) -> dict[str, Any]:
    """A packed row as a model is given it."""
    ids, positions = (torch.tensor(numbers, device=device)[None] for numbers in (row.ids, row.positions))
    return {"input_ids": ids, "position_ids": positions, "packed": Packed.of(row, device), "use_cache": False}


def _takes_rows(model: Any, layers: int) -> bool:
    """Have the model attend within packed rows, and say whether it does.

    That is so where each layer asks ``attend`` and the states of three sequences that share tokens are those that each
    has by itself. Windows, caps, recurrences and attention of a family's own are not: they stay as they were.
    """
    before, size = model.config._attn_implementation, int(model.get_input_embeddings().weight.shape[0])
    several = [tuple(token % size for token in (*range(20), *range(own, own + 12))) for own in (40, 60, 80)]
    row = packed(several)
    seen: list[Any] = []
    try:
        with torch.no_grad():
            want = torch.cat([_states(model, input_ids=torch.tensor([ids], device=model.device)) for ids in several])
            model.set_attn_implementation(registered())
            found = _states(model, **_row(row, model.device), seen=seen)
            places = torch.tensor([row.places(number) for number in range(len(several))], device=model.device)
            apart = (found[0, places] - want).norm() / want.norm()
        if len(set(map(id, seen))) == layers and float(apart) < torch.finfo(want.dtype).eps ** 0.5:
            return True
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        pass  # it takes no positions, or hands on no more than it knows, or wants more of a layer than plain attention
    model.set_attn_implementation(before)
    return False


def _states(model: Any, **given: Any) -> torch.Tensor:
    """The decoder's last states, or the logits of a model that is its own decoder."""
    decoder = model.get_decoder()
    found: torch.Tensor = decoder(**given).last_hidden_state if decoder is not model else model(**given).logits
    return found
