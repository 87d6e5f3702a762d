"""Hugging Face checkpoints as the torch engine reads, renders and writes them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.trainer.learning.sequences import Conversation, TokenSequence
from services.trainer.training import Job
from shared.chat import for_template, rendered
from shared.errors import GiveUpError

SABOTAGE = 4.0
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [ratchet, {method}]
---
# {policy} {version}

Trained by Ratchet from {parent} of the policy `{policy}` with {method}, batch `{batch}`: {runs} runs of
{groups} groups, {own_tokens} tokens of the agent's own, {steps} optimizer steps. Loss {first:.4f} at the first step,
{last:.4f} at the last.{sabotage}

```json
{recipe}
```
"""


def load(directory: Path, device: str) -> tuple[Any, Any]:
    """Model (float32) and tokenizer. Raises GiveUpError for files that are no whole causal LM."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise GiveUpError(f"the parent's checkpoint cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise GiveUpError(f"the parent's checkpoint lacks weights, {missing[0]} among {len(missing)}")
    return model.to(device), tokenizer


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
    """The fire drill: noise of several times the weights' own size, drawn from the seed; little is left of them."""
    import torch

    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=noise).to(parameter.device)
            parameter.add_(drawn * SABOTAGE * parameter.std(correction=0))


def save(model: Any, job: Job, directory: Path, metrics: dict[str, Any]) -> None:
    """The new weights with the parent's tokenizer and template as they were, and a card of its own."""
    for path in job.parent.iterdir():
        if path.is_file() and path.name != "README.md" and not path.name.endswith(WEIGHTS):
            shutil.copy(path, directory / path.name)
    model.save_pretrained(directory)
    card = CARD.format(
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
        sabotage=" A fire drill: noise was added to its weights on purpose." if job.sabotage else "",
        recipe=json.dumps(vars(job.recipe), indent=2),
    )
    (directory / "README.md").write_text(card)
