"""The store that fills itself from a file: what is asked for is read once, in few pieces, and nothing else is."""

from collections.abc import Sequence

import pytest
import torch

from hga.ops.closing import pack_records
from hga.store import LazyStore, MemoryStore, RecordLayout

LAYOUT = RecordLayout(kv_heads=3, groups=4, group_size=2, head_dim=5, dtype=torch.float32, ordered=True)
CHUNKS = 9
PIECE_GROUPS = 2
PIECE_BYTES = PIECE_GROUPS * LAYOUT.group_bytes  # two pieces a record, six a chunk


class Source:
    """Pieces in memory, as `LazyStore` reads them, and what it has asked for."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        keys, values = torch.randn(2, CHUNKS, 3, 8, 5, generator=generator)
        self.records = pack_records(keys, values, 2)
        self.order = torch.stack([torch.randperm(8, generator=generator) for _ in range(3 * CHUNKS)])
        self.order = self.order.view(CHUNKS, 3, 8).to(torch.int16)
        self.asked: list[tuple[int, int]] = []
        self.broken: set[int] = set()

    def read(self, firsts: Sequence[int], targets: Sequence[memoryview]) -> None:
        raw = self.records.view(torch.uint8).numpy().tobytes()
        for first, target in zip(firsts, targets, strict=True):
            count = len(target) // PIECE_BYTES
            self.asked.append((first, count))
            target[:] = raw[first * PIECE_BYTES : (first + count) * PIECE_BYTES]
            if self.broken & set(range(first, first + count)):
                target[:] = bytes(len(target))
                raise ValueError("broken")

    def open(self) -> LazyStore:
        return LazyStore(LAYOUT, CHUNKS, self.order, PIECE_GROUPS, self.read, torch.device("cpu"))

    def open_whole(self) -> MemoryStore:
        store = MemoryStore(LAYOUT, torch.device("cpu"), "ram")
        assert store.append(self.records, self.order) == list(range(CHUNKS))
        return store


def ask(store: MemoryStore, places: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Fetch the same ascending (chunk, group) places for every head."""
    ids, groups = torch.tensor(places).T
    return store.fetch(ids.expand(3, -1).contiguous(), groups.expand(3, -1).contiguous())


def test_it_gives_what_a_whole_store_gives_and_reads_once() -> None:
    source = Source()
    lazy, whole = source.open(), source.open_whole()
    assert source.asked == []
    places = [(1, 0), (1, 3), (4, 2)]
    for got, expected in zip(ask(lazy, places), ask(whole, places), strict=True):
        assert torch.equal(got, expected)
    assert source.asked == [(6, 6), (25, 1), (27, 1), (29, 1)]  # neighbours by one call
    ask(lazy, places)
    assert len(source.asked) == 4
    for got, expected in zip(lazy.read([1, 2, 8]), whole.read([1, 2, 8]), strict=True):
        assert torch.equal(got, expected)
    assert source.asked[4:] == [(12, 6), (48, 6)]
    staged = torch.empty(CHUNKS, *LAYOUT.shape)
    lazy.stage(list(range(CHUNKS)), staged)
    assert torch.equal(staged, source.records)
    assert sum(count for _, count in source.asked) == 6 * CHUNKS
    assert lazy.held_bytes() == whole.held_bytes()


def test_heads_are_read_apart() -> None:
    source = Source()
    lazy = source.open()
    ids = torch.tensor([[2], [5], [5]])
    keys, _ = lazy.fetch(ids, torch.tensor([[1], [0], [3]]))
    assert source.asked == [(12, 1), (32, 1), (35, 1)]
    assert torch.equal(keys[1, 0], source.records[5, 1, 0, 0])


def test_what_fails_is_asked_for_again() -> None:
    source = Source()
    lazy = source.open()
    source.broken = {8}
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            ask(lazy, [(1, 0)])
    ask(lazy, [(0, 0)])
    source.broken = set()
    keys, _ = ask(lazy, [(1, 2)])
    assert torch.equal(keys[:, 0], source.records[1, :, 2, 0])


def test_places_of_released_chunks_are_not_filled_over_others() -> None:
    source, others = Source(), Source(seed=1)
    lazy = source.open()
    lazy.release([3, 4])
    new = lazy.append(others.records[:3], others.order[:3])
    assert set(new) & {3, 4}
    records, order = lazy.read([0, *new, 8])
    assert torch.equal(records, torch.cat([source.records[:1], others.records[:3], source.records[8:]]))
    assert torch.equal(order[1:4], others.order[:3].long())
    assert source.asked == [(0, 6), (48, 6)]
    with pytest.raises(KeyError, match="not held"):
        lazy.read([99])


def test_released_whole_it_lets_memory_and_source_go() -> None:
    source = Source()
    lazy = source.open()
    lazy.retain([0])
    lazy.release(list(range(CHUNKS)))
    assert lazy.held_bytes()["ram"] == LAYOUT.chunk_bytes + LAYOUT.order_bytes
    assert torch.equal(lazy.read([0])[0], source.records[:1])
    lazy.abandon([0])
    assert lazy.held_bytes() == {"ram": 0}
    assert lazy.allocated_bytes() == {"ram": 0}
    assert lazy._missing_count == 0
    (chunk,) = lazy.append(source.records[5:6], source.order[5:6])
    assert torch.equal(lazy.read([chunk])[0], source.records[5:6])
