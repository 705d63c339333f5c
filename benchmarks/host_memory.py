"""Host memory of the archive on a GPU machine: page-locking, and the store's own copies against one large one.

    python benchmarks/host_memory.py --gib 8

Records of Qwen3-30B-A3B's layer (4 KV heads, D 128, chunks of 256, bfloat16: 514 KiB with permutations). The store
appends and reads blocks of 32 chunks (8,192 tokens); "first fill" grows and page-locks, "refill" reuses its places.
One JSON line a figure; GB/s are 10^9 bytes a second, medians where something is repeated.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hga.store import MemoryStore, RecordLayout
from hga.store.host import GIB, allocate_host, available_host_bytes

LAYOUT = RecordLayout(kv_heads=4, groups=64, group_size=4, head_dim=128, dtype=torch.bfloat16, ordered=True)
ONE_BYTES = LAYOUT.chunk_bytes + LAYOUT.order_bytes
BLOCK_CHUNKS = 32
_BUSY_CYCLES = 1_000_000_000  # about half a second


def say(figure: str, **values: Any) -> None:
    shared = {"hardware": torch.cuda.get_device_name(), "torch": torch.__version__}
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}
    print(json.dumps({"figure": figure, **rounded, **shared}), flush=True)


def seconds(step: Callable[[], Any]) -> float:
    """Time of one call, the GPU's work included."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def show_machine() -> None:
    """What the host says of its memory, and what the check before a prefill makes of it."""
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    say("host", mem_total=" ".join(total.split()[1:]), available_host_bytes=available_host_bytes())


def time_pinning(most_bytes: int) -> None:
    """Page-locking: hga's blocks, torch's allocator, and the same mapping without huge pages."""
    for size_bytes in (8 << 20, 32 << 20, 128 << 20, GIB, 4 * GIB):
        if size_bytes > most_bytes:
            break
        times = {"allocate_host": [], "torch pin_memory": [], "4 KiB pages": []}
        release = []
        # Once: torch keeps what it has page-locked, and a second call would get it back.
        times["torch pin_memory"].append(
            seconds(lambda n=size_bytes: torch.empty(n, dtype=torch.uint8, pin_memory=True))
        )
        for _ in range(3):
            blocks = []
            times["allocate_host"].append(
                seconds(lambda blocks=blocks, n=size_bytes: blocks.append(allocate_host(n, torch.device("cuda"))))
            )
            assert blocks[0].pinned, "the driver refused to page-lock"
            release.append(seconds(blocks.clear))
            mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_NOHUGEPAGE"):
                mapping.madvise(mmap.MADV_NOHUGEPAGE)
            address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
            times["4 KiB pages"].append(
                seconds(lambda a=address, n=size_bytes: torch.cuda.cudart().cudaHostRegister(a, n, 3))
            )
            torch.cuda.cudart().cudaHostUnregister(address)
        for how, taken in times.items():
            median = statistics.median(taken)
            say(f"page-lock, {how}", size_bytes=size_bytes, ms=median * 1e3, s_per_gib=median / size_bytes * GIB)
        say("unlock and unmap", size_bytes=size_bytes, ms=statistics.median(release) * 1e3)


def time_pinning_beside_work() -> None:
    """Whether page-locking waits for the GPU, or the GPU for it."""
    work = seconds(lambda: torch.cuda._sleep(_BUSY_CYCLES))
    torch.cuda._sleep(_BUSY_CYCLES)
    started = time.perf_counter()
    block = allocate_host(32 << 20, torch.device("cuda"))
    alone = time.perf_counter() - started
    torch.cuda.synchronize()
    both = time.perf_counter() - started
    say("page-lock 32 MiB while a kernel runs", kernel_ms=work * 1e3, returned_ms=alone * 1e3, all_ms=both * 1e3)
    del block


def time_copies(total_bytes: int) -> None:
    """The store's append and read against one large copy of the same bytes."""
    blocks = max(1, total_bytes // (BLOCK_CHUNKS * ONE_BYTES))
    copied = blocks * BLOCK_CHUNKS * ONE_BYTES
    gpu = torch.device("cuda", torch.cuda.current_device())
    records = torch.randn(BLOCK_CHUNKS, *LAYOUT.shape, device=gpu, dtype=LAYOUT.dtype)
    order = torch.zeros(BLOCK_CHUNKS, LAYOUT.kv_heads, LAYOUT.tokens, device=gpu, dtype=torch.int16)

    large_bytes = min(copied, GIB)
    on_host, on_gpu = allocate_host(large_bytes, gpu), torch.empty(large_bytes, dtype=torch.uint8, device=gpu)
    for figure, target, source in (
        ("device to host, one large copy", on_host.bytes, on_gpu),
        ("host to device, one large copy", on_gpu, on_host.bytes),
    ):
        copy = [seconds(lambda a=target, b=source: a.copy_(b, non_blocking=True)) for _ in range(5)]
        say(figure, bytes=large_bytes, gb_per_s=large_bytes / statistics.median(copy) / 1e9)
    del on_host, on_gpu

    store = MemoryStore(LAYOUT, torch.device("cpu"), "ram")
    ids: list[list[int]] = []

    def append() -> None:
        ids.extend(store.append(records, order) for _ in range(blocks))

    first = seconds(append)
    say(
        "device to host, append, first fill", bytes=copied, gb_per_s=copied / first / 1e9, segments=len(store._segments)
    )
    kept = ids.pop()
    for chunks in ids:
        store.release(chunks)
    again = copied - BLOCK_CHUNKS * ONE_BYTES
    ids.clear()
    blocks -= 1
    if blocks:
        say("device to host, append, refill", bytes=again, gb_per_s=again / seconds(append) / 1e9)
        torch.cuda._sleep(_BUSY_CYCLES)
        started = time.perf_counter()
        extra = store.append(records, order)
        say("append 32 chunks while a kernel runs: time until it returns", ms=(time.perf_counter() - started) * 1e3)
        store.release(extra)
    everything = [chunk for chunks in [*ids, kept] for chunk in chunks]
    for size in (8, BLOCK_CHUNKS):
        parts = [everything[start : start + size] for start in range(0, len(everything), size)]
        taken = statistics.median(seconds(lambda p=parts: [store.read(part, gpu) for part in p]) for _ in range(3))
        say(f"host to device, read of {size} chunks", bytes=copied, gb_per_s=copied / taken / 1e9)
    say("store", held_bytes=store.held_bytes()["ram"], allocated_bytes=store.allocated_bytes()["ram"])
    say("release of everything", ms=seconds(lambda: store.release(everything)) * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="GiB of records to append and read")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "host_memory.py: needs a CUDA device\n")
    torch.cuda.init()
    total_bytes = int(options.gib * GIB)
    show_machine()
    time_pinning(total_bytes)
    time_pinning_beside_work()
    time_copies(total_bytes)
    show_machine()


if __name__ == "__main__":
    main()
