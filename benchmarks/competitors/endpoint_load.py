"""So many clients that ask an OpenAI endpoint without a pause, in a process of their own; prints one JSON line.

Chinese chat prompts of mixed lengths, answers of one fixed length. Every answer is checked for its length. The clients
are one asyncio loop and parse only what they need, since they share the cores with what they measure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import aiohttp

LENGTHS = (8, 16, 24, 40, 64, 96, 140)  # words of a prompt, a token each


class Sample(NamedTuple):
    """One request: seconds to its first text (to the whole answer without streaming) and to its end, and its tokens."""

    first: float
    end: float
    tokens: int


def words(seed: int = 0) -> list[str]:
    """The words of prompts and of the model's vocabulary: pairs of frequent characters, all of them distinct."""
    characters = bytes(byte for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFA) for byte in (high, low))
    frequent = random.Random(seed).sample(characters.decode("gb2312", "ignore"), 1000)
    pairs = [left + right for left in frequent for right in frequent]
    return random.Random(seed).sample(pairs, 3500)


def bodies(given: argparse.Namespace) -> Iterator[bytes]:
    """The requests' bodies; no two prompts begin alike, so that no prefix is found in a cache."""
    draw, known = random.Random(given.seed), words()
    for number in range(given.requests):
        text = "".join(draw.choices(known, k=LENGTHS[number % len(LENGTHS)]))
        body: dict[str, Any] = {
            "model": given.model, "messages": [{"role": "user", "content": text}], "temperature": 0,
            "max_tokens": given.max_tokens, "ignore_eos": True, "stream": given.stream,
        }  # fmt: skip
        if given.stream:
            body["stream_options"] = {"include_usage": True}
        yield json.dumps(body, ensure_ascii=False).encode()


async def stream(session: aiohttp.ClientSession, url: str, body: bytes) -> Sample:
    """One streamed answer."""
    began = time.perf_counter()
    first, last = 0.0, b""
    async with session.post(url, data=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if not first and has_text(line):
                first = time.perf_counter() - began
            if line.startswith(b"data: {"):
                last = line
    end = time.perf_counter() - began
    return Sample(first or end, end, json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"])


def has_text(line: bytes) -> bool:
    """Whether an event brings some of the answer."""
    if not line.startswith(b"data: {"):
        return False
    choices = json.loads(line.removeprefix(b"data: "))["choices"]
    return bool(choices and choices[0]["delta"].get("content"))


async def whole(session: aiohttp.ClientSession, url: str, body: bytes) -> Sample:
    """One answer at once."""
    began = time.perf_counter()
    async with session.post(url, data=body) as answer:
        answer.raise_for_status()
        value = json.loads(await answer.read())
    end = time.perf_counter() - began
    return Sample(end, end, value["usage"]["completion_tokens"])


async def load(given: argparse.Namespace) -> dict[str, float]:
    """All requests, by so many clients that each asks again as soon as it is answered."""
    waiting, samples = bodies(given), []
    ask = stream if given.stream else whole
    headers = {"authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "content-type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as session:

        async def client() -> None:
            for body in waiting:
                samples.append(await ask(session, given.url, body))

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(given.clients)))
        seconds = time.perf_counter() - began
    assert all(sample.tokens == given.max_tokens for sample in samples), "an answer has another length"
    first = sorted(sample.first for sample in samples)
    each = [(sample.end - sample.first) / (sample.tokens - 1) for sample in samples]
    return {
        "requests": len(samples),
        "seconds": seconds,
        "qps": len(samples) / seconds,
        "tokens_per_second": sum(sample.tokens for sample in samples) / seconds,
        "first_median": statistics.median(first),
        "first_p90": first[int(0.9 * (len(first) - 1))],
        "each_median": statistics.median(each),
        "client_cpu": time.process_time(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of chat completions")
    parser.add_argument("--model", default="zero-to-one")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--stream", action="store_true")
    sys.stdout.write(json.dumps(asyncio.run(load(parser.parse_args()))) + "\n")


if __name__ == "__main__":
    main()
