"""Files under names: the same tests on a folder, on a real S3 server, and on Vercel's package with its protocol."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import ConfigurationError, GiveUpError, RetryLaterError
from shared.objects import Objects, objects_at
from shared.objects_blob import BlobPlace
from tests.blob_server import TOKEN, BlobServer, blob_server
from tests.s3_server import S3Server

BIG = bytes(range(256)) * 4096 * 11  # 11 MiB: three parts of S3, two of Blob


@pytest.fixture
def blobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[BlobServer]:
    pytest.importorskip("vercel.blob")
    with blob_server() as server:
        monkeypatch.setenv("BLOB_READ_WRITE_TOKEN", TOKEN)
        monkeypatch.setenv("VERCEL_BLOB_API_URL", server.url)
        yield server


@pytest.fixture(params=["folder", "s3", "vercel-blob"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    match request.param:
        case "folder":
            return objects_at(str(tmp_path / "kept"))
        case "s3":
            server: S3Server = request.getfixturevalue("s3")
            return objects_at(server.bucket("one", "kept/here"))
        case _:
            found: BlobServer = request.getfixturevalue("blobs")
            return Objects(BlobPlace("vercel-blob://private/kept", found.client))


def test_what_is_written_is_read_and_listed_by_folder(objects: Objects) -> None:
    names = ["a/one.json", "a/b/2026-11-20T10:00:04~4s/two.bin", "ab/three", "a/four"]
    for name in names:
        objects.write(name, name.encode())
    assert [objects.read(name) for name in names] == [name.encode() for name in names]
    assert list(objects.names()) == sorted(names)
    assert list(objects.names("a")) == ["a/b/2026-11-20T10:00:04~4s/two.bin", "a/four", "a/one.json"]
    objects.write("a/four", b"again")
    assert objects.read("a/four") == b"again"
    assert (objects.size_bytes("a/four"), objects.size_bytes("a/five"), objects.has("a/five")) == (5, None, False)


def test_a_large_file_goes_in_parts_and_comes_back_verified(objects: Objects, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(BIG)
    sha256 = objects.upload("models/big", tmp_path / "big")
    objects.download("models/big", tmp_path / "back/big", sha256)
    assert (tmp_path / "back/big").read_bytes() == BIG
    with pytest.raises(GiveUpError, match="models/big was changed"):
        objects.download("models/big", tmp_path / "back/other", "0" * 64)
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["big"]


def test_what_is_there_whole_is_not_sent_again(objects: Objects, tmp_path: Path) -> None:
    sent: list[str] = []
    put = objects._place.put
    objects._place.put = lambda name, data: (sent.append(name), put(name, data))[1]  # type: ignore[method-assign]
    (tmp_path / "file").write_bytes(b"weights")
    objects.upload("x/file", tmp_path / "file")
    objects.upload("x/file", tmp_path / "file")
    (tmp_path / "file").write_bytes(b"another")  # as long, and not the same
    objects.upload("x/file", tmp_path / "file")
    assert (sent, objects.read("x/file")) == (["x/file", "x/file"], b"another")


def test_removing(objects: Objects) -> None:
    for name in ("a/one", "a/b/two", "ab"):
        objects.write(name, b"x")
    objects.remove("a")
    objects.remove("not there")
    assert list(objects.names()) == ["ab"]
    objects.remove("ab")
    assert list(objects.names()) == []


def test_what_is_not_there_is_said(objects: Objects, tmp_path: Path) -> None:
    with pytest.raises(GiveUpError, match=r"a/none is not in .*check RATCHET_ARTIFACTS"):
        objects.read("a/none")
    with pytest.raises(GiveUpError, match="a/none is not in"):
        objects.download("a/none", tmp_path / "none")
    assert list(tmp_path.glob("*none*")) == []


def test_a_signed_url_needs_no_credentials(s3: S3Server, tmp_path: Path) -> None:
    objects = objects_at(s3.bucket("one", "kept"))
    objects.write("a/file", b"content")
    url = objects.signed_url("a/file", 60)
    assert url is not None
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"content"
    assert objects_at(str(tmp_path)).signed_url("a/file", 60) is None


def test_s3_away_is_a_reason_to_try_later_and_leaves_no_half(s3: S3Server, tmp_path: Path) -> None:
    objects = objects_at(s3.bucket("one"))
    (tmp_path / "big").write_bytes(BIG)
    with s3.dying_at_part(2), pytest.raises(RetryLaterError, match="s3://one is away"):
        objects.upload("big", tmp_path / "big")
    with pytest.raises(RetryLaterError, match="s3://one is away"):
        list(objects.names())
    s3.start()
    assert list(objects.names()) == []
    objects.upload("big", tmp_path / "big")
    assert objects.read("big") == BIG


def test_blob_away_in_mid_upload_leaves_nothing(blobs: BlobServer, tmp_path: Path) -> None:
    objects = Objects(BlobPlace("vercel-blob://private", blobs.client))
    (tmp_path / "big").write_bytes(BIG)
    blobs.breaks_at_part = 2
    with pytest.raises(RetryLaterError, match="vercel-blob://private is away"):
        objects.upload("big", tmp_path / "big")
    assert blobs.blobs == {}
    blobs.breaks_at_part = None
    objects.upload("big", tmp_path / "big")
    assert blobs.blobs == {"big": BIG}


def test_who_is_refused_hears_which_setting(blobs: BlobServer, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOB_READ_WRITE_TOKEN", "vercel_blob_rw_store1_other")
    with pytest.raises(GiveUpError, match=r"refuses a: .*RATCHET_ARTIFACTS and the credentials"):
        Objects(BlobPlace("vercel-blob://private", blobs.client)).write("a", b"x")
    with pytest.raises(GiveUpError, match="check RATCHET_ARTIFACTS"):
        objects_at("s3://no-such-bucket").write("a", b"x")
    with s3.authorizing(), pytest.raises(GiveUpError, match=r"refuses a: .*RATCHET_ARTIFACTS and the credentials"):
        objects_at("s3://one").write("a", b"x")


@pytest.mark.parametrize(
    ("place", "options", "words"),
    [
        ("ftp://host/x", {}, "ftp:// is not known"),
        ("s3://bucket", {"regoin": "x"}, "RATCHET_ARTIFACTS=s3://bucket"),
        ("vercel-blob://one/x", {}, "write vercel-blob://private/prefix"),
    ],
)
def test_a_place_that_is_none_names_the_setting(place: str, options: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        objects_at(place, options)


def test_two_writers_leave_one_whole_file(objects: Objects) -> None:
    contents = [bytes([n]) * 100_000 for n in range(4)]
    threads = [threading.Thread(target=objects.write, args=("same", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert objects.read("same") in contents
