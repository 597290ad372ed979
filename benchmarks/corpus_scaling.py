"""Does a row cost the same in a corpus ten times as large, and does a worker's memory stay flat? The whole stage.

Ours alone, at N and 10 N documents, in turn. A worker's own memory (RssAnon) is sampled five times a second; the
largest of any counts. Printed beside it is the largest resident memory with the pages of Ray's object store that a
worker has mapped (VmHWM): the store is one for all workers, of a fixed size, and spills to disk what it cannot hold.
The ratios are printed last.
"""

from __future__ import annotations

import statistics
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil
from competitors import corpus
from competitors.side_by_side import OURS, Tool, arguments, run

SAMPLE_SECONDS = 0.2
GIB = 2**30
TOOL = Tool("", "zero_to_one.py", ("--task", "everything"))


def worker_memory() -> Iterator[tuple[int, int]]:
    """Bytes of its own now, and the most that were resident so far, of each Ray worker that this benchmark started."""
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::"):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                status = dict(line.split(":", 1) for line in lines)
                own, resident = (int(status[name].split()[0]) * 1024 for name in ("RssAnon", "VmHWM"))
                yield own, resident
        except (OSError, KeyError, psutil.NoSuchProcess):
            continue  # it has ended


class PeakMemory:
    """The largest peak of any worker while the block runs."""

    def __enter__(self) -> PeakMemory:
        self.own_bytes = self.resident_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            for own, resident in worker_memory():
                self.own_bytes = max(self.own_bytes, own)
                self.resident_bytes = max(self.resident_bytes, resident)


def main() -> None:
    given = arguments(__doc__, num_documents=100_000, runs=3)
    sizes = (given.documents, 10 * given.documents)
    folders = {size: corpus.build(given.raw, given.folder / "corpus", size) for size in sizes}
    seconds: dict[int, list[float]] = defaultdict(list)
    own: dict[int, int] = defaultdict(int)
    resident: dict[int, int] = defaultdict(int)
    for _ in range(given.runs):
        for size in sizes:
            with PeakMemory() as peak:
                answer = run(OURS, TOOL, folders[size], given)
            assert peak.own_bytes, "no worker was seen"
            seconds[size].append(answer["seconds"])
            own[size], resident[size] = max(own[size], peak.own_bytes), max(resident[size], peak.resident_bytes)
            print(f"  {size:,} documents: {answer['seconds']:.1f} s, worker {peak.own_bytes / GIB:.2f} GiB", flush=True)
    small, large = (statistics.median(seconds[size]) for size in sizes)
    print(f"{'documents':>12} {'seconds':>9} {'µs a row':>9} {'largest worker, GiB':>20} {'with store pages':>17}")
    for size in sizes:
        median = statistics.median(seconds[size])
        memory = f"{own[size] / GIB:20.2f} {resident[size] / GIB:17.2f}"
        print(f"{size:12,} {median:9.1f} {median / size * 1e6:9.0f} {memory}")
    print(f"largest worker at ten times the rows: {own[sizes[1]] / own[sizes[0]]:.2f} times (aim: it does not grow)")
    print(f"cost of a row at ten times the rows: {large / small / 10:.2f} times (aim: at most 1.15)")


if __name__ == "__main__":
    main()
