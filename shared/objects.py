"""Files under names in a folder, a bucket or a Blob store: what artifacts, archives, jobs and checkpoints are kept in.

A file that is there is whole, whatever kills its writer. Where the place is away the caller tries later, where it
refuses or lacks something the message names the setting.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store, from_url

from shared.errors import ConfigurationError, GiveUpError, RetryLaterError

BUCKETS = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
BLOB = "vercel-blob"
RETRIES: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}  # more is for whoever called us
CLIENT = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(minutes=5)}  # a part of an upload is 5 MiB


class Place(Protocol):
    """Who holds the bytes. Raises FileNotFoundError, PermissionError, or OSError where it is away or full."""

    where: str

    def put(self, name: str, data: bytes | Path) -> None:
        """Whole or not at all."""

    def chunks(self, name: str) -> Iterator[bytes]: ...

    def size_bytes(self, name: str) -> int | None:
        """None where there is no such file."""

    def names(self, prefix: str) -> Iterator[str]: ...

    def remove(self, names: Sequence[str]) -> None: ...

    def signed_url(self, name: str, seconds: int) -> str | None:
        """None where the place gives none."""


class Objects:
    """Every name is relative, with ``/``. Methods raise GiveUpError or RetryLaterError, by what comes next."""

    def __init__(self, place: Path | Place) -> None:
        self._place: Place = folder(place) if isinstance(place, Path) else place

    @property
    def where(self) -> str:
        """The folder or URL, without credentials."""
        return self._place.where

    def write(self, name: str, data: bytes) -> None:
        with self._told(name):
            self._place.put(name, data)

    def read(self, name: str) -> bytes:
        """Raises GiveUpError where there is no such file."""
        with self._told(name):
            return b"".join(self._place.chunks(name))

    def has(self, name: str) -> bool:
        with self._told(name):
            return self._place.size_bytes(name) is not None

    def size_bytes(self, name: str) -> int | None:
        """None where there is no such file."""
        with self._told(name):
            return self._place.size_bytes(name)

    def upload(self, name: str, path: Path, sha256: str | None = None) -> str:
        """Keep a file; what is there whole already is not sent again. Returns its SHA-256.

        What is stored is read back and hashed. Raises RetryLaterError where that is not what was sent.
        """
        wanted = sha256 or sha256_of(path)
        with self._told(name):
            if self._place.size_bytes(name) == path.stat().st_size and self._sha256(name) == wanted:
                return wanted
            self._place.put(name, path)
            if (found := self._sha256(name)) != wanted:
                raise RetryLaterError(
                    f"{name} hashes to {found[:12]} in {self.where}, {wanted[:12]} was sent; send again"
                )
        return wanted

    def download(self, name: str, path: Path, sha256: str | None = None) -> None:
        """Fetch a file, in place of what is at ``path``, once it is whole and, where ``sha256`` is given, verified."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        digest = hashlib.sha256()
        try:
            with self._told(name), part.open("wb") as file:
                for chunk in self._place.chunks(name):
                    digest.update(chunk)
                    file.write(chunk)
                os.fsync(file.fileno())
            if sha256 is not None and digest.hexdigest() != sha256:
                raise GiveUpError(f"{name} was changed in {self.where}: it hashes to {digest.hexdigest()[:12]}")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def names(self, prefix: str = "") -> Iterator[str]:
        """The names that begin with the folder ``prefix``, sorted."""
        with self._told(prefix):
            yield from sorted(self._place.names(prefix))

    def remove(self, prefix: str) -> None:
        """All files of a folder, or one file. What is not there is no error."""
        names = list(self.names(prefix))
        with self._told(prefix):
            if prefix not in names and self._place.size_bytes(prefix) is not None:
                names.append(prefix)
            if names:
                self._place.remove(names)

    def signed_url(self, name: str, seconds: int) -> str | None:
        """An address from which whoever has it may read the file for so long; None where the place gives none."""
        with self._told(name):
            return self._place.signed_url(name, seconds)

    def _sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        for chunk in self._place.chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise GiveUpError(f"{name} is not in {self.where}; check RATCHET_ARTIFACTS") from error
        except PermissionError as error:
            raise GiveUpError(
                f"{self.where} refuses {name}: {error}; check RATCHET_ARTIFACTS and the credentials in the environment"
            ) from error
        except OSError as error:
            raise RetryLaterError(
                f"{name} does not go through, {self.where} is away or a disk is full: {error}"
            ) from error


