"""The page and the API on real data: who may look, what is shown, and that an agent's text stays text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser

import asyncpg
import httpx
import pytest

from services.admin.app import token_of
from services.admin.handlers import application
from services.admin.settings import AdminSettings
from services.admin.store import Store
from shared import database
from shared.bodies import unpacked
from shared.bus import Bus
from shared.database import Pool
from shared.errors import ConfigurationError
from tests.admin import world

TOKEN = "a token that is long enough"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PAGES = ("/", f"/windows/{world.WINDOW}", "/runs/ann/run-1")


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    async with database.pool(database_url, read_only=True) as opened:
        yield Store(opened)


@pytest.fixture
async def client(store: Store, bus: Bus) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(application(store, bus, TOKEN), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as opened:
        yield opened


class Shape(HTMLParser):
    """What a browser would make of a page: its elements, their attributes, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def shape(html: str) -> Shape:
    parser = Shape()
    parser.feed(html)
    return parser


# who may look -------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [*PAGES, "/api/v1/overview", "/api/v1/agents", "/nothing"])
async def test_nothing_is_shown_without_the_token(client: httpx.AsyncClient, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Cookie": "ratchet_admin=x"}):
        answer = await client.get(path, headers=headers)
        assert answer.status_code == 401
        assert "token" in answer.text.lower()
    assert (await client.get(f"{path}?token=wrong")).status_code == 401
    assert (await client.get(path, headers={"Authorization": b"Bearer \xe9"})).status_code == 401


async def test_the_token_in_the_address_becomes_a_cookie(client: httpx.AsyncClient, pool: Pool) -> None:
    await world.build(pool)
    answer = await client.get("/", params={"token": TOKEN, "x": "1"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/?x=1")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in cookie
    assert (await client.get("/")).status_code == 200
    assert (await client.get("/api/v1/overview")).status_code == 200
    elsewhere = await client.get("http://admin//evil.example/", params={"token": TOKEN})
    assert elsewhere.headers["location"] == "/evil.example/"


async def test_everything_is_read_only(client: httpx.AsyncClient, store: Store) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert (await client.request(method, "/api/v1/models", headers=BEARER)).status_code == 405
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await store._pool.execute("delete from windows")


@pytest.mark.parametrize("token", [None, "", "short"])
def test_without_a_token_it_does_not_start(token: str | None) -> None:
    with pytest.raises(ConfigurationError, match="RATCHET_ADMIN_TOKEN must have 16 characters"):
        token_of(AdminSettings(admin_token=token))  # type: ignore[arg-type]  # pydantic makes it a secret
    assert token_of(AdminSettings(admin_token=TOKEN)) == TOKEN  # type: ignore[arg-type]  # likewise


# what is shown ------------------------------------------------------------------------------------
async def test_the_api(client: httpx.AsyncClient, pool: Pool) -> None:
    sent = (await world.build(pool))["ann", "run-1"]
    client.headers.update(BEARER)

    async def ask(path: str) -> object:
        answer = await client.get(f"/api/v1/{path}")
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        return answer.json()

    overview = await ask("overview")
    assert overview["policies"] == ["default"]
    assert overview["readiness"][0]["fault"].startswith("no trainer is running")
    assert {row["verdict"] for row in overview["consumers"]} == {"ok"}
    for hour in (8, 12, 13):  # before and after the one with runs; nobody was there
        await pool.execute(
            "insert into windows (window_id, starts_at, ends_at, length_s) values ($1::text, $2, $2, 3600)",
            f"idle-{hour}",
            world.START.replace(hour=hour),
        )
    assert [row["window_id"] for row in await ask("windows")] == ["idle-13", world.WINDOW]
    assert len(await ask("windows?idle=true")) == 4
    await pool.execute("delete from windows where window_id like 'idle-%'")
    [window] = await ask("windows")
    assert (window["window_id"], window["rewarded"], window["quality"]) == (world.WINDOW, 2, 0.97)
    runs = await ask(f"windows/{world.WINDOW}")
    assert [(row["agent_id"], row["score"]) for row in runs] == [("ann", 1.0), ("bob", 0.0), ("bob", None)]
    run = await ask("trajectories/ann/run-1")
    assert [e["sha256"] for e in run["events"]] == [hashlib.sha256(body).hexdigest() for body in sent]
    assert run["calls"][1]["messages"][1]["content"] == world.HOSTILE
    assert {row["version"]: row["share"] for row in await ask("models")} == {"v0": 0.7, "v1": 0.3}
    assert await ask("models?policy=other") == []
    [batch] = await ask("batches")
    assert (batch["trained"], batch["version"]) == (2, "v1")
    assert [row["state"] for row in await ask("deployments")] == ["promoted", "canary"]
    assert [row["runs"] for row in await ask("agents")] == [1, 2]
    assert [row["kind"] for row in await ask("incidents")] == ["endpoint"]


async def test_what_is_not_there_and_what_is_wrong(client: httpx.AsyncClient) -> None:
    client.headers.update(BEARER)
    assert (await client.get("/api/v1/trajectories/ann/none")).status_code == 404
    assert (await client.get("/api/v1/nothing")).json() == {"error": "Not Found"}
    for limit in ("0", "x", "-1", "9" * 30, "1e3"):
        assert (await client.get(f"/api/v1/windows?limit={limit}")).status_code == 400
    assert (await client.get("/runs/ann/none")).text == "nothing of that name is stored\n"
    assert (await client.get("/windows/none")).status_code == 404


async def test_an_empty_installation_has_a_page(client: httpx.AsyncClient) -> None:
    page = await client.get("/", headers=BEARER)
    assert page.status_code == 200
    assert "No version is registered and no run has come." in shape(page.text).text


async def test_a_lost_database_is_said_and_not_a_traceback(client: httpx.AsyncClient, store: Store) -> None:
    await store._pool.close()
    for path, status in (("/api/v1/windows", 503), ("/", 503)):
        answer = await client.get(path, headers=BEARER)
        assert answer.status_code == status
        assert "the database is away" in answer.text


@pytest.mark.parametrize("path", PAGES)
async def test_an_agent_s_text_stays_text(client: httpx.AsyncClient, pool: Pool, path: str) -> None:
    await world.build(pool)
    page = await client.get(path, headers=BEARER)
    assert page.status_code == 200, page.text
    seen = shape(page.text)
    policy = page.headers["content-security-policy"]
    [nonce] = re.findall(r"script-src 'nonce-([^']+)'", policy)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.text.count("<script") == seen.tags.count("script") <= 1
    assert all(value == nonce for name, value in seen.attributes if name == "nonce")
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name == "style"]
    if path != f"/windows/{world.WINDOW}":
        assert "<script>alert('owned')</script>{{ 7*7 }}" in seen.text
    assert "\u202e" not in page.text
    assert "\x1b" not in page.text
    assert TOKEN not in page.text


async def test_messages_of_any_shape_do_not_break_the_page(client: httpx.AsyncClient, pool: Pool) -> None:
    await world.build(pool)
    import json
    import zlib

    rows = await pool.fetch("select event_id, body from bodies where agent_id = 'ann' and kind = 'step'")
    odd = [
        {},
        {"role": 5, "content": {"a": ["<b>"]}, "tool_calls": 7},
        {"role": "x", "tool_calls": [None, {"function": 3}]},
    ]
    for row in rows:
        event = json.loads(unpacked(row["body"]))
        event["llm_calls"][0] |= {"messages": odd, "response": {"message": {"tool_calls": {"a": 1}}}}
        await pool.execute(
            "update bodies set body = $1 where event_id = $2",
            zlib.compress(json.dumps(event).encode()),
            row["event_id"],
        )
    page = await client.get("/runs/ann/run-1", headers=BEARER)
    assert page.status_code == 200, page.text
    assert '{"a": ["<b>"]}' in shape(page.text).text
    assert "a hash does not match" in page.text
