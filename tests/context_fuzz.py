"""Hostile saved contexts: mutated headers and bodies, sealed again or not, must be refused or be harmless.

python tests/context_fuzz.py --count 100000 runs the long version of what tests/test_context_fuzz.py samples.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import torch
from asking import new_cache, read
from rows import SMALL

import hga
from hga.cache import HGACache
from hga.cache.saved.context import seal
from hga.cache.saved.file import PAGE_BYTES, FileLayout, raw_bytes
from hga.store import host

TOKENS = 120
VALUES = [
    *(0, 1, -1, 2, 7, 31, 32, 33, 255, 1 << 15, 1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64, 10**30, -(1 << 63)),
    *(0.5, 1e308, float("inf"), float("nan"), True, False, None, "", "x", "F64", "F8_E4M3", "U8", "../../etc/passwd"),
    *("/etc/passwd", "\0", "\ud800", "9" * 5000, [], [[]], {}, [1, 2], {"kind": "routed"}, [0, 0, 0], "A" * 70000),
]


class EscapeError(Exception):
    """The loader opened another file, or took more memory than the file has bytes."""


class Watch:
    """Notes what is opened, and what memory is asked for, while `watching`."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.watching = False
        self.largest = 0
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        # How much memory the machine has left is asked of the kernel.
        if self.watching and event == "open" and not str(arguments[0]).startswith((self.path, "/proc/", "/sys/")):
            raise EscapeError(f"opened {arguments[0]}")

    @contextmanager
    def over(self, size_bytes: int) -> Iterator[None]:
        """Inside, one allocation of tensors or page-locked memory may have `size_bytes` at most."""
        empty, allocate = torch.empty, host.allocate_host

        def measured_empty(*shape: Any, **options: Any) -> Any:
            lengths = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            count = options.get("dtype", torch.float32).itemsize
            for length in lengths:
                count *= length
            if count > size_bytes:
                raise EscapeError(f"asked for {count} bytes for a file of {size_bytes}")
            return empty(*shape, **options)

        def measured_allocate(count: int, gpu: Any = None) -> Any:
            if count > size_bytes:
                raise EscapeError(f"asked for {count} bytes of host memory for a file of {size_bytes}")
            return allocate(count, gpu)

        import hga.store.memory

        torch.empty = measured_empty
        hga.store.memory.allocate_host = measured_allocate
        self.watching = True
        try:
            yield
        finally:
            self.watching = False
            torch.empty = empty
            hga.store.memory.allocate_host = allocate


def fuzz(count: int, seed: int, report_every: int = 0) -> collections.Counter[str]:
    """Load `count` mutations of one file; returns how they ended. Anything but a refusal or a sound cache raises."""
    chance, endings = random.Random(seed), collections.Counter[str]()
    model = families.build("gemma2")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.hga"
        cache = new_cache(model)
        with hga.enabled(model, SMALL):
            read(model, families.prompt(TOKENS), cache)
        saved = cache.save(path, model, families.prompt(TOKENS))
        original, layout = path.read_bytes(), saved.file
        HGACache.load(path, model)  # imports what it needs
        watch = Watch(path)
        for number in range(count):
            mutated = mutate(original, layout, chance)
            path.write_bytes(mutated)
            try:
                with watch.over(len(mutated)):
                    store = chance.choice([None, "ram", "nvme"])
                    cache_bytes = len(mutated) if store == "nvme" else None
                    loaded = HGACache.load(path, model, store=store, ram_cache_bytes=cache_bytes)
            except (ValueError, OSError) as error:
                if str(path) not in str(error):
                    raise AssertionError(f"an error that does not name its file: {error}") from error
                endings["refused"] += 1
                continue
            except Exception as error:
                keep = Path(tempfile.gettempdir()) / f"context-{seed}-{number}.hga"
                keep.write_bytes(mutated)
                raise AssertionError(f"mutation {number} of seed {seed} ({keep}): {type(error).__name__}") from error
            endings["loaded" if mutated != original else "unchanged"] += 1
            try:
                with hga.enabled(model, loaded.hga_config):
                    read(model, families.prompt(3, seed=number), loaded)
            except ValueError:  # a damaged record, or numbers that are none
                endings["refused by the first question"] += 1
            if report_every and (number + 1) % report_every == 0:
                print(number + 1, dict(endings), flush=True)
    return endings


