"""`ratchet base`: a model that answers elsewhere, and weights that learn from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.trainer.base import create_corpus_base
from shared.artifacts import DirectoryStore, adapter_of
from shared.bus import Bus
from tests.cli.conftest import Ratchet
from tests.cli.test_change import answering

pytestmark = pytest.mark.usefixtures("servers")
URL = "https://api.openai.com/v1"


async def test_an_endpoint_is_named_by_its_address_and_the_name_of_its_key(ratchet: Ratchet, bus: Bus) -> None:
    arrived = await answering(bus, "trainer", "register_endpoint", {"version": "v0"})
    said = await ratchet("base", "endpoint", f"{URL}/", "--model", "gpt-4o-mini", "--key", "openai", "--policy", "desk")
    serving = {"kind": "openai", "base_url": URL, "model": "gpt-4o-mini", "credential": "openai"}
    assert arrived == [{"policy": "desk", "serving": serving}]
    assert "RATCHET_UPSTREAM_KEYS of gateway and deployer" in said.out
    assert ".ratchet/secrets/upstream-keys.json" in said.out
    open_to_all = await ratchet("base", "endpoint", "http://127.0.0.1:8000/v1", "--model", "m", "--json")
    assert "key" not in open_to_all.json
    assert arrived[1]["serving"]["credential"] is None


@pytest.mark.parametrize(
    ("url", "key", "why"),
    [
        ("api.openai.com", "openai", "no address of an endpoint"),
        ("https://me:secret@host/v1", "openai", "must hold no user, password or query"),
        ("https://host/v1?key=secret", "openai", "must hold no user, password or query"),
        (URL, "sk-secret", "never the key itself"),
        (URL, "secret" * 8, "never the key itself"),
    ],
)
async def test_what_is_no_address_or_looks_like_a_key_is_refused_and_not_repeated(
    ratchet: Ratchet, bus: Bus, url: str, key: str, why: str
) -> None:
    arrived = await answering(bus, "trainer", "register_endpoint", {"version": "v0"})
    said = await ratchet("base", "endpoint", url, "--model", "m", "--key", key)
    assert (said.code, arrived) == (2, [])
    assert why in said.err
    assert "secret" not in said.err


async def test_an_adapter_learns_from_the_endpoint_over_the_base_that_it_names(
    ratchet: Ratchet, bus: Bus, tmp_path: Path
) -> None:
    arrived = await answering(bus, "trainer", "register_base", {"student_of": "v0"})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/elsewhere"}))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    nameless = await ratchet("base", "register", "adapter")
    assert (nameless.code, arrived) == (2, [])
    assert "give --base DIR" in nameless.err
    create_corpus_base([[{"role": "user", "content": "Fly me."}]], tmp_path / "model", 0, vocabulary=300, width=32)
    said = await ratchet("base", "register", "adapter", "--base", "model")
    assert "v0 is an endpoint, so this is what learns from it" in said.out
    kept = DirectoryStore(tmp_path / ".ratchet/artifacts")
    directory = kept.open(arrived[0]["artifact_sha256"])
    assert {"adapter_model.safetensors", "tokenizer.json", "ratchet.json"} <= {
        path.name for path in directory.iterdir()
    }
    over = adapter_of(directory)
    assert over is not None
    assert (kept.open(over) / "model.safetensors").exists()
