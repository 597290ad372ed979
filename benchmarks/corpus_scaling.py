"""Does a row cost the same in a corpus ten times as large, and does a worker's memory stay flat? The whole stage.

Ours alone, at N and 10 N documents, in turn; the peak resident memory is the largest of any Ray worker process, as
the kernel counts it (VmHWM). The ratios are printed last.
"""

from __future__ import annotations

import statistics
import threading
from collections import defaultdict
from pathlib import Path

import psutil
from competitors import corpus
from competitors.side_by_side import OURS, Tool, arguments, run

SAMPLE_SECONDS = 0.2
TOOL = Tool("", "zero_to_one.py", ("--task", "everything"))


def worker_peaks() -> dict[int, int]:
    """Process id -> largest resident bytes so far, of the Ray workers that this benchmark started."""
    peaks = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::"):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                status = dict(line.split(":", 1) for line in lines)
                peaks[process.pid] = int(status["VmHWM"].split()[0]) * 1024
        except (OSError, KeyError, psutil.NoSuchProcess):
            continue  # it has ended
    return peaks


class PeakMemory:
    """The largest peak of any worker while the block runs."""

    def __enter__(self) -> PeakMemory:
        self.num_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.num_bytes = max(self.num_bytes, *worker_peaks().values(), 0)


def main() -> None:
    given = arguments(__doc__, num_documents=100_000, runs=3)
    sizes = (given.documents, 10 * given.documents)
    folders = {size: corpus.build(given.raw, given.folder / "corpus", size) for size in sizes}
    seconds: dict[int, list[float]] = defaultdict(list)
    memory: dict[int, list[int]] = defaultdict(list)
    for _ in range(given.runs):
        for size in sizes:
            with PeakMemory() as peak:
                answer = run(OURS, TOOL, folders[size], given)
            assert peak.num_bytes, "no worker was seen"
            seconds[size].append(answer["seconds"])
            memory[size].append(peak.num_bytes)
            worker = f"worker {peak.num_bytes / 2**30:.2f} GiB"
            print(f"  {size:,} documents: {answer['seconds']:.1f} s, {worker}", flush=True)
    small, large = (statistics.median(seconds[size]) for size in sizes)
    print(f"{'documents':>12} {'seconds':>9} {'µs a row':>9} {'largest worker, GiB':>20}")
    for size in sizes:
        median = statistics.median(seconds[size])
        print(f"{size:12,} {median:9.1f} {median / size * 1e6:9.0f} {max(memory[size]) / 2**30:20.2f}")
    print(f"cost of a row at ten times the rows: {large / small / 10:.2f} times (aim: at most 1.15)")
    print(f"largest worker at ten times the rows: {max(memory[sizes[1]]) / max(memory[sizes[0]]):.2f} times")


if __name__ == "__main__":
    main()
