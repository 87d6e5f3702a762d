"""TLS to the broker, with a CA that is made here and thrown away."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nats
import pytest
from ratchet_sdk import Recorder

from services.local.agent_keys import kept_key
from services.local.broker import Tls
from services.local.embedded import NatsServer
from shared.bus import Bus
from shared.streams import provision

AGENT = "agent-1"


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def authority(directory: Path) -> Path:
    """A new CA; returns its certificate, beside which its key lies."""
    directory.mkdir()
    key, certificate = directory / "ca.key", directory / "ca.pem"
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"),
        *("-subj", "/CN=throwaway CA", "-addext", "keyUsage=critical,keyCertSign", "-keyout", key, "-out", certificate),
    )
    return certificate


def certified(ca: Path) -> Tls:
    """A certificate for 127.0.0.1, signed by the CA."""
    key, request, certificate, names = (ca.with_name(f"server.{end}") for end in ("key", "csr", "pem", "ext"))
    names.write_text("subjectAltName=IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n")
    openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=nats"),
        *("-keyout", key, "-out", request),
    )
    openssl(
        *("x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca.with_suffix(".key"), "-CAcreateserial"),
        *("-days", "1", "-extfile", names, "-out", certificate),
    )
    return Tls(certificate, key)


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    return authority(tmp_path / "ours")


@pytest.fixture
def server(tmp_path: Path, ca: Path) -> Iterator[NatsServer]:
    made = NatsServer(tmp_path / "nats", tls=certified(ca))
    made.start()
    yield made
    made.stop()


async def test_services_and_agents_speak_tls(
    server: NatsServer, ca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = tmp_path / "agent-1.nk"
    server.admit({AGENT: kept_key(seed)})
    context = ssl.create_default_context(cafile=str(ca))
    async with Recorder(server.address, AGENT, credentials=seed, options={"tls": context}) as recorder:
        monkeypatch.setenv("SSL_CERT_FILE", str(ca))  # as a service is told
        bus = Bus(server.url, name="operator")
        await bus.connect()
        try:
            await provision(bus)
            async with recorder.trajectory():
                pass
            assert await recorder.flush() == 0
            assert (await bus.js.stream_info("STEPS")).state.messages == 2
        finally:
            await bus.close()


@pytest.mark.parametrize("scheme", ["tls", "nats"])
async def test_a_server_that_our_ca_did_not_sign_is_told_nothing(
    server: NatsServer, tmp_path: Path, scheme: str
) -> None:
    """Neither with the system's CAs nor with another's; a plain address is no way around it."""
    url = server.url.replace("tls://", f"{scheme}://")
    stranger = ssl.create_default_context(cafile=str(authority(tmp_path / "strangers")))
    for options in ({}, {"tls": stranger}):
        with pytest.raises(ssl.SSLCertVerificationError, match="CERTIFICATE_VERIFY_FAILED"):
            await nats.connect(url, allow_reconnect=False, max_reconnect_attempts=0, **options)
