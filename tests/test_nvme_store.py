"""The NVMe store: the same bytes as memory's for any cache, and every fault on the way, really caused."""

import contextlib
import errno
import gc
import os
import resource
import shutil
import signal
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from hga.store import MemoryStore, NvmeStore, RecordLayout, SavedChunks, scratch
from hga.store.extents import in_turn, plan_reads
from hga.store.reader import OpenFile, Reader, Threads
from hga.store.scratch import open_scratch
from hga.store.traffic import Traffic

CPU = torch.device("cpu")
EVEN = RecordLayout(kv_heads=2, groups=16, group_size=4, head_dim=32, dtype=torch.float32, ordered=True)
ODD = RecordLayout(kv_heads=3, groups=5, group_size=3, head_dim=7, dtype=torch.bfloat16, ordered=False)
PAIRS = RecordLayout(kv_heads=1, groups=32, group_size=2, head_dim=128, dtype=torch.bfloat16, ordered=True)
WIDE = RecordLayout(kv_heads=2, groups=64, group_size=4, head_dim=80, dtype=torch.bfloat16, ordered=True)
LAYOUTS = pytest.mark.parametrize("layout", [EVEN, ODD, WIDE, PAIRS], ids=["even", "odd", "wide", "pairs"])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HGA_SCRATCH", str(tmp_path))
    return tmp_path


@pytest.fixture(params=["at once", "in parts"])
def delivery(request, monkeypatch):
    """How batches arrive: these are small, and only large ones come in parts."""
    if request.param == "in parts":
        monkeypatch.setattr("hga.store.extents._PART_BYTES", 8192)
    return request.param


