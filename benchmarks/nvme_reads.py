"""Random reads through the store against plain O_DIRECT preadv with 32 threads on the same file, in the same run.

    HGA_SCRATCH=/folder/on/the/disk python benchmarks/nvme_reads.py --gib 2 --seconds 2

The store's own reads, permutation and routing aside: `fetch` of all groups in random places of 8 KiB and of 64 KiB, of
which its RAM cache holds few, and `stage` of random chunks. Plain reads leave what they read where it came; the store
delivers it. One JSON line a size: thousand places a second that came from the file, and GB/s, medians of the rounds, in
which both take turns.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hga.store import NvmeStore, RecordLayout

LAYOUT = RecordLayout(kv_heads=4, groups=64, group_size=4, head_dim=128, dtype=torch.bfloat16, ordered=False)
PIECE_BYTES = 8192
THREADS = 32


def fill(store: NvmeStore, gib: float) -> int:
    """Write random chunks; returns how many."""
    count = int(gib * 2**30 / LAYOUT.chunk_bytes)
    records = torch.randn(16, *LAYOUT.shape).to(LAYOUT.dtype)
    for _ in range(count // 16):
        store.append(records, None)
    while store.traffic.queued_bytes:
        time.sleep(0.01)
    return count // 16 * 16


def plain_rate(descriptor: int, extents: int, size_bytes: int, seconds: float, seed: int) -> float:
    """Reads a second of 32 threads, each with a page-aligned buffer of its own."""
    stop = time.perf_counter() + seconds
    done = [0] * THREADS

    def work(index: int) -> None:
        buffer = mmap.mmap(-1, size_bytes)
        offsets = (np.random.default_rng([seed, index]).integers(0, extents, 1 << 16) * size_bytes).tolist()
        while True:
            for offset in offsets:
                os.preadv(descriptor, [buffer], offset)
                done[index] += 1
                if time.perf_counter() > stop:
                    return

    threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - started)


def store_rate(read: Callable[[Any], int], batches: list[Any], seconds: float) -> float:
    """Reads a second of batches of the store's own calls."""
    started, done, turn = time.perf_counter(), 0, 0
    while time.perf_counter() - started < seconds:
        done += read(batches[turn % len(batches)])
        turn += 1
    return done / (time.perf_counter() - started)


def places(generator: np.random.Generator, extents: int, size_bytes: int, batch_bytes: int) -> tuple[Any, Any]:
    """All groups of random extents of the file, as many of each head: ids and groups (Hkv, n), ascending."""
    head_bytes = LAYOUT.groups * LAYOUT.group_bytes
    per_head = batch_bytes // size_bytes // LAYOUT.kv_heads
    extent = generator.permutation(extents)
    head = extent * size_bytes % LAYOUT.chunk_bytes // head_bytes
    first = np.stack([np.sort(extent[head == h][:per_head]) for h in range(LAYOUT.kv_heads)]) * size_bytes
    offset = (first[..., None] + np.arange(0, size_bytes, LAYOUT.group_bytes)).reshape(LAYOUT.kv_heads, -1)
    group = offset % head_bytes // LAYOUT.group_bytes
    return torch.from_numpy(offset // LAYOUT.chunk_bytes), torch.from_numpy(group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2048, help="times 8 KiB asked for at once")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = NvmeStore(LAYOUT, 2 * options.batch * PIECE_BYTES)
    started = time.perf_counter()
    chunks = fill(store, options.gib)
    written = chunks * LAYOUT.chunk_bytes / (time.perf_counter() - started)
    assert store._files.reader is not None
    file = store._files.reader.file
    generator = np.random.default_rng(0)
    for size_bytes in (PIECE_BYTES, 8 * PIECE_BYTES, LAYOUT.chunk_bytes):
        extents = chunks * LAYOUT.chunk_bytes // size_bytes
        if size_bytes == LAYOUT.chunk_bytes:
            out = torch.empty(16, *LAYOUT.shape, dtype=LAYOUT.dtype)
            batches = [generator.integers(0, chunks, 16).tolist() for _ in range(64)]

            def read(ids: Any, out: torch.Tensor = out) -> int:
                store.stage(ids, out)
                return len(ids)
        else:
            batches = [places(generator, extents, size_bytes, options.batch * PIECE_BYTES) for _ in range(64)]

            def read(batch: Any, groups: int = size_bytes // LAYOUT.group_bytes) -> int:
                before = store.traffic.ram_misses
                store.fetch(*batch)
                return (store.traffic.ram_misses - before) // groups

        plain, ours = [], []
        for seed in range(options.rounds):
            plain.append(plain_rate(file.descriptor, extents, size_bytes, options.seconds, seed))
            ours.append(store_rate(read, batches, options.seconds))
        found = {
            "read_bytes": size_bytes,
            "plain_thousand_per_s": round(statistics.median(plain) / 1e3, 2),
            "store_thousand_per_s": round(statistics.median(ours) / 1e3, 2),
            "plain_gb_per_s": round(statistics.median(plain) * size_bytes / 1e9, 2),
            "store_gb_per_s": round(statistics.median(ours) * size_bytes / 1e9, 2),
            "store_over_plain": round(statistics.median(ours) / statistics.median(plain), 2),
            "rounds": options.rounds,
            "direct": file.direct,
            "file_gib": options.gib,
            "write_gb_per_s": round(written / 1e9, 2),
            "hardware": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
