"""Hugging Face checkpoints as the torch engine reads, renders and writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from services.trainer.sequences import Conversation, TokenSequence
from services.trainer.training import Job
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

    The template says which characters each assistant message came to by ``{% generation %}``. Raises GiveUpError for
    a template that does not say so once for each assistant message.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{k: v for k, v in message.items() if v is not None} for message in conversation.messages]
    rendered, spans = render_jinja_template(
        conversations=[messages],
        tools=conversation.tools,
        chat_template=tokenizer.get_chat_template(tools=conversation.tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    assistants = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
    if len(spans[0]) != len(assistants):
        raise GiveUpError(
            f"the parent's chat template marks {len(spans[0])} of {len(assistants)} assistant messages with "
            "{% generation %}; imitation needs each of them marked"
        )
    encoded = tokenizer(rendered[0], add_special_tokens=False, return_offsets_mapping=True)
    own = [False] * len(encoded["input_ids"])
    for index, (first, end) in zip(assistants, spans[0], strict=True):
        if index in conversation.own:
            for position, (start, stop) in enumerate(encoded["offset_mapping"]):
                own[position] |= start >= first and stop <= end and stop > start
    return TokenSequence(tuple(encoded["input_ids"]), tuple(own), (0.0,) * len(own))


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
