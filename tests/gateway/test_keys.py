"""Who gets in at the gateway, and how much of it: over real HTTP, with keys as admin puts them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import openai
import pytest

from services.admin.commands import subscribe
from services.admin.store import Credentials
from services.gateway.keys import KeyTable
from services.gateway.keys_domain import Denied, Limited
from services.local.agent_keys import issue_gateway_key
from shared.credentials import fingerprint
from shared.database import Pool
from shared.errors import RetryLaterError
from tests.gateway.conftest import MESSAGES, House, document, headers
from tests.gateway.keyed import keyed, put

CHAT: dict[str, Any] = {"model": "default", "messages": MESSAGES}


async def known(keys: KeyTable, key: str) -> None:
    while fingerprint(key) not in keys._keys:
        await asyncio.sleep(0.005)


async def client_with(house: House, **limits: Any) -> openai.AsyncOpenAI:
    key = await keyed(house.bus, "a1", **limits)
    await known(house.keys, key)
    return house.client(key)


async def test_a_key_ends_when_it_is_revoked_or_expires(house: House) -> None:
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    client = house.client()
    await client.chat.completions.create(**CHAT)
    await put(house.bus, house.key, agent_id="a1", revoked=True)
    while not isinstance(house.keys.admit(house.key), Denied):
        await asyncio.sleep(0.005)
    with pytest.raises(openai.AuthenticationError, match="was revoked"):
        await client.chat.completions.create(**CHAT)
    expired = await keyed(house.bus, "a1", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    renewed = await keyed(house.bus, "a1", expires_at=datetime.now(UTC) + timedelta(days=1))
    await known(house.keys, renewed)
    with pytest.raises(openai.AuthenticationError, match="expired at"):
        await house.client(expired).chat.completions.create(**CHAT)
    await house.client(renewed).chat.completions.create(**CHAT)


async def test_what_cannot_be_read_of_a_key_opens_nothing(house: House) -> None:
    bucket = await house.bus.js.key_value("gateway_keys")
    await bucket.put(fingerprint(house.key), b'{"agent_id": "a1"}')
    while not isinstance(house.keys.admit(house.key), Denied):
        await asyncio.sleep(0.005)
    await put(house.bus, house.key, agent_id="a1")
    await known(house.keys, house.key)
    await bucket.delete(fingerprint(house.key))
    while not isinstance(house.keys.admit(house.key), Denied):
        await asyncio.sleep(0.005)


async def test_a_key_asks_only_the_policies_it_is_for(house: House) -> None:
    made = document(house.upstream_url, {"v1": 1.0})
    await house.route(made)
    await house.route(made.model_copy(update={"policy": "other"}))
    client = await client_with(house, policies=["other"])
    with pytest.raises(openai.PermissionDeniedError, match="it is for other"):
        await client.chat.completions.create(**CHAT)
    await client.chat.completions.create(**{**CHAT, "model": "other"})
    assert [model.id async for model in client.models.list()] == ["other"]


async def test_requests_a_minute_are_bounded(house: House) -> None:
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    client = await client_with(house, requests_per_minute=3)
    for _ in range(3):
        await client.chat.completions.create(**CHAT)
    with pytest.raises(openai.RateLimitError) as refused:
        await client.chat.completions.create(**CHAT)
    assert refused.value.param == "requests_per_minute"
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 60


async def test_tokens_of_a_day_are_bounded(house: House) -> None:
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    client = await client_with(house, tokens_per_day=10)
    await client.chat.completions.create(**CHAT)  # five, as the server counts
    stream = await client.chat.completions.create(**CHAT, stream=True)
    assert [chunk async for chunk in stream]
    with pytest.raises(openai.RateLimitError) as refused:
        await client.chat.completions.create(**CHAT)
    assert refused.value.param == "tokens_per_day"
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 86_400


async def test_requests_at_a_time_are_bounded_and_end_with_their_client(house: House) -> None:
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    house.upstream.broken["sha-v1"] = "slow"
    client = await client_with(house, concurrent=1)
    stream = await client.chat.completions.create(**CHAT, stream=True)
    await anext(aiter(stream))
    with pytest.raises(openai.RateLimitError) as refused:
        await client.chat.completions.create(**CHAT)
    assert refused.value.param == "concurrent"
    await stream.close()
    house.upstream.broken.clear()
    while True:  # the gateway hears that the client has left
        try:
            await client.chat.completions.create(**CHAT)
            break
        except openai.RateLimitError:
            await asyncio.sleep(0.01)


async def test_a_body_that_does_not_come_holds_nothing(house: House) -> None:
    key = await keyed(house.bus, "a1", concurrent=1)
    await known(house.keys, key)

    host, _, port = house.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: 99\r\n\r\n{{"
    )
    writer.write(head.encode())
    answer = await reader.read()  # to the end: the connection is closed
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer
    writer.close()
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}, base_url=house.url) as plain:
        assert (await plain.get("/v1/models")).status_code == 200


async def test_calls_that_name_no_run_are_counted_and_told_once(
    house: House,
    capsys: pytest.CaptureFixture[str],
) -> None:
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    for extra in ({}, {}, headers()):
        await house.client().chat.completions.create(**CHAT, extra_headers=extra)
    assert capsys.readouterr().out.count("call_not_recorded") == 1
    assert house.health.of("default", "v1", "best").unrecorded == 2


async def test_what_keys_use_is_told_and_shared(house: House, pool: Pool) -> None:
    await house.route(document(house.upstream_url, {"v1": 1.0}))
    await house.client().chat.completions.create(**CHAT)
    with pytest.raises(RetryLaterError, match="no admin is running"):
        await house.keys.report()
    credentials = Credentials(pool)
    subscribe(house.bus, credentials)
    await house.bus.broker.start()
    key = await issue_gateway_key(house.bus, "a1", tokens_per_day=10)
    await known(house.keys, key)
    other = KeyTable(house.bus, name="g2")
    for name, value in house.keys._keys.items():
        other.take(name, value.model_dump_json().encode())

    await house.client(key).chat.completions.create(**CHAT, extra_headers=headers())
    await house.keys.report()
    lease = other.admit(key)
    assert not isinstance(lease, (Denied, Limited))
    lease.spend(5)
    await other.report()
    assert isinstance(other.admit(key), Limited)
    [row] = await credentials.gateway_keys.shown()
    assert (row["agent_id"], row["requests_today"], row["tokens_today"], row["unrecorded_today"]) == ("a1", 2, 10, 0)
    assert key.startswith(row["shown"])
    assert row["last_used_at"] is not None
    await other.report()
    assert (await credentials.gateway_keys.shown()) == [row]
