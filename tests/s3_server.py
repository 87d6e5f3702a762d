"""A real S3 server of the test's own: moto's, in this process, on a port that stays the same from start to start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import boto3
import httpx
from moto.s3.models import S3Backend
from moto.server import ThreadedMotoServer

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test of a test",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class S3Server:
    """``stop`` and ``start`` take it away and bring it back; what it holds stays."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self._host, self._port = self._server.get_host_and_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self) -> dict[str, str]:
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.url}

    def bucket(self, name: str, prefix: str = "") -> str:
        """A new, empty bucket."""
        client = boto3.client("s3", endpoint_url=self.url)
        client.create_bucket(Bucket=name)
        return f"s3://{name}/{prefix}" if prefix else f"s3://{name}"

    def stop(self) -> None:
        """It answers no more, and its port refuses."""
        self._server.stop()
        assert self._server._server is not None
        self._server._server.server_close()

    def start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()

    @contextmanager
    def dying_at_part(self, number: int) -> Iterator[None]:
        """It is away from the moment at which a part with this number arrives."""
        real = S3Backend.upload_part

        def upload_part(backend: S3Backend, bucket: str, multipart: str, part: int, value: bytes) -> Any:
            if part >= number:
                self._server._server.shutdown()
                self._server._server.server_close()
                raise RuntimeError("the server was killed")  # answered as 500; werkzeug would swallow a lost connection
            return real(backend, bucket, multipart, part, value)

        with patch.object(S3Backend, "upload_part", upload_part):
            yield

    @contextmanager
    def authorizing(self) -> Iterator[None]:
        """It looks at who asks, and knows nobody."""
        httpx.post(f"{self.url}/moto-api/reset-auth", content="0")
        try:
            yield
        finally:
            httpx.post(f"{self.url}/moto-api/reset-auth", content="inf")

    def reset(self) -> None:
        httpx.post(f"{self.url}/moto-api/reset")


def s3_server() -> Iterator[S3Server]:
    """For a fixture of a session."""
    with patch.dict(os.environ, ENVIRONMENT):
        server = S3Server()
        yield server
        server.stop()
