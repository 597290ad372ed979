"""When a run's figures are bad: levels that warn, and losses that no step should be taken on.

Both look at a window of the steps before, so a resumed run that is given the same lines decides the same.
It does not log, and does not rewind.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from app.training.config import AlarmConfig, CorrectionConfig

_DEVIATION_PER_MAD = 1.4826  # of a normal distribution
_LEAST_DEVIATION = 0.01  # of the median: a flat loss does not make every step a spike


@dataclass(frozen=True)
class Alarm:
    """A figure whose median over the window is on the wrong side of its level."""

    step: int
    name: str
    value: float
    level: float

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3g} is {'below' if self.value < self.level else 'above'} {self.level:g}"


class Alarms:
    """Each fires once, and again only after its median was good in between."""

    def __init__(self, config: AlarmConfig) -> None:
        self._levels = {  # name -> level, whether a larger value is good
            "gpu_utilization": (config.gpu_utilization, True),
            "communication_share": (config.communication_share, False),
            "grad_norm": (config.grad_norm, False),
        }
        self._windows: dict[str, deque[float]] = {name: deque(maxlen=config.window_steps) for name in self._levels}
        self._fired: set[str] = set()

    def look(self, step: int, values: Mapping[str, Any]) -> list[Alarm]:
        """What fires at this step; a figure that is not among the values keeps its window, a window must be full."""
        fired = []
        for name, (level, more_is_good) in self._levels.items():
            window = self._windows[name]
            if name not in values:
                continue
            window.append(float(values[name]))
            if len(window) < (window.maxlen or 0):
                continue
            middle = median(window)
            if not (middle < level if more_is_good else middle > level):
                self._fired.discard(name)
            elif name not in self._fired:
                self._fired.add(name)
                fired.append(Alarm(step, name, middle, level))
        return fired


class SpikeDetector:
    """Tells a step to reject, from the accepted losses before it: not finite, or a robust z-score above the level."""

    def __init__(self, config: CorrectionConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window_steps)

    def is_bad(self, loss: float, grad_norm: float) -> str | None:
        """A reason to go back, or None. A score needs half a window of losses; only a rise is a spike."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss is {loss}, gradient norm {grad_norm}"
        if not self._config.spike_score or len(self._losses) < self._config.window_steps / 2:
            return None
        score = robust_score(loss, self._losses)
        if score <= self._config.spike_score:
            return None
        return f"loss {loss:.4g} is {score:.1f} robust deviations above the median of {len(self._losses)} steps"

    def accept(self, loss: float) -> None:
        """Take the loss of a step that was kept into the window."""
        self._losses.append(loss)

    def reset(self, losses: Iterable[float]) -> None:
        """Start from the losses of the steps before, after a resume or a rewind."""
        self._losses.clear()
        self._losses.extend(losses)


def robust_score(value: float, before: Iterable[float]) -> float:
    """Deviations of the value from the median, a deviation being 1.4826 times the median absolute deviation (Iglewicz
    and Hoaglin 1993), at least 1 % of the median.

    >>> round(robust_score(3.0, [1.9, 2.0, 2.1]), 2)
    6.74
    """
    known = list(before)
    middle = median(known)
    mad = median(abs(other - middle) for other in known)
    return (value - middle) / max(_DEVIATION_PER_MAD * mad, _LEAST_DEVIATION * abs(middle), 1e-12)
