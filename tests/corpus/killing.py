"""A user's rule that kills, once: the worker that asks it, or the process whose id lies in the flag file."""

import os
import signal
from pathlib import Path

FLAG = Path(__file__).with_name("killing.flag")
TRIGGER = "此处中断"


def kill_once(text: str) -> str | None:
    """Reject nothing."""
    if TRIGGER in text and FLAG.exists():
        victim = FLAG.read_text()
        FLAG.unlink()
        os.kill(os.getpid() if victim == "worker" else int(victim), signal.SIGKILL)
    return None