def chunks(layout, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    records = torch.randn(count, *layout.shape, generator=generator).to(layout.dtype)
    order = torch.stack([torch.randperm(layout.tokens, generator=generator) for _ in range(count * layout.kv_heads)])
    order = order.view(count, layout.kv_heads, layout.tokens).to(torch.int16)
    return records, order if layout.ordered else None


def asked(layout, ids, count, seed):
    """Ascending pairs of chunk and group for each head."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.tensor(ids)[torch.randint(0, len(ids), (layout.kv_heads, count), generator=generator)]
    groups = torch.randint(0, layout.groups, held.shape, generator=generator)
    places = (held * layout.groups + groups).sort(-1).values
    return places // layout.groups, places % layout.groups


def settle(store):
    """Wait until the writer has nothing left."""
    deadline = time.monotonic() + 20
    while store.traffic.queued_bytes:
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def assert_same_bytes(store, reference, ids, seed=0):
    for got, wanted in zip(store.read(ids), reference.read(ids), strict=True):
        assert (got is None and wanted is None) or torch.equal(got, wanted)
    for turn in range(3):
        pairs = asked(store.layout, ids, 40, seed + turn)
        for got, wanted in zip(store.fetch(*pairs), reference.fetch(*pairs), strict=True):
            assert torch.equal(got, wanted)


# ---- the same bytes ------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("cache_bytes", [1, 100_000, 400_000, 1 << 24])
def test_any_cache_gives_what_memory_gives(layout, spill, cache_bytes, delivery):
    store, reference = NvmeStore(layout, cache_bytes, spill=spill), MemoryStore(layout, CPU, "ram")
    ids: list[int] = []
    for turn, count in enumerate((1, 6, 17)):
        given = chunks(layout, count, turn)
        added = store.append(*given)
        assert added == reference.append(*given)
        ids += added
        assert_same_bytes(store, reference, ids, turn)  # some of it still on its way to the file
    settle(store)
    assert_same_bytes(store, reference, ids[::-1][3:7] + ids[:2])
    for holder in (store, reference):
        holder.retain(ids[4:5])
        holder.release(ids[2:9])
        again = holder.append(*chunks(layout, 4, 9))
    assert again == [2, 3, 5, 6]  # 4 has another holder
    ids = sorted(set(ids) - set(ids[7:9]))
    assert_same_bytes(store, reference, ids, 50)
    settle(store)
    assert_same_bytes(store, reference, ids, 60)
    assert sum(store.held_bytes().values()) == sum(reference.held_bytes().values())
    store.release(ids)
    assert sum(store.held_bytes().values()) == 0
    assert store.allocated_bytes()["nvme"] == 0


def test_a_context_that_fits_writes_nothing_with_spill_and_all_of_it_once_it_does_not():
    store = NvmeStore(EVEN, 8 * EVEN.chunk_bytes, spill=True)
    store.append(*chunks(EVEN, 8))
    assert store.held_bytes() == {"ram": 8 * (EVEN.chunk_bytes + EVEN.order_bytes)}
    assert store.traffic.stats().written_bytes == store.traffic.queued_bytes == 0
    store.append(*chunks(EVEN, 1))
    settle(store)
    assert store.traffic.stats().written_bytes == 9 * EVEN.chunk_bytes
    assert store.held_bytes() == {"nvme": 9 * EVEN.chunk_bytes, "ram": 9 * EVEN.order_bytes}


def test_what_is_counted():
    store = NvmeStore(EVEN, 4 * EVEN.chunk_bytes)
    ids = store.append(*chunks(EVEN, 16))
    settle(store)
    none, groups = torch.full((2, 8), ids[0]), torch.arange(8).expand(2, 8)
    store.fetch(none, groups)
    assert (store.traffic.ram_hits, store.traffic.ram_misses) == (16, 0)  # the first chunks are kept in RAM
    store.fetch(none + 12, groups)
    stats = store.traffic.stats()
    assert (stats.ram_hits, stats.ram_misses, stats.ram_hit_rate) == (16, 16, 0.5)
    assert stats.read_operations == 1  # two heads' neighbours, and 8 KiB between them
    assert stats.read_bytes == 24 * EVEN.group_bytes
    assert 0 < stats.read_p50_ms <= stats.read_p99_ms < 1e4
    assert stats.deepest_queue == 1
    assert stats.written_bytes == 16 * EVEN.chunk_bytes
    store.fetch(none + 12, groups)
    assert store.traffic.stats().read_operations == 1


def test_what_is_used_stays_and_what_is_not_goes():
    store = NvmeStore(EVEN, 4 * EVEN.chunk_bytes)
    ids = store.append(*chunks(EVEN, 32))
    settle(store)
    everything = torch.arange(16).expand(2, 16)
    for other in ids[4:]:
        for chunk in (ids[0], other):
            store.fetch(torch.full((2, 16), chunk), everything)
    hits = store.traffic.ram_hits
    store.fetch(torch.full((2, 16), ids[0]), everything)
    assert store.traffic.ram_hits == hits + 32


def test_a_chunk_that_is_not_held_and_records_of_another_layout_are_refused():
    store = NvmeStore(EVEN, 1)
    records, order = chunks(EVEN, 2)
    ids = store.append(records, order)
    store.release(ids[1:])
    with pytest.raises(KeyError, match="not held"):
        store.read(ids)
    with pytest.raises(ValueError, match="do not fit this store's layout"):
        store.append(records.double(), order)
    with pytest.raises(TypeError, match="no address"):
        store.addresses(ids[:1])
    assert not store.gpu_readable


def test_what_is_abandoned_goes_at_the_next_call():
    store = NvmeStore(EVEN, 1)
    ids = store.append(*chunks(EVEN, 3))
    store.abandon(ids[:2])
    assert store.append(*chunks(EVEN, 1)) == ids[:1]
    store.abandon([ids[0], ids[2]])
    assert sum(store.held_bytes().values()) == 0
    assert store.allocated_bytes()["nvme"] == 0


def test_single_groups_in_any_order_are_those_of_memory():
    for layout in (EVEN, WIDE, PAIRS):
        store, reference = NvmeStore(layout, 50_000), MemoryStore(layout, CPU, "ram")
        given = chunks(layout, 23)
        ids = store.append(*given)
        reference.append(*given)
        generator = torch.Generator().manual_seed(3)
        for count in (1, 7, 900):
            asked_ids = torch.tensor(ids)[torch.randint(0, len(ids), (count,), generator=generator)]
            heads = torch.randint(0, layout.kv_heads, (count,), generator=generator)
            groups = torch.randint(0, layout.groups, (count,), generator=generator)
            got, wanted = (torch.empty(count, *layout.shape[2:], dtype=layout.dtype) for _ in range(2))
            store.collect(asked_ids, heads, groups, got)
            reference.collect(asked_ids, heads, groups, wanted)
            assert torch.equal(got, wanted)
            assert torch.equal(wanted, given[0][asked_ids, heads, groups])


def test_groups_of_two_tokens_share_a_page():
    store = NvmeStore(PAIRS, 1 << 20)
    assert PAIRS.group_bytes == 1024
    assert store._piece_bytes == 4096
    ids = store.append(*chunks(PAIRS, 64))
    settle(store)
    groups = torch.tensor([[4, 5, 6, 7]])
    store.fetch(torch.full_like(groups, ids[-1]), groups)
    assert (store.traffic.stats().read_operations, store.traffic.stats().read_bytes) == (1, 4096)


def test_a_batch_larger_than_the_cache_is_read_at_once_and_leaves_what_is_used_often():
    store = NvmeStore(EVEN, 4 * EVEN.chunk_bytes)
    ids = store.append(*chunks(EVEN, 64))
    settle(store)
    everything = torch.arange(16).expand(2, 16)
    often = torch.full((2, 16), ids[40])
    all_ids = torch.tensor(ids).repeat_interleave(16).expand(2, -1)
    for _ in range(3):
        store.fetch(often, everything)
        before = store.traffic.stats().read_operations
        store.fetch(all_ids, everything.repeat(1, 64))
        assert store.traffic.stats().read_operations - before < 24  # 2 MiB by runs of 256 KiB, not by pieces
    hits = store.traffic.ram_hits
    store.fetch(often, everything)
    assert store.traffic.ram_hits == hits + 32


def test_reads_bridge_what_costs_less_than_another_read():
    size, unwanted = 4096, memoryview(bytearray(3 * 4096))
    pieces = np.array([1, 2, 5, 9, 10, 63, 64])  # gaps of 2 and 3 pieces, and a far one; a run of 64 ends
    memory = memoryview(bytearray(len(pieces) * size))
    rows = np.array([2, 3, 4, 6, 5, 0, 1])
    offsets, targets, first = plan_reads(pieces, memory, rows, size, unwanted)
    assert first.tolist() == [0, 5, 6]
    assert offsets == [size, 63 * size, 64 * size]
    assert [len(buffer) // size for buffer in targets[0]] == [2, 2, 1, 3, 1, 1]  # neighbours in both are one buffer
    assert [len(buffer) // size for buffer in targets[1] + targets[2]] == [1, 1]
    for read in targets:
        for buffer in read:
            buffer[:] = b"x" * len(buffer)
    assert bytes(memory) == b"x" * len(memory)
    offsets, targets, first = plan_reads(pieces[:0], memory, rows[:0], size, unwanted)
    assert (offsets, list(targets), first.tolist()) == ([], [], [])


def test_pieces_are_read_in_the_order_in_which_they_are_delivered(delivery):
    missing = np.array([True, False, True, True, True, True])
    place = np.array([5, 1, 2, 0, 2, 5, 3, 4])
    order, ends, cuts = in_turn(missing, place, 4096)
    if delivery == "at once":
        assert (order.tolist(), ends.tolist(), cuts.tolist()) == ([0, 2, 3, 4, 5], [5], [0, 8])
    else:
        assert cuts.tolist() == [0, 4, 8]
        assert (order.tolist(), ends.tolist()) == ([0, 2, 5, 3, 4], [3, 5])


def test_a_part_is_delivered_while_others_are_read(delivery):
    free = threading.Event()
    layout = RecordLayout(kv_heads=1, groups=64, group_size=4, head_dim=128, dtype=torch.bfloat16, ordered=False)

    def preadv(descriptor, buffers, offset):
        if offset >= 4 * 128 * 1024:
            free.wait(1)
        return os.preadv(descriptor, buffers, offset)

    store = NvmeStore(layout, 1, preadv=preadv)
    ids = store.append(*chunks(layout, 8))
    settle(store)
    delivered = []

    def deliver(part, pieces, piece, row):
        delivered.append((part.start, free.is_set()))
        free.set()

    store._bring(torch.tensor([ids]), torch.tensor([[0]]), torch.full((1, 8), 5), deliver)
    if delivery == "in parts":
        assert delivered[0] == (0, False)
        assert delivered[-1][1]
        assert len(delivered) == 4
    else:
        assert delivered == [(0, False)]  # after a wait


# ---- a saved file's chunks -----------------------------------------------------------------------------


class Saved:
    """A file of chunks, 4096 bytes checked together."""

    def __init__(self, folder, count=20):
        self.records, self.order = chunks(EVEN, count, 5)
        raw = self.records.view(torch.uint8).numpy().tobytes()
        self.path = folder / "saved"
        self.path.write_bytes(bytes(4096) + raw)
        self.pieces = [raw[start : start + 4096] for start in range(0, len(raw), 4096)]
        self.count, self.checked = count, 0

    def check(self, first, raw):
        for index in range(len(raw) // 4096):
            self.checked += 1
            if bytes(raw[index * 4096 : (index + 1) * 4096]) != self.pieces[first + index]:
                raise ValueError(f"piece {first + index} is damaged")

    def open(self, cache_bytes, **faults):
        file = OpenFile(os.open(self.path, os.O_RDONLY), str(self.path))
        file.try_direct(lambda page: None)
        store = NvmeStore(EVEN, cache_bytes, **faults)
        ids = store.adopt(SavedChunks(file, 4096, self.count, 4096, self.check), self.order)
        reference = MemoryStore(EVEN, CPU, "ram")
        assert ids == reference.append(self.records, self.order)
        return store, reference, ids


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("cache_bytes", [1, 100_000, 1 << 24])
def test_a_saved_files_chunks_are_read_where_they_are(folder, spill, cache_bytes, delivery):
    saved = Saved(folder)
    store, reference, ids = saved.open(cache_bytes, spill=spill)
    assert saved.checked == store.traffic.stats().written_bytes == 0
    assert store.held_bytes() == {"nvme": 20 * EVEN.chunk_bytes, "ram": 20 * EVEN.order_bytes}
    assert_same_bytes(store, reference, ids)
    given = chunks(EVEN, 6, 9)
    ids += store.append(*given)
    assert ids[20:] == reference.append(*given)
    assert_same_bytes(store, reference, ids, 10)
    settle(store)
    assert store.traffic.stats().written_bytes == 6 * EVEN.chunk_bytes  # the saved ones are not written again
    assert_same_bytes(store, reference, ids, 20)
    assert saved.path.read_bytes()[4096:] == b"".join(saved.pieces)
    for holder in (store, reference):
        holder.release([ids[3], ids[21]])
    assert store.append(*chunks(EVEN, 2, 11)) == [21, 26]  # not in a saved one's place
    kept = [chunk for chunk in ids if chunk not in (3, 21)]
    assert_same_bytes(store, reference, kept, 30)
    store.release([*kept, 21, 26])
    assert sum(store.held_bytes().values()) == store.allocated_bytes()["nvme"] == 0
    assert store.append(*chunks(EVEN, 1)) == [0]


@pytest.mark.parametrize("cache_bytes", [1, 1 << 24])
def test_a_saved_chunk_that_is_damaged_is_found_whenever_it_is_read(folder, cache_bytes, delivery):
    saved = Saved(folder)
    store, reference, ids = saved.open(cache_bytes)
    raw = bytearray(saved.path.read_bytes())
    raw[4096 + 7 * EVEN.chunk_bytes + 5000] ^= 1
    saved.path.write_bytes(raw)
    os.sync()
    whole = torch.arange(16).expand(2, 16)
    for _ in range(2):
        with pytest.raises(ValueError, match="piece 57 is damaged"):
            store.read(ids[6:9])
        with pytest.raises(ValueError, match="piece 57 is damaged"):
            store.fetch(torch.full((2, 16), 7), whole)
    for got, wanted in zip(store.read(ids[8:]), reference.read(ids[8:]), strict=True):
        assert torch.equal(got, wanted)


def test_a_saved_file_that_hangs_meets_a_deadline(folder):
    fault: list = []
    store, reference, ids = Saved(folder).open(1 << 16, preadv=faulty(fault), deadline_seconds=0.3)
    fault.append(1.0)
    with pytest.raises(TimeoutError, match=r"reading from .*saved: nothing came for 0.3 seconds"):
        store.fetch(*asked(EVEN, ids, 4, 1))
    fault.clear()
    assert_same_bytes(store, reference, ids)


def test_only_an_empty_store_adopts(folder):
    saved = Saved(folder)
    store, _, ids = saved.open(1)
    with pytest.raises(ValueError, match="a store that holds 20 chunks cannot adopt"):
        store.adopt(store._files.saved, saved.order)
    store.release(ids)
    assert store.adopt(SavedChunks(open_scratch(), 0, 0, 4096, saved.check), None) == []


# ---- faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spill", [False, True])
def test_a_full_disk_keeps_all_chunks_of_an_append_or_none(small_disk, spill):
    place = small_disk(1 << 20)
    store, reference = NvmeStore(EVEN, 4 * EVEN.chunk_bytes, spill=spill), MemoryStore(EVEN, CPU, "ram")
    ids: list[int] = []
    given = chunks(EVEN, 5)

    def fill():
        while len(ids) < 1000:
            ids.extend(store.append(*given))
            reference.append(*given)

    with pytest.raises(OSError, match=r"no room for .* bytes more in a scratch file in .*HGA_SCRATCH") as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
    del caught  # its frames hold the file
    assert len(ids) in (25, 30)  # 32 fill the disk
    held = store.held_bytes()
    settle(store)
    assert_same_bytes(store, reference, ids)
    assert store.held_bytes() == held
    used = shutil.disk_usage(place).used
    store.release(ids[:5])
    assert store.append(*chunks(EVEN, 5)) == ids[:5]  # places that came free need no room
    assert shutil.disk_usage(place).used == used
    store.release(ids)
    gc.collect()
    deadline = time.monotonic() + 10  # the threads that wrote and read let go of the file when they next look
    while shutil.disk_usage(place).used and time.monotonic() < deadline:
        time.sleep(0.01)
    assert shutil.disk_usage(place).used == 0


def test_a_disk_that_is_full_when_the_archive_spills_leaves_it_in_memory(small_disk):
    place = small_disk(1 << 20)
    store, reference = NvmeStore(EVEN, 40 * EVEN.chunk_bytes, spill=True), MemoryStore(EVEN, CPU, "ram")
    given = chunks(EVEN, 40)
    ids = store.append(*given)
    reference.append(*given)
    with pytest.raises(OSError, match="no room"):
        store.append(*chunks(EVEN, 1))
    assert_same_bytes(store, reference, ids)
    assert store.held_bytes() == reference.held_bytes()
    gc.collect()
    assert shutil.disk_usage(place).used == 0


def test_a_limit_on_file_sizes_is_a_clear_error(folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * EVEN.chunk_bytes, limits[1]))
    try:
        store = NvmeStore(EVEN, 1)
        with pytest.raises(OSError, match="no room"):
            store.append(*chunks(EVEN, 9))
        assert len(store.append(*chunks(EVEN, 8))) == 8
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_that_cannot_be_written_to_is_a_clear_error(monkeypatch, folder):
    monkeypatch.setenv("HGA_SCRATCH", str(folder / "missing"))
    with pytest.raises(OSError, match=r"cannot make a scratch file in .*missing.*HGA_SCRATCH"):
        NvmeStore(EVEN, 1).append(*chunks(EVEN, 1))


def test_a_scratch_folder_in_memory_is_warned_about(monkeypatch):
    if not os.path.isdir("/dev/shm") or not scratch._in_memory("/dev/shm"):
        pytest.skip("needs /dev/shm")
    monkeypatch.setenv("HGA_SCRATCH", "/dev/shm")
    scratch._warn_in_memory.cache_clear()
    with pytest.warns(RuntimeWarning, match="tmpfs: what is written there takes host memory"):
        NvmeStore(EVEN, 1).append(*chunks(EVEN, 1))


def faulty(fault):
    """A preadv that fails while `fault` holds something: an errno, "short", "end" or seconds to sleep."""

    def preadv(descriptor, buffers, offset):
        what = fault[0] if fault else None
        if isinstance(what, int):
            raise OSError(what, os.strerror(what))
        if isinstance(what, float):
            time.sleep(what)
        if what == "short":
            size = len(buffers[0])
            return os.preadv(descriptor, [buffers[0][: 4096 if size > 4096 else size]], offset)
        if what == "end":
            return 0
        return os.preadv(descriptor, buffers, offset)

    return preadv


@pytest.fixture
def broken(delivery):
    """A store whose reads fail as told, and the memory store that holds the same."""
    fault: list = []
    store, reference = (
        NvmeStore(EVEN, 1 << 16, preadv=faulty(fault), deadline_seconds=0.3),
        MemoryStore(EVEN, CPU, "ram"),
    )
    given = chunks(EVEN, 12)
    ids = store.append(*given)
    reference.append(*given)
    settle(store)
    return store, reference, ids, fault


def test_eio_is_a_clear_error_and_the_next_read_is_right(broken):
    store, reference, ids, fault = broken
    fault.append(errno.EIO)
    with pytest.raises(
        OSError, match=r"reading 32768 bytes at offset \d+ of a scratch file in .*: Input/output error"
    ) as e:
        store.read(ids[6:7])
    assert e.value.errno == errno.EIO
    for _ in range(5):
        with pytest.raises(OSError, match="Input/output error"):
            store.fetch(*asked(EVEN, ids[4:], 40, 1))
    fault.clear()
    assert_same_bytes(store, reference, ids)


def test_short_reads_are_continued_and_an_early_end_is_refused(broken):
    store, reference, ids, fault = broken
    fault.append("short")
    assert_same_bytes(store, reference, ids)
    fault[0] = "end"
    with pytest.raises(OSError, match="only 0 came, the file is shorter than it was"):
        store.read(ids[6:])


def test_a_read_that_hangs_meets_a_deadline_and_corrupts_nothing(broken):
    store, reference, ids, fault = broken
    fault.append(1.2)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"nothing came for 0.3 seconds .* the device hangs"):
        store.fetch(*asked(EVEN, ids[4:], 4, 1))
    assert time.monotonic() - started < 1
    fault.clear()
    assert_same_bytes(store, reference, ids)
    time.sleep(1.3)  # the late reads arrive
    assert_same_bytes(store, reference, ids, 7)


def test_an_interrupted_read_corrupts_nothing(broken):
    def interrupt(*_):
        raise KeyboardInterrupt

    store, reference, ids, fault = broken
    before = signal.signal(signal.SIGALRM, interrupt)
    fault.append(0.25)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            store.fetch(*asked(EVEN, ids[4:], 4, 1))
    finally:
        signal.signal(signal.SIGALRM, before)
    fault.clear()
    pairs = asked(EVEN, ids[4:], 4, 2)
    store.fetch(*pairs)
    time.sleep(0.4)  # the late reads arrive
    for got, wanted in zip(store.fetch(*pairs), reference.fetch(*pairs), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("side", ["preadv", "pwritev"])
def test_a_store_that_failed_goes_without_the_garbage_collector(side):
    def fail(descriptor, buffers, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = NvmeStore(EVEN, 1, **{side: fail})
    ids = store.append(*chunks(EVEN, 2))
    settle(store)
    gone, collecting = weakref.ref(store), gc.isenabled()
    gc.disable()
    try:
        with contextlib.suppress(OSError):
            store.read(ids)
            store.append(*chunks(EVEN, 1))
            raise AssertionError("no error")
        del store
        assert gone() is None
    finally:
        if collecting:
            gc.enable()


def test_a_chunk_that_is_replaced_while_its_write_ends_is_the_new_one():
    class Pausing(dict):
        """Lets another thread go on between a look and what follows it, once."""

        def get(self, key, default=None):
            found = super().get(key, default)
            if threading.current_thread().name == "hga-write" and not looked.is_set():
                looked.set()
                replaced.wait(0.5)
            return found

    def pwritev(descriptor, buffers, offset):
        slow.wait(0.5) if slow_from.is_set() else None
        return os.pwritev(descriptor, buffers, offset)

    looked, replaced, slow_from, slow = (threading.Event() for _ in range(4))
    store = NvmeStore(EVEN, 1, pwritev=pwritev)
    store.append(*chunks(EVEN, 1))
    settle(store)
    store._files.writer._blocks = Pausing()
    ids = store.append(*chunks(EVEN, 1, 1))
    assert looked.wait(5)
    slow_from.set()
    store.release(ids)
    records, order = chunks(EVEN, 1, 2)
    assert store.append(records, order) == ids
    replaced.set()
    time.sleep(0.05)
    assert torch.equal(store.read(ids)[0], records)
    slow.set()


@pytest.mark.parametrize("error", [OSError, MemoryError])
def test_a_write_that_fails_behind_the_caller_is_raised_by_the_next_append_and_loses_nothing(error):
    def pwritev(descriptor, buffers, offset):
        raise error(errno.EIO, os.strerror(errno.EIO))

    store, reference = NvmeStore(EVEN, 1, pwritev=pwritev), MemoryStore(EVEN, CPU, "ram")
    given = chunks(EVEN, 6)
    ids = store.append(*given)
    reference.append(*given)
    settle(store)
    for _ in range(2):
        with pytest.raises(OSError, match=r"writing [\d,]+ bytes at offset 0 of a scratch file"):
            store.append(*given)
        assert_same_bytes(store, reference, ids)
    store.release(ids)
    assert len(store.append(*chunks(EVEN, 1))) == 1  # a new file
    settle(store)  # its writer lives


def test_short_writes_are_continued():
    store = NvmeStore(EVEN, 1, pwritev=lambda file, buffers, at: os.pwritev(file, [buffers[0][:4096]], at))
    records, order = chunks(EVEN, 3)
    ids = store.append(records, order)
    settle(store)
    assert torch.equal(store.read(ids)[0], records)


def test_where_direct_reads_are_refused_buffered_ones_serve(monkeypatch):
    def refuse(self, on):
        if on:
            raise OSError(errno.EINVAL, "refused")

    assert open_scratch().direct
    monkeypatch.setattr(OpenFile, "_set_direct", refuse)
    store, reference = NvmeStore(WIDE, 100_000), MemoryStore(WIDE, CPU, "ram")
    given = chunks(WIDE, 9)
    ids = store.append(*given)
    reference.append(*given)
    settle(store)
    assert not store._files.reader.file.direct
    assert_same_bytes(store, reference, ids)


def test_without_nameless_files_the_file_is_unlinked_at_once(folder, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")
    store = NvmeStore(EVEN, 1)
    records, order = chunks(EVEN, 2)
    ids = store.append(records, order)
    assert list(folder.iterdir()) == []
    assert torch.equal(store.read(ids)[0], records)


def test_a_saved_file_is_read_at_any_offset(folder):
    path = folder / "saved"
    raw = bytes(range(256)) * 64
    path.write_bytes(raw)
    traffic = Traffic()
    reader = Reader(OpenFile(os.open(path, os.O_RDONLY), str(path)), traffic)
    reader.file.try_direct(lambda page: None)
    reader.file.direct or pytest.skip("this file system refuses O_DIRECT")
    from hga.store.host import allocate_host

    page = allocate_host(8192).bytes.numpy()
    reader.read([4096], [[memoryview(page)]])
    assert page.tobytes() == raw[4096:12288]
    with pytest.raises(OSError, match="the file is shorter than it was"):
        reader.read([12288], [[memoryview(page)]])


# ---- nothing is left behind ----------------------------------------------------------------------------


def resources():
    gc.collect()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(t.name.startswith("hga-") for t in threading.enumerate()):
        time.sleep(0.01)
    return len(os.listdir("/proc/self/fd")), sum(t.name.startswith("hga-") for t in threading.enumerate())


def test_files_and_threads_go_with_the_store():
    before = resources()
    for _ in range(3):
        store = NvmeStore(EVEN, 1)
        ids = store.append(*chunks(EVEN, 4))
        store.fetch(*asked(EVEN, ids, 4, 0))
        store.release(ids)
        assert resources() == before
        store.append(*chunks(EVEN, 4))
        del store
        assert resources() == before


def test_a_file_that_hangs_does_not_stop_others():
    free = threading.Event()

    def hang(descriptor, buffers, offset):
        free.wait(20)
        return os.preadv(descriptor, buffers, offset)

    store, other = NvmeStore(EVEN, 1, preadv=hang, deadline_seconds=0.5), NvmeStore(EVEN, 1)
    ids = store.append(*chunks(EVEN, 40))
    records, order = chunks(EVEN, 2, 1)
    others = other.append(records, order)
    settle(store)
    settle(other)
    try:
        for _ in range(3):
            with pytest.raises(TimeoutError, match="the device hangs"):
                store.read(ids)
        started = time.monotonic()
        assert torch.equal(other.read(others)[0], records)
        assert time.monotonic() - started < 0.4
    finally:
        free.set()


def test_threads_are_as_many_as_jobs_at_once():
    running, free = threading.Semaphore(0), threading.Event()
    threads = Threads("hga-test", 3)
    for _ in range(5):  # one after another: one thread
        threads.submit(running.release)
        assert running.acquire(timeout=5)
        time.sleep(0.02)
    assert len(threads._threads) == 1
    for _ in range(6):
        threads.submit(lambda: (running.release(), free.wait(5)))
    for _ in range(3):
        assert running.acquire(timeout=5)
    assert not running.acquire(timeout=0.05)
    assert len(threads._threads) == 3
    free.set()
    for _ in range(3):
        assert running.acquire(timeout=5)
    threads.end(5.0)


def test_threads_end_after_what_has_begun_and_drop_the_rest():
    done, begun = [], threading.Event()
    threads = Threads("hga-test", 1)
    threads.submit(lambda: (begun.set(), time.sleep(0.1), done.append(0)))
    threads.submit(lambda: done.append(1))
    assert begun.wait(5)
    threads.end(5.0)
    assert done == [0]
