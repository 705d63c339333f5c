"""What was read, kept for prompts that begin alike: live caches under a byte limit, and saved contexts in a folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hga.cache import HGACache, common_prefix
from hga.cache.saved import read_context
from hga.config import HGAConfig
from hga.serving.answer import usable

logger = logging.getLogger("hga.serving")

EVERYBODY = None
"""The owner of a saved context: whoever runs the server put it there for all."""


@dataclass(frozen=True)
class SavedFile:
    """A saved context that is not loaded yet."""

    path: Path
    ids: list[int] = field(repr=False)


@dataclass(eq=False)
class Context:
    """A cache of `ids`, which nothing writes to: whoever uses it takes a fork. owner: the only one who may.

    file: where it was loaded from.
    """

    owner: str | None
    ids: list[int]
    cache: HGACache = field(repr=False)
    file: SavedFile | None = None

    def serves(self, owner: str, prompt_ids: Sequence[int]) -> int:
        """Tokens of a prompt that it spares reading."""
        if self.owner not in (owner, EVERYBODY):
            return 0
        return usable(self.cache, common_prefix(self.ids, prompt_ids), len(prompt_ids))


class Contexts:
    """Live contexts, the least recently used first, which are forgotten first when `limit_bytes` are exceeded."""

    def __init__(self, limit_bytes: int, saved: Sequence[SavedFile] = ()) -> None:
        self.limit_bytes = limit_bytes
        self.evictions = 0
        self._live: list[Context] = []
        self._saved = list(saved)

    def __len__(self) -> int:
        return len(self._live)

    def find(self, owner: str, prompt_ids: Sequence[int], model: Any) -> tuple[Context | None, int]:
        """The context that spares most of a prompt, and how many tokens; of equals the shortest, which forks fastest.

        A saved context that spares more than any live one is loaded; one that cannot be is passed over, and logged.
        """
        best, most = None, 0
        for context in self._live:
            spared = context.serves(owner, prompt_ids)
            if spared > most or (best is not None and spared == most and len(context.ids) < len(best.ids)):
                best, most = context, spared
        for file in self._saved:
            common = min(common_prefix(file.ids, prompt_ids), len(prompt_ids) - 1)
            is_loaded = any(context.file is file for context in self._live)
            if common > most and not is_loaded:
                try:
                    loaded = Context(EVERYBODY, file.ids, HGACache.load(file.path, model), file)
                except (ValueError, OSError):
                    logger.exception("%s cannot be used, prompts are read instead", file.path)
                    continue
                self._live.append(loaded)
                if (spared := loaded.serves(owner, prompt_ids)) > most:
                    best, most = loaded, spared
        if best is not None:
            self._live.remove(best)
            self._live.append(best)
        return best, most

    def add(self, owner: str, ids: list[int], cache: HGACache) -> None:
        """Keep a cache of `ids`, which nobody writes to from now on; what it can stand in for is forgotten."""
        for context in list(self._live):
            covered = context.owner == owner and ids[: len(context.ids)] == context.ids
            if covered and cache.can_crop_to(len(context.ids)):
                self._live.remove(context)
        self._live.append(Context(owner, ids, cache))
        self.shrink()

    def shrink(self, limit_bytes: int | None = None) -> None:
        """Forget contexts until the limit is kept, the least recently used first."""
        limit = self.limit_bytes if limit_bytes is None else limit_bytes
        while self._live and sum(self.held_bytes().values()) > limit:
            self._live.pop(0)
            self.evictions += 1

    def make_room(self, missing_bytes: int | None) -> bool:
        """Forget the least recently used for who lacks bytes: so many, or half. False if it cannot help."""
        held = sum(self.held_bytes().values())
        missing = -(-held // 2) if missing_bytes is None else missing_bytes
        if not held or missing > held:
            return False
        self.shrink(held - missing)
        return True

    def distrust(self, cache: HGACache) -> bool:
        """Forget contexts that share a store with a cache that cannot be read, and their files. False if none does."""
        shared = [context for context in self._live if cache.shares_store(context.cache)]
        for context in shared:
            self._live.remove(context)
            if context.file is not None:
                self._saved.remove(context.file)
                logger.error("%s is not used any more until the server starts again", context.file.path)
        return bool(shared)

    def held_bytes(self) -> dict[str, int]:
        """Bytes of all live contexts by tier; archives that they share count once."""
        counted: set[int] = set()
        total: dict[str, int] = {}
        for context in self._live:
            for tier, count in context.cache.held_bytes(counted).items():
                total[tier] = total.get(tier, 0) + count
        return total


def find_saved(folder: Path, config: HGAConfig) -> list[SavedFile]:
    """The saved contexts of a folder. ValueError if it is none, or holds one that is damaged or of another rule."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of saved contexts; make one with hga context save --out {folder}/NAME")
    found = []
    for path in sorted(folder.glob("*.hga")):
        context = read_context(path)
        if context.config != config:
            raise ValueError(
                f"{path} was read by another routing rule (budget_tokens={context.config.budget_tokens}) than the one "
                "to serve by; give its --preset, --budget and --prefill (hga context info shows them), or move it "
                "elsewhere"
            )
        with safe_open(path, "pt") as file:
            found.append(SavedFile(path, file.get_tensor("token_ids").tolist()))
    return found
