"""Vercel Blob's HTTP protocol over a real socket: what its Python package asks for, and what it is answered."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

STORE = "store1"
TOKEN = f"vercel_blob_rw_{STORE}_secret"
PAGE = 2  # small, so that every listing has several


class BlobServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.puts: list[str] = []  # pathnames that a body was sent for
        self.breaks_at_part: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def client(self) -> Any:
        """An HTTP client for the package: it goes to this server where the package names Vercel's hosts."""
        import httpx2

        server = self.server_port

        class Here(httpx2.HTTPTransport):
            def handle_request(self, request: Any) -> Any:
                if request.url.host.endswith(".blob.vercel-storage.com"):
                    raw = b"/deliver" + request.url.raw_path
                    request.url = request.url.copy_with(scheme="http", host="127.0.0.1", port=server, raw_path=raw)
                return super().handle_request(request)

        return httpx2.Client(transport=Here(), timeout=10)


class Handler(BaseHTTPRequestHandler):
    server: BlobServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def _say(self, status: int, body: Any, raw: bytes | None = None) -> None:
        data = json.dumps(body).encode() if raw is None else raw
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.send_header("content-type", "application/octet-stream" if raw is not None else "application/json")
        self.end_headers()
        self.wfile.write(data)

    def _refused(self) -> bool:
        if self.headers.get("authorization") == f"Bearer {TOKEN}":
            return False
        self._say(403, {"error": {"code": "forbidden", "message": "Access denied"}})
        return True

    def _asked(self) -> tuple[str, dict[str, str], bytes]:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        return parts.path, {key: values[0] for key, values in parse_qs(parts.query).items()}, body

    def _described(self, name: str) -> dict[str, Any]:
        data = self.server.blobs[name]
        url = f"https://{STORE}.private.blob.vercel-storage.com/{name}"
        return {
            "url": url,
            "downloadUrl": f"{url}?download=1",
            "pathname": name,
            "size": len(data),
            "etag": hashlib.md5(data).hexdigest(),
            "uploadedAt": "2026-11-20T10:00:00.000Z",
            "contentType": "application/octet-stream",
            "contentDisposition": "attachment",
            "cacheControl": "",
        }

    def do_PUT(self) -> None:
        _, query, body = self._asked()
        if self._refused():
            return
        self.server.blobs[query["pathname"]] = body
        self.server.puts.append(query["pathname"])
        self._say(200, self._described(query["pathname"]))

    def do_GET(self) -> None:
        path, query, _ = self._asked()
        if self._refused():
            return
        blobs = self.server.blobs
        if path.startswith("/deliver/"):
            name = unquote(path.removeprefix("/deliver/"))
            self._say(200, None, blobs[name]) if name in blobs else self._say(404, {"error": {"code": "not_found"}})
        elif "url" in query:
            name = query["url"]
            self._say(200, self._described(name)) if name in blobs else self._say(404, {"error": {"code": "not_found"}})
        else:
            names = sorted(name for name in blobs if name.startswith(query.get("prefix", "")))
            start = int(query.get("cursor", "0"))
            page, more = names[start : start + PAGE], len(names) > start + PAGE
            told = {"blobs": [self._described(name) for name in page], "hasMore": more}
            self._say(200, {**told, "cursor": str(start + PAGE)} if more else told)

    def do_POST(self) -> None:
        path, query, body = self._asked()
        if self._refused():
            return
        if path == "/delete":
            for url in json.loads(body)["urls"]:
                self.server.blobs.pop(url, None)
            self._say(200, {})
            return
        self._multipart(query["pathname"], body)

    def _multipart(self, name: str, body: bytes) -> None:
        upload = self.headers.get("x-mpu-upload-id") or f"upload-{len(self.server.parts)}"
        match self.headers["x-mpu-action"]:
            case "create":
                self.server.parts[upload] = {}
                self._say(200, {"key": name, "uploadId": upload})
            case "upload":
                number = int(self.headers["x-mpu-part-number"])
                if number == self.server.breaks_at_part:
                    self.close_connection = True
                    self.connection.close()
                    return
                self.server.parts[upload][number] = body
                self._say(200, {"etag": hashlib.md5(body).hexdigest()})
            case "complete":
                wanted = [part["partNumber"] for part in json.loads(body)]
                parts = self.server.parts.pop(upload)
                self.server.blobs[name] = b"".join(parts[number] for number in wanted)
                self.server.puts.append(name)
                self._say(200, self._described(name))


@contextmanager
def blob_server() -> Iterator[BlobServer]:
    with BlobServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
