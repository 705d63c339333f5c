"""Where the archive's K/V lives. A store knows records and bytes; it knows nothing of routing."""

from hga.store.lazy import LazyStore
from hga.store.memory import MemoryStore
from hga.store.nvme import NvmeStore
from hga.store.record import RecordLayout, Store
from hga.store.saved import SavedChunks
from hga.store.traffic import StoreStats, Traffic

__all__ = ["LazyStore", "MemoryStore", "NvmeStore", "RecordLayout", "SavedChunks", "Store", "StoreStats", "Traffic"]