def mutate(original: bytes, layout: FileLayout, chance: random.Random) -> bytes:
    """One mutation: of bytes anywhere, of the header's text, or of its structure; half of the last sealed again."""
    kind = chance.random()
    if kind < 0.25:
        return _mutate_bytes(bytearray(original), chance, 0, len(original))
    if kind < 0.45:
        return _mutate_bytes(bytearray(original), chance, 0, len(layout.header))
    entries = json.loads(layout.header[8:])
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        _mutate_tree(entries, chance)
    body = original[len(layout.header) :]
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8", "surrogatepass")
    if chance.random() < 0.9:
        text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    header = len(text).to_bytes(8, "little") + text
    if chance.random() < 0.2:  # a body of another length
        body = body[: chance.randrange(len(body))] if chance.random() < 0.5 else body + bytes(chance.randrange(9999))
    if chance.random() < 0.7:
        body = _seal(header, body, layout)
    return header + body


def _mutate_bytes(raw: bytearray, chance: random.Random, first: int, last: int) -> bytes:
    for _ in range(chance.choice([1, 1, 2, 8, 64])):
        place = chance.randrange(first, last)
        action = chance.randrange(4)
        if action == 0:
            raw[place] ^= 1 << chance.randrange(8)
        elif action == 1:
            raw[place] = chance.randrange(256)
        elif action == 2:
            size = min(chance.randrange(1, 64), last - place)
            raw[place : place + size] = chance.randbytes(size)
        else:
            del raw[place : place + chance.choice([1, 8, 100, 5000])]
            last = min(last, len(raw))
            if first >= last:
                break
    return bytes(raw)


def _mutate_tree(node: Any, chance: random.Random) -> None:
    """Change one thing somewhere in a JSON tree, and inside texts that are JSON themselves."""
    while True:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = chance.choice(keys)
        child = node[key]
        if isinstance(child, str) and child[:1] in ("{", "["):
            inner = json.loads(child)
            _mutate_tree(inner, chance)
            node[key] = json.dumps(inner, sort_keys=chance.random() < 0.8)
            return
        if isinstance(child, (dict, list)) and child and chance.random() < 0.9:
            node = child
            continue
        action = chance.randrange(5)
        if action == 0 and isinstance(child, int) and not isinstance(child, bool):
            node[key] = child + chance.choice([-1, 1, 8, 32, 4096, -child, child])
        elif action == 1:
            del node[key]
        elif action == 2 and isinstance(node, dict):
            node[chance.choice(["x", "layers.9.records", "a" * 300, str(key) + "_"])] = child
        else:
            node[key] = copy.deepcopy(chance.choice(VALUES))
        return


def _seal(header: bytes, body: bytes, layout: FileLayout) -> bytes:
    """The body with a seal that is right for a header, as whoever makes a hostile file would write it."""
    spec = layout.specs["checksums"]
    start = layout.offsets["checksums"] - len(layout.header)
    if len(body) < start + spec.size_bytes:
        return body
    table = torch.frombuffer(bytearray(body[start : start + spec.size_bytes]), dtype=torch.int64)
    sealed: Any = type("Sealed", (), {"file": FileLayout(header, {}, {}, 0)})
    table[0] = seal(sealed, table)
    return body[:start] + bytes(raw_bytes(table)) + body[start + spec.size_bytes :]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    print(dict(fuzz(chosen.count, chosen.seed, report_every=10_000)))
    print(f"{chosen.count} mutations in {time.perf_counter() - started:.0f} s")
