"""What a store on a file has read and written: operations, bytes, latencies, queue depth, RAM hits."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_STEPS = 8  # a doubling of latency in 8 steps: percentiles within 9 percent
_FASTEST_SECONDS = 1e-6
_BUCKETS = 28 * _STEPS  # up to 4.5 minutes


@dataclass(frozen=True)
class StoreStats:
    """Sums since the archive began. Reads and writes are the file's: a group found in RAM causes none.

    ram_hits, ram_misses: routed groups found in the RAM cache, or not; ram_hit_rate: the share found. read_p50_ms,
    read_p99_ms: latency of one read, to 9 percent. deepest_queue: most reads asked for at once. queued_bytes: written
    to the store, not yet to the file.
    """

    read_operations: int
    read_bytes: int
    read_p50_ms: float
    read_p99_ms: float
    deepest_queue: int
    written_operations: int
    written_bytes: int
    queued_bytes: int
    ram_hits: int
    ram_misses: int
    ram_hit_rate: float


class Traffic:
    """Counters of one store, or of several added up. Threads may count at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latencies = [0] * _BUCKETS
        self.read_bytes = self.deepest_queue = 0
        self.written_operations = self.written_bytes = self.queued_bytes = 0
        self.ram_hits = self.ram_misses = 0

    def add_reads(self, seconds: list[float], read_bytes: int) -> None:
        """Count reads by their latencies."""
        doublings = np.log2(np.maximum(seconds, _FASTEST_SECONDS) / _FASTEST_SECONDS)
        steps = np.minimum(doublings * _STEPS, _BUCKETS - 1).astype(np.int64).tolist()
        with self._lock:
            self.read_bytes += read_bytes
            for step in steps:
                self._latencies[step] += 1

    def note_queue(self, reads: int) -> None:
        """Note how many reads are asked for at once."""
        self.deepest_queue = max(self.deepest_queue, reads)

    def queue_write(self, size_bytes: int) -> None:
        """Count bytes on their way to the file; negative: given up."""
        with self._lock:
            self.queued_bytes += size_bytes

    def add_write(self, size_bytes: int) -> None:
        """Count a write that is done."""
        with self._lock:
            self.written_operations += 1
            self.written_bytes += size_bytes

    def add_look_ups(self, hits: int, misses: int) -> None:
        """Count groups found in RAM, and those that were not."""
        self.ram_hits += hits
        self.ram_misses += misses

    def add(self, other: Traffic) -> None:
        """Add another store's counts."""
        self._latencies = [a + b for a, b in zip(self._latencies, other._latencies, strict=True)]
        self.deepest_queue = max(self.deepest_queue, other.deepest_queue)
        for name in ("read_bytes", "written_operations", "written_bytes", "queued_bytes", "ram_hits", "ram_misses"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def stats(self) -> StoreStats:
        """The counts so far."""
        return StoreStats(
            read_operations=sum(self._latencies),
            read_bytes=self.read_bytes,
            read_p50_ms=self._percentile(0.50),
            read_p99_ms=self._percentile(0.99),
            deepest_queue=self.deepest_queue,
            written_operations=self.written_operations,
            written_bytes=self.written_bytes,
            queued_bytes=self.queued_bytes,
            ram_hits=self.ram_hits,
            ram_misses=self.ram_misses,
            ram_hit_rate=self.ram_hits / max(1, self.ram_hits + self.ram_misses),
        )

    def _percentile(self, share: float) -> float:
        """Latency in ms that this share of the reads did not exceed; 0 without reads."""
        wanted, seen = share * sum(self._latencies), 0
        for step, count in enumerate(self._latencies):
            seen += count
            if seen and seen >= wanted:
                return float(1e3 * _FASTEST_SECONDS * 2 ** ((step + 1) / _STEPS))
        return 0.0


def add_up(traffics: Iterable[Traffic]) -> StoreStats:
    """The counts of several stores together."""
    total = Traffic()
    for traffic in traffics:
        total.add(traffic)
    return total.stats()
