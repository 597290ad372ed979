"""The content filter's latency: per 1,000 characters of a whole text, and per chunk of a stream.

Phrases, personal data and meaning apart; medians. The texts are the harmless lines of tests/data/moderation.jsonl, so
that no verdict ends a check early. The bundled encoder runs on one thread, as in the endpoint.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from app.privacy import find_pii  # noqa: E402
from app.serving.lexicon import OWN_WORDS, Lexicon, read_terms  # noqa: E402
from app.serving.moderation import build_moderator  # noqa: E402
from app.serving.policy import HAN, Policy  # noqa: E402
from app.serving.semantics import Classifier  # noqa: E402
from app.serving.streaming import HeldBack  # noqa: E402

CHARACTERS = 1000
CHUNK = {"zh": 2, "en": 5}  # characters of a token, about
POLICIES = {
    "default policy": Policy(),
    "all personal data": Policy(
        pii_mask=("resident_id", "bank_card", "passport", "mobile", "landline", "email", "ipv4")
    ),
}


def texts() -> dict[str, str]:
    """1,000 characters in each language without a forbidden phrase."""
    lexicon = Lexicon(read_terms(str(OWN_WORDS)))
    lines = (ROOT / "tests/data/moderation.jsonl").read_text(encoding="utf-8").splitlines()
    harmless = [row["text"] for row in map(json.loads, lines) if row["label"] == "allowed"]
    zh = "。".join(text for text in harmless if HAN.search(text) and not lexicon.find(text))
    en = ". ".join(text for text in harmless if not HAN.search(text) and not lexicon.find(text))
    return {"zh": zh[:CHARACTERS], "en": en[:CHARACTERS]}


def seconds(run: Callable[[], object], rounds: int) -> list[float]:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


def print_whole(language: str, text: str) -> None:
    lexicon, classifier = Lexicon(read_terms(str(OWN_WORDS))), Classifier.from_examples()
    checks: dict[str, tuple[Callable[[], object], int]] = {
        "phrases": (lambda: lexicon.find(text), 200),
        "personal data": (lambda: find_pii(text), 200),
        "meaning": (lambda: classifier.judge(text), 10),
    }
    for name, (check, rounds) in checks.items():
        check()
        print(f"{language}  {name:20} {1000 * statistics.median(seconds(check, rounds)):9.3f} ms per 1,000 characters")


def print_stream(language: str, text: str) -> None:
    moderator = build_moderator(POLICIES)
    for name, policy in POLICIES.items():
        chunks = [text[i : i + CHUNK[language]] for i in range(0, len(text), CHUNK[language])]
        taken, held_back = [], []
        for _ in range(5):
            held, num_in, num_out = HeldBack(moderator, policy), 0, 0
            for chunk in chunks:
                start = time.perf_counter()
                sent = held.push(chunk)
                taken.append(time.perf_counter() - start)
                num_in, num_out = num_in + len(chunk), num_out + len(sent)
                held_back.append(num_in - num_out)
            assert held.blocked is None, "harmless lines were chosen"
        centiles = statistics.quantiles(taken, n=100)
        print(
            f"{language}  stream, {name:20} {1e6 * centiles[49]:6.0f} us per chunk, 99th {1e6 * centiles[98]:6.0f};"
            f" held back {statistics.mean(held_back):5.1f} characters on average, {max(held_back)} at most"
        )


def main() -> None:
    for language, text in texts().items():
        print_whole(language, text)
    for language, text in texts().items():
        print_stream(language, text)


if __name__ == "__main__":
    main()
