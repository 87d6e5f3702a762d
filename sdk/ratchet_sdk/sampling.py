"""How a reply was drawn, in the names of the request: what OpenAI, vLLM, SGLang and llama.cpp take.

A reply is a sample of the model's own distribution only where nothing here truncates, bends or constrains it; so the
whole of it is recorded, and what a server would fill in by itself is written out before it is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What leaves the distribution as it is. vLLM takes these six from a model's ``generation_config.json`` where a request
# does not say them (its ``ModelConfig.get_diff_sampling_param``); -1 is its word, and SGLang's, for no top_k.
NEUTRAL: dict[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
SHAPE = (  # they bend or truncate the distribution of every token
    "typical_p",
    "tfs_z",
    "top_a",
    "epsilon_cutoff",
    "eta_cutoff",
    "length_penalty",
    "no_repeat_ngram_size",
    "dry_multiplier",
    "xtc_probability",
    "xtc_threshold",
    "dynatemp_range",
    "mirostat",
    "samplers",
    "logit_bias",
    "logits_processors",
    "custom_logit_processor",
    "custom_params",
    "bad_words",
    "allowed_token_ids",
    "use_beam_search",
    "best_of",
    "thinking_token_budget",
)
CONSTRAINT = (  # they say what may come at all
    "tool_choice",
    "parallel_tool_calls",
    "function_call",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "structural_tag",
    "grammar",
    "json_schema",
    "regex",
    "ebnf",
    "prediction",
)
END = (  # they say where it ends
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "max_tokens",
    "max_completion_tokens",
    "reasoning_effort",
    "verbosity",
    "seed",
)
NAMES = (*NEUTRAL, *SHAPE, *CONSTRAINT, *END)


def asked(body: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling that a request asks for: what it names of NAMES, as it stands there, without what is null."""
    return {name: body[name] for name in NAMES if body.get(name) is not None}
