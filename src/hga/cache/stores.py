"""Which store a config asks for."""

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
