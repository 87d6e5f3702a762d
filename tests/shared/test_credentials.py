"""Agents' keys: only the secret's holder makes them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.credentials import agent_key, agent_of_key

agent_ids = st.from_regex(r"^[A-Za-z0-9_-]{1,64}\Z")


@given(st.text(max_size=20), agent_ids)
def test_a_key_names_its_agent(secret: str, agent_id: str) -> None:
    assert agent_of_key(secret, agent_key(secret, agent_id)) == agent_id


@given(agent_ids, agent_ids)
def test_a_key_of_another_agent_or_secret_is_none(agent_id: str, other: str) -> None:
    key = agent_key("secret", agent_id)
    assert agent_of_key("another", key) is None
    mac = key.rpartition(".")[2]
    assert agent_of_key("secret", f"rk-{other}.{mac}") == (agent_id if other == agent_id else None)


@given(st.text())
def test_no_other_text_is_a_key(text: str) -> None:
    assert agent_of_key("secret", text) is None


@given(agent_ids, st.integers(0, 200), st.characters(codec="ascii"))
def test_a_changed_letter_spoils_a_key(agent_id: str, at: int, letter: str) -> None:
    key = agent_key("secret", agent_id)
    at %= len(key)
    changed = key[:at] + letter + key[at + 1 :]
    assert (agent_of_key("secret", changed) is not None) == (changed == key)
