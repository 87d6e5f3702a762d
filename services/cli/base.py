"""`ratchet base`: what a policy's line begins with, a model that answers and weights that can be trained."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.change import ask, say
from services.terminal.output import AsJson, Policy
from shared.errors import ConfigurationError, GiveUpError

if TYPE_CHECKING:
    from services.terminal.settings import CliSettings
    from shared.artifacts import ArtifactStore

Note = Annotated[str | None, typer.Option(help="Kept with the version.")]
KEY_FILE = "secrets/upstream-keys.json"  # of the installation's directory; see services.local.installation
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt")

base = typer.Typer(
    help="Make, bring or name the model that a policy starts from.", no_args_is_help=True, rich_markup_mode=None
)


@base.command()
def create(
    corpus: Annotated[Path, typer.Option("--corpus", help="Conversations as JSONL (.jsonl or .jsonl.gz).")],
    policy: Policy = "default",
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    note: Note = None,
    as_json: AsJson = False,
) -> None:
    """Make a small model whose tokenizer is learned from conversations, and register it as the policy's base."""
    from services.interchange.reading import read_file

    settings = _settings()
    rows = list(read_file(corpus))
    if bad := [row for row in rows if row.conversation is None]:
        raise GiveUpError(f"{corpus}: line {bad[0].line}: {bad[0].fault}; mend or remove it")
    messages = [row.conversation.messages for row in rows if row.conversation]
    if not messages:
        raise GiveUpError(f"{corpus} holds no conversation to learn a tokenizer from")
    from services.trainer.base import create_corpus_base

    with tempfile.TemporaryDirectory(prefix="ratchet-base-") as directory:
        create_corpus_base(messages, Path(directory), seed)
        said = note or f"made from {len(messages)} conversations of {corpus.name}, seed {seed}"
        say(_register(settings, Path(directory), policy, said), as_json)


@base.command()
def register(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face model, or a LoRA adapter of peft.")],
    policy: Policy = "default",
    over: Annotated[
        Path | None, typer.Option("--base", metavar="DIR", help="Of an adapter: the model that it is over.")
    ] = None,
    note: Note = None,
    as_json: AsJson = False,
) -> None:
    """Take weights that are there already: the policy's base or, where that is an endpoint, the student that learns."""
    from services.trainer.chat_template import check
    from shared.artifact_bucket import artifacts_of

    settings = _settings()
    said = note or f"registered from {directory.resolve().name}"
    if (directory / "adapter_config.json").is_file():
        keeper = artifacts_of(settings)
        with tempfile.TemporaryDirectory(prefix="ratchet-base-") as made:
            _adapter(directory, _base_of(directory, over, keeper), keeper, Path(made))
            lacks, reply = check(Path(made)), _register(settings, Path(made), policy, said)
    else:
        _whole(directory)
        lacks, reply = check(directory), _register(settings, directory, policy, said)
    say(reply | ({"chat_template": lacks} if lacks else {}), as_json)


@base.command()
def endpoint(
    url: Annotated[str, typer.Argument(metavar="URL", help="For instance https://api.openai.com/v1.")],
    model: Annotated[str, typer.Option("--model", help="What its server calls the model.")],
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="NAME", help="Name of its key, never the key; none: it asks for none."),
    ] = None,
    policy: Policy = "default",
    note: Note = None,
    as_json: AsJson = False,
) -> None:
    """Name a model that answers elsewhere, a paid one for instance, as the policy's first version."""
    serving = {"kind": "openai", "base_url": _address(url), "model": model, "credential": _name_of_key(key)}
    reply = ask("trainer", "register_endpoint", {"policy": policy, "serving": serving, "note": note})
    said = {"policy": policy, **reply, "endpoint": serving["base_url"], "model": model}
    say({**said, **({"key": _where_to_put(key)} if key else {})}, as_json)


def _address(url: str) -> str:
    """The address that `/chat/completions` is asked below."""
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
        raise ConfigurationError(
            f"{url[:80]!r} is no address of an endpoint; give one as https://api.openai.com/v1, without user or query"
            if "@" not in url and "?" not in url
            else "the address must hold no user, password or query: its key goes into RATCHET_UPSTREAM_KEYS"
        )
    return url.rstrip("/").removesuffix("/chat/completions")


def _name_of_key(name: str | None) -> str | None:
    """A name as it may stand in routes and logs. What looks like a key is refused, and not repeated."""
    if name is not None and (not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}", name) or name.startswith("sk-")):
        raise ConfigurationError(
            "--key takes a name of yours for the key (letters, digits, _ . -, 32 at most), never the key itself; "
            "if that was the key, it stands in your shell's history now"
        )
    return name


def _where_to_put(name: str) -> str:
    from shared.settings import installation_dir

    file, example = installation_dir() / KEY_FILE, json.dumps({name: "..."})
    return (
        f"put its value under the name {name} into RATCHET_UPSTREAM_KEYS of gateway and deployer, as {example}; "
        f"with `ratchet up`, into {file}, and start it again"
    )


# weights ------------------------------------------------------------------------------------------
def _whole(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise ConfigurationError(
            f"{directory} is no Hugging Face model directory: it has no config.json and no adapter_config.json"
        )
    if not any(directory.glob("*.safetensors")):
        raise ConfigurationError(f"{directory} has no *.safetensors; save the model with safetensors")


def _base_of(adapter: Path, given: Path | None, keeper: ArtifactStore) -> str:
    """The artifact that an adapter is over. What is not kept yet is kept, where it is a directory here."""
    from shared.artifacts import adapter_of

    if given is not None:
        _whole(given)
        return keeper.put(given).sha256
    if known := adapter_of(adapter):
        return known
    named = str(json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path") or "")
    if (there := Path(named)).is_dir():
        _whole(there)
        return keeper.put(there).sha256
    raise ConfigurationError(
        f"{adapter} is an adapter over {named[:200]!r}, which is no directory here; give --base DIR"
    )


def _adapter(adapter: Path, base_sha256: str, keeper: ArtifactStore, made: Path) -> None:
    """The adapter as an artifact: peft's files, a tokenizer, its base's where it has none, and which base that is."""
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ConfigurationError(f"{adapter} has no adapter_model.safetensors; save the adapter with safetensors")
    shutil.copytree(adapter, made, dirs_exist_ok=True)
    if not (made / "tokenizer_config.json").is_file():
        for file in (file for pattern in TOKENIZER for file in keeper.open(base_sha256).glob(pattern)):
            shutil.copyfile(file, made / file.name)
    (made / "ratchet.json").write_text(json.dumps({"adapter_of": base_sha256}))


def _register(settings: CliSettings, directory: Path, policy: str, note: str) -> dict[str, Any]:
    from shared.artifact_bucket import artifacts_of

    artifact = artifacts_of(settings).put(directory)
    reply = ask("trainer", "register_base", {"policy": policy, "artifact_sha256": artifact.sha256, "note": note})
    if teacher := reply.get("student_of"):
        reply["student"] = (
            f"{teacher} is an endpoint, so this is what learns from it: the next version is made of it, by imitating"
            f" what outcomes call good, and tried against {teacher}"
        )
    return {"policy": policy, **reply, "artifact_sha256": artifact.sha256, "size_bytes": artifact.size_bytes}


def _settings() -> CliSettings:
    from services.terminal import session

    return session.settings()