def sha256_of(path: Path) -> str:
    """Of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# where ----------------------------------------------------------------------------------------------
def is_remote(place: str) -> bool:
    return "://" in place


def objects_at(place: str, options: Mapping[str, str] | None = None) -> Objects:
    """The files of a folder, of ``s3://bucket/prefix`` (``gs://``, ``az://``) or of ``vercel-blob://private/prefix``.

    ``options`` are obstore's of the store, such as ``{"region": "eu-central-1"}``; they go before what the environment
    says (``AWS_*``, ``GOOGLE_*``, ``AZURE_*``). Raises ConfigurationError where the place or an option is none.
    """
    scheme = urlsplit(place).scheme if is_remote(place) else "file"
    if scheme == "file":
        return Objects(folder(Path(place.removeprefix("file://"))))
    if scheme == BLOB:
        from shared.objects_blob import BlobPlace

        return Objects(BlobPlace(place))
    if scheme not in BUCKETS:
        raise ConfigurationError(
            f"RATCHET_ARTIFACTS: {scheme}:// is not known; take a folder, s3://, gs://, az:// or {BLOB}://"
        )
    return Objects(_bucket(place, dict(options or {})))


def folder(root: Path) -> ObstorePlace:
    try:
        return ObstorePlace(LocalStore(root.absolute(), mkdir=True), str(root.absolute()), root.absolute())
    except (BaseError, OSError) as error:
        raise RetryLaterError(f"{root} cannot be opened: {_words(error)}; check RATCHET_ARTIFACTS_DIR") from error


def _bucket(url: str, options: Any) -> ObstorePlace:
    endpoint = options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3")
    client: Any = {**CLIENT, "allow_http": True} if (endpoint or "").startswith("http://") else CLIENT
    try:
        store = from_url(url, config=options or None, client_options=client, retry_config=RETRIES)
    except (BaseError, ValueError, TypeError) as error:
        raise ConfigurationError(f"RATCHET_ARTIFACTS={url}, with its options: {_words(error)}") from error
    return ObstorePlace(store, url.rstrip("/"))


class ObstorePlace:
    """A folder (``root``) or a bucket, by obstore: multipart uploads, retries, one API."""

    def __init__(self, store: Any, where: str, root: Path | None = None) -> None:
        self._store = store
        self.where = where
        self._root = root

    def put(self, name: str, data: bytes | Path) -> None:
        with _plainly():
            obstore.put(self._store, name, data)
        if self._root is not None:
            _fsync(self._root / name)
            _fsync((self._root / name).parent)

    def chunks(self, name: str) -> Iterator[bytes]:
        with _plainly():
            for chunk in obstore.get(self._store, name):
                yield bytes(chunk)

    def size_bytes(self, name: str) -> int | None:
        try:
            with _plainly():
                return obstore.head(self._store, name)["size"]
        except FileNotFoundError:
            return None

    def names(self, prefix: str) -> Iterator[str]:
        with _plainly():
            for page in obstore.list(self._store, prefix or None):
                yield from (item["path"] for item in page)

    def remove(self, names: Sequence[str]) -> None:
        with _plainly():
            obstore.delete(self._store, names)

    def signed_url(self, name: str, seconds: int) -> str | None:
        if not isinstance(self._store, (S3Store, GCSStore, AzureStore)):
            return None
        with _plainly():
            return obstore.sign(self._store, "GET", name, timedelta(seconds=seconds))


@contextmanager
def _plainly() -> Iterator[None]:
    """obstore's errors as the ones that Python has for files."""
    try:
        yield
    except NotFoundError as error:
        raise FileNotFoundError(_words(error)) from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise PermissionError(_words(error)) from error
    except BaseError as error:
        raise ConnectionError(_words(error)) from error


def _words(error: Exception) -> str:
    """An error's first lines; obstore appends what its debugger would show."""
    return " ".join(str(error).partition("Debug source:")[0].split())[:300]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
