"""The names that a client may ask for, and the engine that answers each: the model, a candidate beside it, adapters.

Pure but for the adapters' folder, which is looked at again every LOOK_SECONDS: a PEFT folder put there is served by its
name without a redeployment. What is in such a folder must not change afterwards, since engines keep what they have
loaded: a new version of an adapter is a new name.
"""

from __future__ import annotations

import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

CANDIDATE = "-candidate"  # after the model's name, for those who want to ask the candidate alone
LOOK_SECONDS = 2.0  # between two looks at the adapters' folder
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"[\w][\w.-]{0,127}")


@dataclass(frozen=True)
class Version:
    """One model artifact that an engine deployment serves."""

    name: str  # of the deployment
    digest: str
    context_tokens: int


class Adapters:
    """The PEFT adapters in a folder, by the names of their subfolders; none without a folder."""

    def __init__(self, folder: str, max_rank: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = Path(folder) if folder else None
        self._max_rank = max_rank
        self._clock = clock
        self._looked_at = float("-inf")
        self._names: frozenset[str] = frozenset()
        self._refused: dict[str, str] = {}

    def names(self) -> frozenset[str]:
        """Those that can be served."""
        if self._folder and self._clock() - self._looked_at >= LOOK_SECONDS:
            self._looked_at = self._clock()
            self._names = frozenset(self._look(self._folder))
        return self._names

    def _look(self, folder: Path) -> Iterator[str]:
        try:
            found = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
        except OSError as error:
            logger.error("adapters.folder: %s: %s", folder, error.strerror)
            return
        for path in found:
            reason = unusable(path, self._max_rank)
            if reason is None:
                yield path.name
            elif self._refused.get(path.name) != reason:  # said once
                logger.warning("adapter %s is not served: %s", path.name, reason)
            self._refused[path.name] = reason or ""


def unusable(folder: Path, max_rank: int) -> str | None:
    """Why a folder cannot be served as an adapter; None if it can."""
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    except OSError:
        return f"no {ADAPTER_CONFIG}"
    except ValueError:
        return f"{ADAPTER_CONFIG} is not JSON"
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        return "it is not LoRA"
    rank = settings.get("r")
    if not isinstance(rank, int) or not 0 < rank <= max_rank:
        return f"its rank is {rank}; adapters.max_rank is {max_rank}"
    if not (folder / ADAPTER_WEIGHTS).is_file():
        return f"no {ADAPTER_WEIGHTS}: nothing is unpickled here"
    return None


class Catalog(Mapping[str, Mapping[str, Any]]):
    """OpenAI's card of each model, by its name at the endpoint."""

    def __init__(
        self,
        versions: Sequence[Version],
        candidate_percent: float = 0,
        adapters: Adapters | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`versions` are the model and maybe its candidate, which gets its percent of the model's requests."""
        self.versions = tuple(versions)
        self.model = self.versions[0]
        self._own = {version.name: version for version in versions}
        self._candidate_percent = candidate_percent
        self._adapters = adapters or Adapters("", 0)
        self._draw = draw
        self._started_at = int(time.time())

    @property
    def context_tokens(self) -> int:
        """Of the model whose context is the longest; a shorter one's engine refuses what does not fit."""
        return max(version.context_tokens for version in self.versions)

    def choose(self, name: str) -> str:
        """Which name answers a request for `name`: another one only when the candidate takes its share."""
        if name == self.model.name and len(self.versions) > 1 and 100 * self._draw() < self._candidate_percent:
            return self.versions[1].name
        return name

    def version_of(self, name: str) -> Version:
        """Whose engine answers for a name; an adapter's is the model's."""
        return self._own.get(name, self.model)

    def is_adapter(self, name: str) -> bool:
        """Whether a name is an adapter's; the model's own names come first."""
        return name not in self._own and name in self._adapters.names()

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        if name not in self:
            raise KeyError(name)
        version = self.version_of(name)
        card = {"id": name, "object": "model", "created": self._started_at, "owned_by": "zero-to-one"}
        card |= {"max_model_len": version.context_tokens, "version": version.digest}
        return card | ({"parent": self.model.name} if self.is_adapter(name) else {})

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._adapters.names()

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from sorted(self._adapters.names() - set(self._own))

    def __len__(self) -> int:
        return sum(1 for _ in self)  # list() would ask for the length first
