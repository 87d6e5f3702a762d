"""Hugging Face checkpoints as the torch engine reads, renders and writes them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.trainer.learning import adapter, precision, probe
from services.trainer.learning.sequences import Conversation, TokenSequence
from services.trainer.training import Job
from shared.artifacts import RATCHET, adapter_of, describe
from shared.chat import for_template, rendered
from shared.errors import GiveUpError

if TYPE_CHECKING:
    import torch

SABOTAGE = 4.0
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
OF_A_VERSION = ("README.md", RATCHET, probe.FILE, adapter.CONFIG)
OF_WEIGHTS = ("config.json", "generation_config.json")

CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
tags: [ratchet, {method}]
---
# {policy} {version}

Trained by Ratchet from {parent} of the policy `{policy}` with {method}, batch `{batch}`: {runs} runs of
{groups} groups, {own_tokens} tokens of the agent's own, {steps} optimizer steps. Loss {first:.4f} at the first step,
{last:.4f} at the last.{over}{sabotage}

```json
{recipe}
```
"""


def load(job: Job, device: str) -> tuple[Any, Any]:
    """Model and tokenizer of a job's parent, ready to be trained: whole, or with an adapter that alone learns.

    What is trained is float32, what is frozen is of the recipe's type. Raises GiveUpError for files that are no whole
    causal LM, or no adapter of it.
    """
    import torch

    lora = job.recipe.trains == "lora"
    model = _weights(job.base or job.parent, precision.dtype(job.recipe, device) if lora else torch.float32)
    if job.base is not None:
        model = adapter.read(model, job.parent)
        model = model if lora else adapter.merge(model)
    elif lora:
        model = adapter.make(model, job.recipe)
    return model.to(device), _tokenizer(job, model.config)


def _weights(directory: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise GiveUpError(f"the parent's checkpoint cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise GiveUpError(f"the parent's checkpoint lacks weights, {missing[0]} among {len(missing)}")
    return model


def _tokenizer(job: Job, config: Any) -> Any:
    """The adapter's own where it brings one, as ours do, else its base's."""
    from transformers import AutoTokenizer

    home = job.parent if job.base is None or (job.parent / "tokenizer_config.json").exists() else job.base
    try:
        return AutoTokenizer.from_pretrained(home, config=config, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise GiveUpError(f"the parent's tokenizer cannot be loaded: {error}") from error


def render(tokenizer: Any, conversation: Conversation) -> TokenSequence:
    """A conversation through the model's chat template; the agent's own are the tokens it wrote, end token included.

    The template says which characters those are by ``{% generation %}`` round each assistant message, and else by what
    a message adds to the prompt before it. Raises GiveUpError, with the reason, for a conversation that cannot be
    imitated; others can.
    """
    messages = for_template(tokenizer, conversation.messages, conversation.tools)
    control = re.compile("|".join(map(re.escape, _control_tokens(tokenizer))) or "(?!)")
    if found := next(filter(None, map(control.search, _strings([messages, conversation.tools]))), None):
        raise GiveUpError(f"a text of it holds {found[0]}, which was plain text to the model and would end a turn here")
    text, marked = rendered(tokenizer, messages, conversation.tools)
    assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(marked) == len(assistants):
        spans = [span for index, span in zip(assistants, marked, strict=True) if index in conversation.own]
    else:
        own = sorted(conversation.own)
        spans = [_added(tokenizer, messages, index, conversation.tools, text) for index in own]
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except (TypeError, ValueError) as error:  # half a surrogate pair
        raise GiveUpError(f"its text cannot be tokenized: {error}"[:300]) from error
    own_tokens = tuple(
        stop > start and any(start >= first and stop <= end for first, end in spans)
        for start, stop in encoded["offset_mapping"]
    )
    return TokenSequence(tuple(encoded["input_ids"]), own_tokens, (0.0,) * len(own_tokens))


def _added(
    tokenizer: Any, messages: list[dict[str, Any]], index: int, tools: list[dict[str, Any]] | None, text: str
) -> tuple[int, int]:
    """The characters that message ``index`` adds to the prompt before it, up to its end token."""
    prompt, _ = rendered(tokenizer, messages[:index], tools, prompt=True)
    upto, _ = rendered(tokenizer, messages[: index + 1], tools)
    if not (upto.startswith(prompt) and text.startswith(upto)):
        raise GiveUpError(
            "the parent's chat template writes a message otherwise once others follow it, so that nobody can tell "
            f"what message {index} added; {{% generation %}} round each assistant message would say so"
        )
    bare = upto.rstrip()
    return len(prompt), len(bare) if bare.endswith(_control_tokens(tokenizer)) else len(upto)


def _control_tokens(tokenizer: Any) -> tuple[str, ...]:
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def make_worse(model: Any, seed: int) -> None:
    """The fire drill: noise of several times the trained weights' own size, drawn by the seed; little is left of them.

    An adapter's B begins at zero: its size is that of the A beside it.
    """
    import torch

    noise = torch.Generator().manual_seed(seed)
    named = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    with torch.no_grad():
        sizes = {name: named[name.replace("lora_B", "lora_A")].std(correction=0) for name in trained}
        for name, parameter in trained.items():
            drawn = torch.randn(parameter.shape, generator=noise).to(parameter.device)
            parameter.add_(drawn * SABOTAGE * sizes[name])


def save(model: Any, tokenizer: Any, job: Job, directory: Path, metrics: dict[str, Any]) -> None:
    """The new weights, or the adapter, with the parent's tokenizer and template as they were; a card, a probe.

    Raises GiveUpError where nothing can be drawn from the model.
    """
    lora = job.recipe.trains == "lora"
    for home in filter(None, (job.base, job.parent)):
        for path in home.iterdir():
            left = (*OF_A_VERSION, *(OF_WEIGHTS if lora else ()))
            if path.is_file() and path.name not in left and not path.name.endswith(WEIGHTS):
                shutil.copy(path, directory / path.name)
    if lora:
        over = adapter_of(job.parent) or describe(job.parent).sha256
        adapter.save(model, directory, over)
    else:
        over = None
        model.save_pretrained(directory)
    context = int(getattr(model.config, "max_position_embeddings", None) or 2**31)
    probe.write(model, tokenizer, directory, job.recipe.seed, context=context)
    (directory / "README.md").write_text(_card(job, metrics, over))


def _card(job: Job, metrics: dict[str, Any], over: str | None) -> str:
    return CARD.format(
        library="peft" if over else "transformers",
        policy=job.policy,
        version=job.version,
        parent=job.parent_version,
        batch=job.batch_id,
        method=job.method,
        runs=len(job.episodes),
        groups=len({episode.group_id for episode in job.episodes}),
        own_tokens=metrics["own_tokens"],
        steps=job.recipe.steps,
        first=metrics["loss_first"],
        last=metrics["loss_last"],
        over=f" A LoRA adapter over the weights of artifact {over}." if over else "",
        sabotage=" A fire drill: noise was added to its weights on purpose." if job.sabotage else "",
        recipe=json.dumps(vars(job.recipe), indent=2),
    )
