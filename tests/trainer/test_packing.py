"""What sequences share is computed once, and gives the log probabilities and gradients that each has by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from services.trainer.learning import attention, likelihood, packing
from services.trainer.learning import parts as going_through
from services.trainer.learning.attention import Packed
from services.trainer.learning.likelihood import Likelihood
from services.trainer.learning.packing import packed
from services.trainer.learning.parts import Parts
from services.trainer.learning.samples import Sample
from services.trainer.learning.sequences import TokenSequence
from services.trainer.training import Episode

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
}  # fmt: skip
PROMPT = tuple(range(1, 25))


@pytest.fixture(autouse=True)
def short_ones_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)  # as tests/trainer/conftest.py: two that wait for each other are slower where others work
    monkeypatch.setattr(packing, "LEAST_SHARED", 1)
    monkeypatch.setattr(going_through, "BRANCH_TOKENS", 0)


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


@pytest.fixture(scope="module")
def tiny() -> Any:
    return llama()


def sample(ids: Sequence[int], own: Sequence[bool], temperature: float = 1.0) -> Sample:
    """A sequence whose own tokens were drawn at a temperature, those in odd places at another."""
    temperatures = tuple(temperature * (1 + place % 2) if mine else 1.0 for place, mine in enumerate(own))
    tokens = TokenSequence(tuple(ids), tuple(own), (-1.0,) * len(ids), () if temperature == 1 else temperatures)
    drawn = (-1.0,) * sum(own[1:])
    return Sample(Episode("a", "t", "g", "exact", 1.0, 0.5, ()), tokens, drawn, drawn, drawn)


def replied(prompt: Sequence[int], reply: Sequence[int], temperature: float = 1.0) -> Sample:
    return sample((*prompt, *reply), (False,) * len(prompt) + (True,) * len(reply), temperature)


def plain(model: Any, part: Sequence[Sample]) -> torch.Tensor:
    """Each sequence by itself, all logits."""
    found = []
    for one in part:
        ids, own = torch.tensor(one.tokens.ids), torch.tensor(one.tokens.own)
        divisor = torch.tensor(one.tokens.temperatures or [1.0] * len(ids))
        logprobs = (model(ids[None]).logits[0, :-1] / divisor[1:, None]).log_softmax(-1)
        found.append(logprobs.gather(-1, ids[1:, None])[:, 0][own[1:]])
    return torch.cat(found)


def gradients(model: Any, values: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    (values * torch.linspace(-1, 1, len(values))).mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def the_same(model: Any, parts: Parts, minibatch: Sequence[Sample]) -> list[list[Sample]]:
    """The parts, whose values and gradients are those of each sequence by itself."""
    found = list(parts.of(minibatch))
    assert sorted(map(id, minibatch)) == sorted(id(one) for part in found for one in part)
    for part in found:
        wanted = plain(model, part)
        want = gradients(model, wanted)
        values = parts.logprobs(part)
        torch.testing.assert_close(values, wanted, atol=1e-5, rtol=1e-5)
        for one, other in zip(gradients(model, values), want, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    return found


def rows_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """How many tokens each packed row has that goes through a model from here on."""
    sizes: list[int] = []
    whole = Likelihood.of_row
    monkeypatch.setattr(
        Likelihood, "of_row", lambda self, row, *rest: (sizes.append(len(row.ids)), whole(self, row, *rest))[1]
    )
    while True:
        yield sum(sizes)


# the row ----------------------------------------------------------------------------------------
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=8))
def test_a_row_holds_each_prefix_once_and_each_sequence_whole(sequences: list[tuple[int, ...]]) -> None:
    row = packed(sequences)
    assert len(row.ids) == len({one[:length] for one in sequences for length in range(1, len(one) + 1)})
    ends = row.ends()
    for number, ids in enumerate(sequences):
        places = row.places(number)
        assert tuple(row.ids[place] for place in places) == ids
        assert [row.positions[place] for place in places] == list(range(len(ids)))
        assert [j for j in range(len(row.ids)) if j <= places[-1] < ends[j]] == places


def test_few_tokens_in_common_are_no_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LEAST_SHARED", 16)
    assert len(packed([(*PROMPT[:15], 40), (*PROMPT[:15], 41)]).ids) == 32
    assert len(packed([(*PROMPT[:16], 40), (*PROMPT[:16], 41)]).ids) == 18


# what goes through the model -----------------------------------------------------------------------
def test_a_group_shares_its_prompt(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = rows_of(monkeypatch)
    next(sizes)
    parts = Parts(Likelihood(tiny), micro_tokens=4096)
    group = [replied(PROMPT, range(30, 31 + member), 0.7 if member % 3 else 1.0) for member in range(8)]
    other = [replied((50, *PROMPT), (9, 9, 30 + member)) for member in range(8)]
    alone = [replied((60, 61), (62,)), replied(PROMPT[:5], (63,))]
    [part] = the_same(tiny, parts, [*group, *other, *alone])
    assert len(part) == 18
    assert next(sizes) == (24 + 8) + (25 + 2 + 8) + 3 + 1


def test_turns_that_part_late_share_what_came_before(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own tokens in the middle, which two members have in common, each at its own temperature; one ends there."""
    sizes = rows_of(monkeypatch)
    next(sizes)
    own = (False,) * 24 + (True,) * 4 + (False,) * 6 + (True,) * 3
    talk = (*PROMPT, 40, 41, 42, 43, *PROMPT[:6], 50, 51)
    members = [
        sample((*talk, 52), own),
        sample((*talk, 53), own, 0.5),
        sample(talk[:28], own[:28]),
        sample(talk, own[:36]),
    ]
    the_same(tiny, Parts(Likelihood(tiny), micro_tokens=4096), [*members, members[0]])
    assert next(sizes) == 36 + 2


