"""The benchmarks' corpus: documents of 300 to 600 characters made from the demo's raw texts, the same for one seed.

Each document joins random review lines and novel passages. `kind` says how it came about: original, exact (a copy),
near (a copy with random edits, see `edit`) or dirty (what a rule should reject); it is for the reader, no tool sees it.
It makes no new words: two originals may share a line, which leaves them far below any similarity that counts.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

EXACT_SHARE, NEAR_SHARE = 0.10, 0.10
NUM_FILES = 8
MIN_CHARACTERS, MAX_CHARACTERS = 300, 600
PASSAGE_CHARACTERS = 80
MAX_EDITED_SHARE = 0.045  # characters replaced; with 5-character shingles the Jaccard similarity falls to about .64
SPLITTER = re.compile("(?<=[\u3002\uff01\uff1f!?])")  # after a full stop, exclamation or question mark
ENGLISH = "The quick brown fox jumps over the lazy dog near the river bank, and nobody wonders why it does so. "
SYMBOLS = "\u2605\u2606\u25c6\u25a1\u203b\u2192\u2190#$%&*+=<>|~^@"


def build(raw: Path, output: Path, num_documents: int, *, dirty_share: float = 0.0, seed: int = 3) -> Path:
    """Write that many as 8 jsonl files of id, text and kind, unless they are there already; returns the folder."""
    folder = output / f"documents-{num_documents}-dirty-{dirty_share:g}-seed-{seed}"
    if (folder.parent / f"{folder.name}.complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    files = [(folder / f"part-{index:03d}.jsonl").open("w", encoding="utf-8") for index in range(NUM_FILES)]
    made = documents(read_lines(raw), num_documents, dirty_share, seed)
    for index, (text, kind) in enumerate(made):
        row = {"id": f"d{index:08d}", "text": text, "kind": kind}
        files[index % NUM_FILES].write(json.dumps(row, ensure_ascii=False) + "\n")
    for file in files:
        file.close()
    (folder.parent / f"{folder.name}.complete").touch()
    return folder


def read_lines(raw: Path) -> list[str]:
    """The distinct passages of the raw texts in normal form (NFC, no space runs, no controls), longest 2 x 80."""
    lines: dict[str, None] = {}
    for path in sorted(raw.glob("*.jsonl")):
        for record in path.read_text(encoding="utf-8").splitlines():
            for paragraph in json.loads(record)["text"].splitlines():
                lines.update(dict.fromkeys(filter(None, _passages(_in_normal_form(paragraph)))))
    return list(lines)


def documents(lines: list[str], num_documents: int, dirty_share: float, seed: int) -> Iterator[tuple[str, str]]:
    """(text, kind) of every document, in a random order; copies follow any document that was made before."""
    source = random.Random(seed)
    originals: list[str] = []
    for _ in range(num_documents):
        draw = source.random()
        if draw < EXACT_SHARE and originals:
            yield source.choice(originals), "exact"
        elif draw < EXACT_SHARE + NEAR_SHARE and originals:
            yield edit(source.choice(originals), source), "near"
        elif draw < EXACT_SHARE + NEAR_SHARE + dirty_share:
            yield _dirty(source), "dirty"
        else:
            originals.append(_original(lines, source))
            yield originals[-1], "original"


def edit(text: str, source: random.Random) -> str:
    """A near-duplicate: up to 4.5 % of the characters replaced, evenly, and in a third of cases a line added or cut."""
    characters = list(text)
    for position in source.sample(range(len(text)), int(source.uniform(1, 1 + MAX_EDITED_SHARE * len(text)))):
        if not characters[position].isspace():
            characters[position] = chr(source.randrange(0x4E00, 0x9FA5))
    lines = "".join(characters).split("\n")
    match source.randrange(6):
        case 0:
            lines.append("".join(chr(source.randrange(0x4E00, 0x9FA5)) for _ in range(source.randrange(10, 40))))
        case 1 if len(lines) > 3:
            del lines[source.randrange(len(lines))]
    return "\n".join(lines)


def _original(lines: list[str], source: random.Random) -> str:
    wanted, parts, length = source.randint(MIN_CHARACTERS, MAX_CHARACTERS - 2 * PASSAGE_CHARACTERS), [], 0
    while length < wanted:
        parts.append(source.choice(lines))
        length += len(parts[-1]) + 1
    return "\n".join(parts)


def _dirty(source: random.Random) -> str:
    """One of four kinds, each for one rule: too_short, low_chinese_ratio, high_symbol_ratio, high_repetition."""
    match source.randrange(4):
        case 0:
            return "\u5f88\u597d" + chr(source.randrange(0x4E00, 0x9FA5))
        case 1:
            return f"{ENGLISH * 4}{source.random()}"
        case 2:
            pairs = (chr(source.randrange(0x4E00, 0x9FA5)) + source.choice(SYMBOLS) * 2 for _ in range(120))
            return "".join(pairs)
        case _:
            sentence = "".join(chr(source.randrange(0x4E00, 0x9FA5)) for _ in range(20))
            return sentence * 18


def _passages(paragraph: str) -> Iterator[str]:
    """Sentences of a paragraph, joined up to about 80 characters."""
    passage = ""
    for sentence in SPLITTER.split(paragraph):
        if passage and len(passage) + len(sentence) > PASSAGE_CHARACTERS:
            yield passage.strip()
            passage = ""
        passage += sentence[: 2 * PASSAGE_CHARACTERS - len(passage)]
    if len(passage.strip()) >= 10:
        yield passage.strip()


def _in_normal_form(text: str) -> str:
    visible = "".join(character for character in text if unicodedata.category(character)[0] != "C" or character == "\t")
    return " ".join(unicodedata.normalize("NFC", visible).split())
