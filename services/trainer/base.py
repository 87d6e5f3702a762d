"""A first model for a corpus of conversations: random weights, and a tokenizer to which no text is unknown.

Conversations that came from somewhere else (an import) name no checkpoint to begin with. This makes one as
ordinary Hugging Face files: a small Llama, a byte-level BPE learned from the corpus, and a chat template that
renders tools, tool calls and tool results, with ``{% generation %}`` round what the assistant says, so that
the loss can fall on the assistant's tokens alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PAD, START, SEPARATOR, END = "<|pad|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"
CONTEXT_TOKENS = 65_536  # rotary positions cost no weights: 34,000 characters fit even at one token each

# A control token closes the role: what the assistant says is tokenized alike in training and after a prompt.
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>tools<|im_sep|>
{%- for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}<|im_sep|>
{%- if message.role == 'assistant' %}{% generation %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>{"name": {{ call.function.name | tojson }}, "arguments": {{
 call.function.arguments if call.function.arguments is string else call.function.arguments | tojson
 }}}</tool_call>
{%- endfor %}<|im_end|>{% endgeneration %}
{%- else %}{{ message.content or '' }}<|im_end|>{% endif %}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"""

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [ratchet, random-init]
---
# A base model with random weights

Made by Ratchet from a corpus of {conversations} conversations ({characters} characters), seed {seed}. It has learned
nothing yet: the weights are as they were drawn. Its tokenizer is a byte-level BPE of {vocabulary} tokens learned from
that corpus, so no text is unknown to it. A Llama of {layers} layers, width {width}, {parameters} weights, and a
context of {context} tokens. The chat template renders tools, tool calls as `<tool_call>` JSON, and tool results.

It is meant to be improved by imitation first; a policy gradient finds nothing to build on in random weights.
"""


def create_corpus_base(
    corpus_messages: Iterable[list[dict[str, Any]]],
    directory: Path,
    seed: int,
    *,
    vocabulary: int = 4096,
    layers: int = 2,
    width: int = 64,
) -> None:
    """Write config, weights, tokenizer, template and card into ``directory``.

    ``corpus_messages`` holds one list of OpenAI chat messages a conversation. The same corpus and seed give the
    same files.
    """
    texts = [text for messages in corpus_messages for text in _texts(messages)]
    conversations = sum(1 for text in texts if text is None)
    corpus = [text for text in texts if text is not None]
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(corpus, vocabulary)
    tokenizer.save_pretrained(directory)
    parameters = _random_llama(tokenizer, directory, seed, layers, width)
    card = CARD.format(
        conversations=conversations,
        characters=sum(len(text) for text in corpus),
        seed=seed,
        vocabulary=len(tokenizer),
        layers=layers,
        width=width,
        parameters=parameters,
        context=CONTEXT_TOKENS,
    )
    (directory / "README.md").write_text(card)


def _texts(messages: list[dict[str, Any]]) -> Iterator[str | None]:
    """What a conversation is written in: contents and tool calls as the template writes them; None ends it."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif content is not None:
            yield json.dumps(content, ensure_ascii=False)
        for call in message.get("tool_calls") or []:
            function = call.get("function", {})
            name, arguments = function.get("name"), function.get("arguments")
            yield f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'
    yield None


def _tokenizer(corpus: list[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, SEPARATOR, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, SEPARATOR],
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _random_llama(tokenizer: Any, directory: Path, seed: int, layers: int, width: int) -> int:
    """Save a Llama with freshly drawn weights; returns how many. The caller's random state stays as it was."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())
