"""Which store a config asks for, and what it will take."""

from __future__ import annotations

import torch

from hga.config import HGAConfig
from hga.store import MemoryStore, NvmeStore, RecordLayout, Store
from hga.store.host import GIB, available_host_bytes


def open_store(
    config: HGAConfig, device: torch.device, layers: int, opened: list[Store], layout: RecordLayout
) -> Store:
    """The store that a layer's rows share. It is no method: rows that knew their layer would be a cycle with it,
    and a dropped cache's memory would wait for the garbage collector.
    """
    if not opened:
        if config.store in ("nvme", "auto"):
            ram_bytes = config.ram_cache_bytes or (available_host_bytes() or 2 * GIB) // 2
            share = max(layout.chunk_bytes, ram_bytes // layers)
            opened.append(NvmeStore(layout, share, spill=config.store == "auto"))
        else:
            opened.append(MemoryStore(layout, torch.device("cpu") if config.store == "ram" else device, config.store))
    return opened[0]


def growth_bytes(config: HGAConfig, layers: int, opened: list[Store], layout: RecordLayout, chunks: int) -> int:
    """Bytes that the store of a layer's rows will take for so many chunks more, beyond what it has allocated.

    Of a disk, where the archive is on one, else of memory.
    """
    if config.store in ("nvme", "auto"):
        store = open_store(config, torch.device("cpu"), layers, [*opened], layout)
        assert isinstance(store, NvmeStore)
        return store.scratch_growth_bytes(chunks)
    unused = sum(sum(store.allocated_bytes().values()) - sum(store.held_bytes().values()) for store in opened)
    return max(0, chunks * (layout.chunk_bytes + layout.order_bytes) - unused)