tokens = st.integers(0, 2)
replies = st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=4)
groups = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=9), replies, st.sampled_from([1.0, 0.5])), min_size=1, max_size=3
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups, st.sampled_from([8, 24, 4096]))
def test_gradients_are_those_of_each_by_itself(tiny: Any, shapes: Any, micro_tokens: int) -> None:
    members = [replied(prompt, reply, heat) for prompt, replies, heat in shapes for reply in replies]
    the_same(tiny, Parts(Likelihood(tiny), micro_tokens=micro_tokens), members)


def test_activations_are_computed_again_before_a_shared_prompt_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group whose prompt outweighs its replies stays together in less memory; what shares little does not."""
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 64 * 16)
    model = llama(num_hidden_layers=8)
    monkeypatch.setattr(likelihood, "ACTIVATION_BYTES", 40 * 8 * 4 * (12 * 32 + 4 * 48))
    through = Likelihood(model)
    assert through.tokens_at_once == 40 < through.tokens_recomputed
    parts = Parts(through, micro_tokens=4096)
    group = [replied(PROMPT, (30 + member,) * 6) for member in range(8)]
    assert [len(part) for part in the_same(model, parts, group)] == [8]
    long = [replied(PROMPT[:8], (30 + member,) * 12) for member in range(4)]
    assert [len(part) for part in the_same(model, parts, long)] == [2, 2]
    assert [len(part) for part in the_same(model, Parts(through, micro_tokens=36), group)] == [2] * 4


# families -----------------------------------------------------------------------------------------------
def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2))


def gemma2() -> Any:
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_logit_softcapping=5.0))


def bloom() -> Any:
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))


def mamba2() -> Any:
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "num_hidden_layers": 2, "n_groups": 1}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=64, **sizes))


def adapted() -> Any:
    return get_peft_model(llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False))


FAMILIES = {
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)), True),
    "gpt2, whose positions are learned": (gpt2, True),
    "an adapter": (adapted, True),
    "no windows": (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)), True),
    "windows": (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4096)), False),
    "capped attention": (gemma2, False),
    "attention of its own": (bloom, False),
    "a recurrence": (mamba2, False),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_packed_where_its_attention_is_plain(family: str) -> None:
    make, packs = FAMILIES[family]
    torch.manual_seed(0)
    model = make().eval()
    before = model.config._attn_implementation
    through = Likelihood(model)
    assert through.packs is packs
    assert (model.config._attn_implementation == before) is not packs
    the_same(model, Parts(through, micro_tokens=4096), [replied(PROMPT, (30 + n,) * 3, 0.7) for n in range(4)])


# on a GPU ---------------------------------------------------------------------------------------
def test_blocks_are_those_that_somebody_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FlexAttention would find them from the mask of tokens by tokens, which is never made."""
    monkeypatch.setattr(attention, "BLOCK", 16)
    row = packed([(1,) * 70 + (n,) * length for n, length in ((2, 3), (3, 40), (4, 20))] + [(5,) * 9, (6,) * 33])
    held = Packed.of(row, torch.device("cpu"))
    size = len(row.ids)
    want = create_block_mask(held.visible, None, None, size, size, device="cpu", BLOCK_SIZE=16)
    for part in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(held.blocks, part), getattr(want, part)), part
    assert torch.equal(held.blocks.to_dense(), want.to_dense())


def test_flex_attention_gives_what_branches_give() -> None:
    row = packed([(*PROMPT * 6, 40, 41), (*PROMPT * 6, 42), (9,) * 30])
    held = Packed.of(row, torch.device("cpu"))
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, len(row.ids), 16) for heads in (4, 2, 2))
    with torch.no_grad():
        want, _ = attention.attend(None, query, key, value, None, packed=held)
        found = attention.by_blocks(flex_attention, query, key, value, 0.25, held)
    torch.testing.assert_close(found.transpose(1, 2), want, atol=1e-5, rtol=1e-5)
