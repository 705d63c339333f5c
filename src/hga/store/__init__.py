"""Where the archive's K/V lives. A store knows records and bytes; it knows nothing of routing."""

from hga.store.lazy import LazyStore
from hga.store.memory import MemoryStore
from hga.store.record import RecordLayout, Store

__all__ = ["LazyStore", "MemoryStore", "RecordLayout", "Store"]
