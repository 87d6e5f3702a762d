"""Artifacts by content: the same tests on a folder and on a bucket of a real S3 server."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from shared import artifacts as module
from shared.artifact_bucket import BucketStore, artifacts_of
from shared.artifacts import ArtifactStore, DirectoryStore, describe
from shared.errors import GiveUpError, RetryLaterError
from shared.objects import Objects, objects_at
from shared.settings import Settings
from tests.s3_server import S3Server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "onnx").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "onnx/graph"):
        (directory / name).write_bytes(name.encode() * 1000)
    return directory


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    place = None if request.param == "folder" else request.getfixturevalue("s3").bucket("models", "prefix")
    return artifacts_of(Settings(artifacts=place, artifacts_dir=tmp_path / "local"))


def test_what_is_put_is_opened_by_its_hash(store: ArtifactStore, model: Path, tmp_path: Path) -> None:
    kept = store.put(model)
    assert kept.sha256 == describe(model).sha256
    assert store.put(model) == kept
    store.check(kept.sha256)
    opened = store.open(kept.sha256)
    assert opened == tmp_path / "local" / kept.sha256
    assert describe(opened).files == kept.files


def test_what_is_not_there_is_said(store: ArtifactStore) -> None:
    for wrong in ("0" * 64, "../model", ""):
        with pytest.raises(GiveUpError, match="check RATCHET_ARTIFACTS"):
            store.open(wrong)
        with pytest.raises(GiveUpError, match="check RATCHET_ARTIFACTS"):
            store.check(wrong)


def test_what_was_changed_is_refused(store: ArtifactStore, model: Path) -> None:
    kept = store.put(model)
    (store.open(kept.sha256) / "config.json").write_text("other")
    with pytest.raises(GiveUpError, match="was changed"):
        store.open(kept.sha256)


def test_links_and_nothing_are_no_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(GiveUpError, match="no file to keep"):
        store.put(tmp_path / "empty")
    (tmp_path / "empty" / "link").symlink_to("/etc/passwd")
    with pytest.raises(GiveUpError, match="plain files only"):
        store.put(tmp_path / "empty")


def test_it_is_hashed_once_and_again_where_it_was_touched(
    store: ArtifactStore, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = store.put(model).sha256
    store.open(sha256)
    hashed: list[Path] = []
    monkeypatch.setattr(module, "describe", lambda directory: hashed.append(directory) or describe(directory))
    home = store.open(sha256)
    assert hashed == []
    os.utime(home / "config.json", ns=(0, 0))
    assert store.open(sha256) == home
    assert hashed == [home]


def bucket(s3: S3Server, tmp_path: Path) -> tuple[Objects, BucketStore]:
    objects = objects_at(s3.bucket("models"))
    return objects, BucketStore(objects, tmp_path / "local")


def test_an_upload_that_broke_off_is_no_version_and_goes_on(
    s3: S3Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "model.safetensors").write_bytes(os.urandom(6 * 2**20))
    objects, store = bucket(s3, tmp_path)
    sha256 = describe(model).sha256
    with s3.dying_at_part(2), pytest.raises(RetryLaterError, match="is away"):
        store.put(model)
    s3.start()
    assert list(objects.names()) == [f"artifacts/{sha256}/config.json"]
    with pytest.raises(GiveUpError, match="is not in"):
        store.open(sha256)

    sent: list[str] = []
    put = objects._place.put
    monkeypatch.setattr(
        objects._place, "put", lambda name, data: (sent.append(name.split("/")[-1]), put(name, data))[1]
    )
    store.put(model)
    assert sent == ["model.safetensors", "graph", f"{sha256}.json"], "what was there whole is not sent again"
    assert describe(store.open(sha256)).sha256 == sha256


def test_a_bucket_is_fetched_once_and_goes_on_where_it_broke_off(
    s3: S3Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects, store = bucket(s3, tmp_path)
    sha256 = store.put(model).sha256
    fetched: list[str] = []
    download = objects.download

    def counting(name: str, path: Path, digest: str | None = None) -> None:
        if len(fetched) == 2:
            fetched.append("broken off")
            s3.stop()
        download(name, path, digest)
        fetched.append(path.name)

    monkeypatch.setattr(objects, "download", counting)
    with pytest.raises(RetryLaterError, match="is away"):
        store.open(sha256)
    assert not (tmp_path / "local" / sha256).exists(), "nothing half a version"
    s3.start()
    home = store.open(sha256)
    assert fetched == ["config.json", "model.safetensors", "broken off", "graph"]
    s3.stop()
    assert store.open(sha256) == home
    assert BucketStore(objects, tmp_path / "local").open(sha256) == home
    s3.start()


def test_what_was_changed_in_a_bucket_is_refused(s3: S3Server, model: Path, tmp_path: Path) -> None:
    objects, store = bucket(s3, tmp_path)
    sha256 = store.put(model).sha256
    objects.write(f"artifacts/{sha256}/config.json", b"short")
    with pytest.raises(GiveUpError, match=r"config.json has 5 bytes, not 11000"):
        store.check(sha256)
    with pytest.raises(GiveUpError, match=r"config.json was changed"):
        store.open(sha256)
    assert not (tmp_path / "local" / sha256).exists()


def test_a_full_disk_keeps_nothing_half(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is a file system of 64 KiB's worth of quota: a limit on the size of files, which the kernel keeps."""
    import resource
    import signal

    (model / "model.safetensors").write_bytes(os.urandom(200_000))
    store = DirectoryStore(tmp_path / "local")
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
        with pytest.raises(RetryLaterError, match="could not be kept"):
            store.put(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list((tmp_path / "local").iterdir()) == []
    store.open(store.put(model).sha256)


def test_the_hash_can_be_checked_by_hand(model: Path) -> None:
    lines = "".join(
        f"{hashlib.sha256((model / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors", "onnx/graph")
    )
    assert describe(model).sha256 == hashlib.sha256(lines.encode()).hexdigest()
