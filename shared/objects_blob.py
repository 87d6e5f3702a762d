"""Files in a Vercel Blob store, by Vercel's own package (extra ``blob``); its token is in ``BLOB_READ_WRITE_TOKEN``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shared.errors import ConfigurationError

PART_BYTES = 8 * 2**20  # above what one request should carry; each part but the last has at least 5 MiB
DELETED_AT_ONCE = 1000


class BlobPlace:
    """``vercel-blob://private/prefix`` (or ``public``, as the store is). ``client`` makes its HTTP client."""

    def __init__(self, url: str, client: Callable[[], Any] | None = None) -> None:
        parts = urlsplit(url)
        if parts.netloc not in ("private", "public"):
            raise ConfigurationError(
                f"RATCHET_ARTIFACTS={url}: write vercel-blob://private/prefix, or public, as the store is"
            )
        try:
            from vercel.blob import sync
        except ImportError as error:
            raise ConfigurationError("vercel-blob:// needs Vercel's package: pip install 'ratchet[blob]'") from error
        self._blob = sync
        self._access: Any = parts.netloc
        self._prefix = f"{parts.path.strip('/')}/" if parts.path.strip("/") else ""
        self._client = client
        self.where = url.rstrip("/")

    def put(self, name: str, data: bytes | Path) -> None:
        with self._session():
            if isinstance(data, bytes):
                self._put_bytes(name, data)
            elif data.stat().st_size <= PART_BYTES:
                self._put_bytes(name, data.read_bytes())
            else:
                self._put_parts(name, data)

    def _put_bytes(self, name: str, data: bytes) -> None:
        self._blob.put_blob(self._prefix + name, data, access=self._access, allow_overwrite=True)

    def _put_parts(self, name: str, path: Path) -> None:
        """The blob appears when the last part is there; an error before that leaves none."""
        into = self._blob.multipart_upload_blob(self._prefix + name, access=self._access, allow_overwrite=True)
        with into as upload, path.open("rb") as file:
            while part := file.read(PART_BYTES):
                upload.upload_part(part)

    def chunks(self, name: str) -> Iterator[bytes]:
        with self._session(), self._blob.stream_blob(self._prefix + name, access=self._access) as download:
            yield from download

    def size_bytes(self, name: str) -> int | None:
        try:
            with self._session():
                return int(self._blob.head_blob(self._prefix + name).size)
        except FileNotFoundError:
            return None

    def names(self, prefix: str) -> Iterator[str]:
        folder = f"{self._prefix}{prefix.rstrip('/')}/" if prefix else self._prefix
        with self._session():
            for item in self._blob.query_blobs(prefix=folder or None):
                yield item.pathname.removeprefix(self._prefix)

    def remove(self, names: Sequence[str]) -> None:
        with self._session():
            for start in range(0, len(names), DELETED_AT_ONCE):
                self._blob.delete_blob([self._prefix + name for name in names[start : start + DELETED_AT_ONCE]])

    def signed_url(self, name: str, seconds: int) -> str | None:
        return None  # a private blob is read with the store's token alone

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Vercel's errors as the ones that Python has for files; not found and refused are such already."""
        from vercel.api import session
        from vercel.blob import BlobCredentialsError, BlobError, BlobStoreNotFoundError, BlobStoreSuspendedError

        opened: AbstractContextManager[Any] = (
            nullcontext() if self._client is None else session(httpx_client_factory=self._client)
        )
        try:
            with opened:
                yield
        except (BlobCredentialsError, BlobStoreNotFoundError, BlobStoreSuspendedError) as error:
            raise PermissionError(str(error)) from error
        except BlobError as error:
            if isinstance(error, OSError):
                raise
            raise ConnectionError(str(error)) from error
