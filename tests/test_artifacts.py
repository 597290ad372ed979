from pathlib import Path

import pytest

from app import storage
from app.artifacts import Input, Manifest, clear, find_complete, publish, read_manifest
from app.config import RunConfig


class Work(RunConfig):
    size: int = 1


def make(uri: str, config: Work, overwrite: bool = False, source: str = "a") -> Manifest:
    draft = Manifest.draft("corpus", uri, config, {"source": Input(uri="raw", digest=source)})
    if done := find_complete(draft, overwrite):
        return done
    clear(uri)
    storage.write_atomic(f"{uri}/part.txt", b"x" * config.size)
    return publish(draft, {"rows": config.size})


def test_complete_work_is_not_redone(tmp_path: Path) -> None:
    first = make(str(tmp_path / "a"), Work(size=3))
    assert make(str(tmp_path / "a"), Work(size=3)) == first
    assert first.files == {"part.txt": 3}


def test_other_settings_or_inputs_need_overwrite(tmp_path: Path) -> None:
    uri = str(tmp_path / "a")
    make(uri, Work(size=3))
    with pytest.raises(ValueError, match=r"other size; set --overwrite"):
        make(uri, Work(size=4))
    with pytest.raises(ValueError, match="other input source"):
        make(uri, Work(size=3), source="b")
    assert make(uri, Work(size=4), overwrite=True).figures == {"rows": 4}


def test_output_without_manifest_is_cleared_and_redone(tmp_path: Path) -> None:
    uri = str(tmp_path / "a")
    storage.write_atomic(f"{uri}/leftover.txt", b"half")
    with pytest.raises(ValueError, match="no complete corpus artifact"):
        read_manifest(uri, "corpus")
    assert list(make(uri, Work(size=2)).files) == ["part.txt"]
    assert not (tmp_path / "a" / "leftover.txt").exists()


def test_a_reader_refuses_another_kind_a_cut_file_and_a_broken_manifest(tmp_path: Path) -> None:
    uri = str(tmp_path / "a")
    make(uri, Work(size=2))
    with pytest.raises(ValueError, match="is a corpus artifact, expected model"):
        read_manifest(uri, "model")
    (tmp_path / "a" / "part.txt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"part.txt: 1 bytes instead of 2"):
        read_manifest(uri, "corpus")
    (tmp_path / "a" / "part.txt").unlink()
    with pytest.raises(ValueError, match=r"part.txt: missing"):
        read_manifest(uri, "corpus")
    (tmp_path / "a" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="not a manifest"):
        read_manifest(uri, "corpus")


def test_where_it_lies_does_not_make_it_stale(tmp_path: Path) -> None:
    make(str(tmp_path / "a"), Work(storage_uri=str(tmp_path)))
    (tmp_path / "a").rename(tmp_path / "b")
    moved = make(str(tmp_path / "b"), Work(storage_uri="/elsewhere"))
    assert moved.uri == str(tmp_path / "b")


def test_the_same_digest_for_the_same_work(tmp_path: Path) -> None:
    one = make(str(tmp_path / "a"), Work(size=3))
    two = make(str(tmp_path / "b"), Work(size=3))
    assert one.digest == two.digest != make(str(tmp_path / "c"), Work(size=4)).digest


def test_memory_filesystem_behaves_like_the_local_one() -> None:
    uri = "memory://bucket/a"
    first = make(uri, Work(size=3))
    assert first.files == {"part.txt": 3}
    assert make(uri, Work(size=3)) == first
    assert read_manifest(uri, "corpus").figures == {"rows": 3}
    assert storage.list_files(uri) == ["memory:///bucket/a/manifest.json", "memory:///bucket/a/part.txt"]
