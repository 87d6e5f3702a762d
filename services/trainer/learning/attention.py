"""Attention within a packed row, behind the interface by which Hugging Face's models call any.

On a CPU a row is attended to branch by branch, on a GPU by FlexAttention, whose kernel skips the blocks that nobody
sees. Nowhere is a mask of tokens by tokens made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch

from services.trainer.learning.packing import Branch, Row

NAME = "ratchet_packed"
BLOCK = 128  # tokens by tokens, of which FlexAttention skips or computes the whole
TOLD = frozenset({"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "is_causal"})


@dataclass(frozen=True)
class Packed:
    """A row as the attention of each layer needs it; made once for all layers. ``ends`` is (tokens,)."""

    branches: tuple[Branch, ...]
    ends: torch.Tensor

    @classmethod
    def of(cls, row: Row, device: torch.device) -> Packed:
        return cls(tuple(row.branches), torch.tensor(row.ends(), device=device))

    @cached_property
    def visible(self) -> Any:
        """Whether token ``query`` sees token ``key``, in the form that FlexAttention asks for."""
        ends = self.ends

        def visible(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return (key <= query) & (query < ends[key])

        return visible

    @cached_property
    def blocks(self) -> Any:
        """The blocks that somebody sees, and those that all see whole, from the ends alone. A ``BlockMask``."""
        from torch.nn.attention.flex_attention import BlockMask

        tokens = len(self.ends)
        count = -(-tokens // BLOCK)
        held = torch.nn.functional.pad(self.ends, (0, count * BLOCK - tokens), value=tokens).view(count, BLOCK)
        first = torch.arange(count, device=self.ends.device) * BLOCK
        below = first[:, None] > first
        seen = (below & (first[:, None] < held.amax(1))) | (first[:, None] == first)
        whole = below & (first[:, None] + BLOCK <= held.amin(1))
        return BlockMask.from_kv_blocks(
            *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=self.visible,
            seq_lengths=(tokens, tokens),
        )  # fmt: skip


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row how many blocks are there, and their numbers first: (1, 1, n) and (1, 1, n, n), int32."""
    numbers = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], numbers.int()[None, None]


def registered() -> str:
    """The name under which models find ``attend``."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    return NAME


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: Packed | None = None,
    seen: list[Any] | None = None,
    **told: Any,
) -> tuple[torch.Tensor, None]:
    """A layer's attention; causal within each row where ``packed`` is None.

    ``query`` (batch, heads, tokens, width), ``key`` and ``value`` with as many heads or fewer; returns (batch, tokens,
    heads, width). ``seen`` gets the layers that were here. Raises ValueError where a layer wants more than plain
    attention: a window, a cap, a sink.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed is None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **told
        )
        return found
    strange = sorted(name for name, given in told.items() if given is not None and name not in TOLD)
    if strange or dropout or attention_mask is not None:
        raise ValueError(f"a packed row takes plain attention, this model wants {', '.join(strange) or 'a mask'}")
    if seen is not None:
        seen.append(module)
    scale = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
    if query.is_cuda:
        return by_blocks(_compiled(), query, key, value, scale, packed).transpose(1, 2), None
    fold = query.shape[1] // key.shape[1]
    key, value = (kept.repeat_interleave(fold, dim=1) if fold > 1 else kept for kept in (key, value))
    attended: torch.Tensor = _ByBranch.apply(query, key, value, scale, packed.branches)  # type: ignore[no-untyped-call]
    return attended.transpose(1, 2), None


# on a GPU ---------------------------------------------------------------------------------------
def by_blocks(
    flex: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, packed: Packed
) -> torch.Tensor:
    """By FlexAttention (arXiv:2412.05496), whose own kernel makes one product of many blocks."""
    found: torch.Tensor = flex(
        query, key, value, block_mask=packed.blocks, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return found


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


# on a CPU ---------------------------------------------------------------------------------------
class _ByBranch(torch.autograd.Function):
    """Each branch attends to itself causally, and all that continue a branch attend to it whole, in one product.

    What a token gets of the branches that it sees is put together by their log-sum-exps, and each share of the gradient
    follows from the sum of all: FlashAttention-2, arXiv:2307.08691, 3.1; ring attention, arXiv:2310.01889. The kernels
    are those that ``scaled_dot_product_attention`` runs on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, branches: Sequence[Branch]
    ) -> torch.Tensor:
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        total = query.new_empty(query.shape[:3], dtype=torch.float32)
        for own, _ in map(_slices, branches):
            out[own], total[own] = run(query[own], key[own], value[own], 0.0, True, scale=scale)
        for own, after in map(_slices, branches):
            if after is not None:
                more, weight = run(query[after], key[own], value[own], 0.0, False, scale=scale)
                both = torch.logaddexp(total[after], weight)
                out[after] = out[after].mul((total[after] - both).exp_()[..., None]) + more.mul(
                    (weight - both).exp_()[..., None]
                )
                total[after] = both
        ctx.save_for_backward(query, key, value, out, total)
        ctx.scale, ctx.branches = scale, branches
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        to_query, to_key, to_value = (torch.empty_like(kept) for kept in (query, key, value))

        def share(asks: tuple[slice, ...], own: tuple[slice, ...], causal: bool) -> tuple[torch.Tensor, ...]:
            found: tuple[torch.Tensor, ...] = run(
                grad[asks], query[asks], key[own], value[own], out[asks], total[asks], 0.0, causal, scale=ctx.scale
            )
            return found

        for own, _ in map(_slices, ctx.branches):
            to_query[own], to_key[own], to_value[own] = share(own, own, True)
        for own, after in map(_slices, ctx.branches):
            if after is not None:
                for whole, places, part in zip(
                    (to_query, to_key, to_value), (after, own, own), share(after, own, False), strict=True
                ):
                    whole[places] += part
        return to_query, to_key, to_value, None, None


def _slices(branch: Branch) -> tuple[tuple[slice, ...], tuple[slice, ...] | None]:
    """Of a branch its own tokens, and those that continue it, along the third of four dimensions."""
    whole = slice(None)
    after = (whole, whole, slice(branch.end, branch.stop)) if branch.stop > branch.end else None
    return (whole, whole, slice(branch.start, branch.end)), after
