"""Gateway keys in the table and in the bucket that is its copy, on real servers."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest

from services.admin.keys import KeyBucket
from services.admin.keys_store import GatewayKeys
from shared import subjects
from shared.bus import Bus
from shared.credentials import GatewayKey, KeyUse, fingerprint
from shared.database import Pool
from shared.streams import provision

ANN, BOB = fingerprint("ann's"), fingerprint("bob's")
DAY = datetime.now(UTC).date()


def key(agent_id: str = "ann", **fields: object) -> GatewayKey:
    return GatewayKey.model_validate({"agent_id": agent_id, "shown": f"rk-{agent_id}", **fields})


@pytest.fixture
def keys(pool: Pool) -> GatewayKeys:
    return GatewayKeys(pool)


async def held(bus: Bus) -> dict[str, GatewayKey]:
    bucket = await bus.js.key_value(subjects.KEYS_BUCKET)
    names = await bucket.keys()
    return {name: GatewayKey.model_validate_json((await bucket.get(name)).value or b"") for name in names}


async def test_the_bucket_is_levelled_with_the_table(bus: Bus, keys: GatewayKeys) -> None:
    ann = key(policies=["p"], expires_at=datetime.now(UTC) + timedelta(days=1), requests_per_minute=3, concurrent=2)
    assert await keys.add(ANN, ann)
    assert not await keys.add(ANN, key("bob"))
    assert await keys.add(BOB, key("bob", tokens_per_day=2**40))
    bucket = KeyBucket(bus, keys)
    await bucket.level()
    assert await held(bus) == {ANN: ann, BOB: key("bob", tokens_per_day=2**40)}

    raw = await bus.js.key_value(subjects.KEYS_BUCKET)
    await raw.put(fingerprint("a thief's"), key("ann").model_dump_json().encode())
    await raw.put(BOB, b"{}")
    assert [row["agent_id"] for row in await keys.revoke(agent_id="ann")] == ["ann"]
    await bucket.level()
    assert await held(bus) == {ANN: ann.model_copy(update={"revoked": True}), BOB: key("bob", tokens_per_day=2**40)}
    sequence = (await bus.js.stream_info(f"KV_{subjects.KEYS_BUCKET}")).state.last_seq
    await bucket.level()
    assert (await bus.js.stream_info(f"KV_{subjects.KEYS_BUCKET}")).state.last_seq == sequence

    await bus.js.delete_key_value(subjects.KEYS_BUCKET)
    await provision(bus)
    await bucket.level()
    assert (await held(bus))[ANN].revoked


async def test_a_revoked_key_stays_revoked(bus: Bus, keys: GatewayKeys, pool: Pool) -> None:
    await keys.add(ANN, key())
    assert await keys.revoke(shown="rk-nobody") == []
    assert len(await keys.revoke(shown="rk-ann")) == 1
    assert await keys.revoke(shown="rk-ann", agent_id="ann") == []
    said = await pool.fetch("select command, request from audit order by audit_id")
    assert [row["command"] for row in said] == ["agents key", "agents revoke-key"]
    assert ANN not in str([row["request"] for row in said])


async def test_what_opens_nothing_for_a_month_goes(keys: GatewayKeys, pool: Pool) -> None:
    await keys.add(ANN, key(expires_at=datetime.now(UTC) - timedelta(days=31)))
    await keys.add(BOB, key("bob", expires_at=datetime.now(UTC) - timedelta(days=29)))
    await keys.used("g", [used(BOB, DAY - timedelta(days=40)), used(ANN, DAY)])
    await keys.forget_old()
    assert list(await keys.all()) == [BOB]
    assert await pool.fetchval("select count(*) from gateway_key_use") == 0


def used(key_sha256: str, day: date = DAY, **counts: int) -> KeyUse:
    return KeyUse.model_validate(
        {"key_sha256": key_sha256, "day": day, "requests": 1, "unrecorded": 0, "tokens": 0} | counts
    )


async def test_use_is_summed_over_gateways_and_never_falls(keys: GatewayKeys) -> None:
    await keys.add(ANN, key())
    await keys.add(BOB, key("bob"))
    assert await keys.used("g1", [used(ANN, tokens=5, unrecorded=1), used(fingerprint("gone"))]) == {}
    assert await keys.used("g2", [used(ANN, tokens=7), used(BOB)]) == {ANN: 5}
    assert await keys.used("g1", [used(ANN, tokens=3)]) == {ANN: 7}
    rows = {row["agent_id"]: row for row in await keys.shown()}
    assert (rows["ann"]["tokens_today"], rows["ann"]["requests_today"], rows["ann"]["unrecorded_today"]) == (12, 2, 1)
    assert await keys.unrecorded() == [{"agent_id": "ann", "unrecorded": 1, "requests": 2}]
    assert [row["agent_id"] for row in await keys.shown("bob")] == ["bob"]
