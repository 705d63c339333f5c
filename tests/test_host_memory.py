"""Host memory: what is left of it, page-locked blocks, the archive's growth in it, and every fault on the way."""

import ctypes
import gc
import mmap
import warnings
from collections import deque
from importlib.util import find_spec
from itertools import chain, repeat

import pytest
import torch
from tiny_model import tiny_model

import hga
from hga.cache import HGACache
from hga.cache.layout import archive_bytes, archived_chunks, record_layout
from hga.config import HGAConfig
from hga.store import MemoryStore, RecordLayout, host
from hga.store.host import GIB, RESERVE_BYTES, allocate_host, available_host_bytes, check_host_room

CPU = torch.device("cpu")
LAYOUT = RecordLayout(kv_heads=2, groups=4, group_size=4, head_dim=8, dtype=torch.float32, ordered=True)
ONE = LAYOUT.chunk_bytes + LAYOUT.order_bytes
SMALL = HGAConfig(
    chunk_size=32,
    group_size=4,
    node_size=4,
    overselection="all",
    coded=False,
    sink_tokens=4,
    window_tokens=12,
    budget_tokens=48,
    prefill="routed",
    block_tokens=64,
)


def chunks(count, seed=0, device=CPU, layout=LAYOUT):
    generator = torch.Generator().manual_seed(seed)
    records = torch.randn(count, *layout.shape, generator=generator).to(layout.dtype)
    order = torch.stack([torch.randperm(layout.tokens, generator=generator) for _ in range(count * layout.kv_heads)])
    return records.to(device), order.view(count, layout.kv_heads, -1).to(device, torch.int16)


@pytest.fixture
def mappings(monkeypatch):
    """Addresses of the mappings that are alive."""
    alive = set()

    class Counted(host._Mapping):
        def __init__(self, *args, **kwargs):
            alive.add(id(self))

        def __del__(self):
            super().__del__()
            alive.discard(id(self))

    monkeypatch.setattr(host, "_Mapping", Counted)
    return alive


@pytest.fixture
def locked(monkeypatch):
    """A driver that locks memory: start -> size of what is locked now."""
    held = {}

    def unlock(starts, gpu):
        for start in starts:
            del held[start]
        return ()

    monkeypatch.setattr(host, "_register", lambda start, size, gpu: held.update({start: size}))
    monkeypatch.setattr(host, "_unregister", unlock)
    return held


# ---- what is left --------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine's files: machine({path: text})."""

    def write(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)

    monkeypatch.setattr(host, "_SYSTEM", tmp_path)
    monkeypatch.setattr(host, "_PHYSICAL_AT_IMPORT", 16 * GIB)
    return write


def meminfo(total, available):
    return {
        "proc/meminfo": f"MemTotal: {total * GIB >> 10} kB\nMemFree: 1 kB\nMemAvailable: {available * GIB >> 10} kB\n"
    }


def test_nothing_is_known_where_no_file_tells(machine):
    assert available_host_bytes() is None
    check_host_room(1 << 60, "anything")


def test_the_machine_bounds_where_no_group_does(machine):
    machine(meminfo(16, 10) | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"})
    assert available_host_bytes() == 10 * GIB


def test_a_parent_groups_limit_counts_and_its_inactive_cache_is_free(machine):
    parent, own = "sys/fs/cgroup/a", "sys/fs/cgroup/a/b"
    machine(
        meminfo(16, 10)
        | {
            "proc/self/cgroup": "0::/a/b\n",
            f"{own}/memory.max": "max\n",
            f"{own}/memory.current": f"{GIB}\n",
            f"{parent}/memory.max": f"{6 * GIB}\n",
            f"{parent}/memory.current": f"{4 * GIB}\n",
            f"{parent}/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file {2 * GIB}\n",
        }
    )
    assert available_host_bytes() == 3 * GIB


@pytest.mark.parametrize("folder", ["", "docker/x/"])
def test_version_1_groups_inside_a_container_or_not(machine, folder):
    here = f"sys/fs/cgroup/memory/{folder}"
    machine(
        meminfo(16, 10)
        | {
            "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/x\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
        }
        | {
            f"{here}memory.limit_in_bytes": f"{4 * GIB}\n",
            f"{here}memory.usage_in_bytes": f"{3 * GIB}\n",
            f"{here}memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
        }
    )
    assert available_host_bytes() == 2 * GIB


def test_memory_that_the_kernel_has_not_brought_up_counts(machine, monkeypatch):
    machine(meminfo(16, 10) | {"proc/zoneinfo": "".join(zone(present) for present in (1, 47, 16))})
    assert host._physical_bytes() == 64 * GIB
    monkeypatch.setattr(host, "_PHYSICAL_AT_IMPORT", host._physical_bytes())
    assert available_host_bytes() == (10 + 48) * GIB
    machine(meminfo(50, 10))  # it has brought up more
    assert available_host_bytes() == (10 + 14) * GIB
    machine(meminfo(63, 10))  # the rest is what a kernel keeps for itself
    assert available_host_bytes() == 10 * GIB


def zone(present):
    return (
        f"Node 0, zone Normal\n  pages free 1\n        present  {present * GIB // mmap.PAGESIZE}\n        managed 1\n"
    )


def test_a_machine_that_grows_is_bounded_by_its_group_alone(machine):
    machine(meminfo(20, 10))  # 16 at import
    assert available_host_bytes() is None
    machine(meminfo(16, 10) | {"sys/bus/virtio/drivers/virtio_mem/virtio3/x": ""})
    assert available_host_bytes() is None
    machine(
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{9 * GIB}",
            "sys/fs/cgroup/memory.current": f"{2 * GIB}",
        }
    )
    assert available_host_bytes() == 7 * GIB


def test_the_error_names_wanted_available_reserve_and_remedy(monkeypatch):
    monkeypatch.setattr(host, "available_host_bytes", lambda: 4 * GIB)
    check_host_room(3 * GIB, "it")
    with pytest.raises(MemoryError, match=r"it needs 3,221,225,473 bytes .*4,294,967,296 .*1,073,741,824 .*shorter"):
        check_host_room(3 * GIB + 1, "it")


# ---- blocks --------------------------------------------------------------------------------------------


def test_a_block_is_exact_locked_in_pieces_and_unlocked_with_its_last_view(locked, mappings, monkeypatch):
    monkeypatch.setattr(host, "_PIECE_BYTES", 1 << 16)
    block = allocate_host((5 << 15) + 8, torch.device("cuda"))
    assert block.pinned
    assert len(block.bytes) == (5 << 15) + 8
    start = block.bytes.data_ptr()
    assert locked == {start: 1 << 16, start + (1 << 16): 1 << 16, start + (2 << 16): (1 << 15) + 8}
    view = block.bytes[8:].view(torch.float32).view(-1, 2)
    del block
    assert locked
    view.fill_(1)
    del view
    assert not locked
    assert not mappings


def test_refused_locking_warns_once_and_leaves_nothing_locked(locked, monkeypatch):
    lock = host._register
    monkeypatch.setattr(host, "_PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(host, "_register", lambda *piece: "no more" if len(locked) == 2 else lock(*piece))
    host._warn_unpinned.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"refused to page-lock host memory \(no more\).*slower.*ulimit -l"):
        block = allocate_host(1 << 18, torch.device("cuda"))
    assert not block.pinned
    assert not locked
    block.bytes.fill_(3)
    with warnings.catch_warnings(action="error"):
        assert not allocate_host(1 << 18, torch.device("cuda")).pinned


def test_what_a_driver_does_not_unlock_stays_mapped_until_it_does(locked, monkeypatch):
    monkeypatch.setattr(host, "_LOCKED_STILL", deque())
    block = allocate_host(1 << 16, torch.device("cuda"))
    with monkeypatch.context() as patch:
        patch.setattr(host, "_unregister", lambda starts, gpu: starts)  # as within a capture
        del block
        check_host_room(0, "nothing")
        assert len(locked) == len(host._LOCKED_STILL) == 1
    check_host_room(0, "nothing")
    assert not locked
    assert not host._LOCKED_STILL


def test_bytes_that_the_system_refuses_are_named():
    with pytest.raises(MemoryError, match=r"refused 4,611,686,018,427,387,904 bytes"):
        allocate_host(1 << 62)


# ---- the store -----------------------------------------------------------------------------------------


def test_addresses_point_at_the_records_and_stay_while_the_archive_grows():
    store = MemoryStore(LAYOUT, CPU, "ram")
    records, order = chunks(40)
    ids = store.append(records[:3], order[:3])
    early = store.addresses(ids)
    ids += [
        chunk
        for start in range(3, 40, 5)
        for chunk in store.append(records[start : start + 5], order[start : start + 5])
    ]
    assert early.tolist() == store.addresses(ids[:3]).tolist()
    for address, record in zip(store.addresses(ids).tolist(), records, strict=True):
        assert ctypes.string_at(address, LAYOUT.chunk_bytes) == record.numpy().tobytes()
    store.release(ids[:1])
    with pytest.raises(KeyError, match="not held"):
        store.addresses(ids[:1])


def test_places_are_reused_lowest_first_and_read_in_any_order():
    store = MemoryStore(LAYOUT, CPU, "ram")
    records, order = chunks(12)
    ids = store.append(records, order)
    store.release([ids[7], ids[2], ids[3]])
    assert store.append(records[:2], order[:2]) == [ids[2], ids[3]]
    back, back_order = store.read([ids[11], ids[2], ids[3], ids[4], ids[0]])
    wanted = [11, 0, 1, 4, 0]
    assert torch.equal(back, records[wanted])
    assert torch.equal(back_order, order[wanted].long())
    assert store.append(records[:0], order[:0]) == []


def test_growth_keeps_slack_low_and_segments_few():
    store = MemoryStore(LAYOUT, CPU, "ram")
    records, order = chunks(64)
    for _ in range(32):
        store.append(records, order)
        held, allocated = store.held_bytes()["ram"], store.allocated_bytes()["ram"]
        assert held <= allocated <= max(1.25 * held, held + 15 * ONE)
    assert len(store._segments) <= 24


def test_everything_goes_back_with_the_last_chunk(mappings):
    store = MemoryStore(LAYOUT, CPU, "ram")
    ids = [chunk for seed in range(9) for chunk in store.append(*chunks(7, seed))]
    assert len(mappings) > 1
    store.release(ids[1:])
    assert store.allocated_bytes()["ram"] >= 63 * ONE
    store.release(ids[:1])
    assert not mappings
    assert store.held_bytes() == store.allocated_bytes() == {"ram": 0}
    assert len(store.append(*chunks(2))) == 2


def test_a_host_that_fills_up_amid_appends_leaves_the_store_whole(monkeypatch):
    store = MemoryStore(LAYOUT, CPU, "ram")
    records, order = chunks(80)
    ids = store.append(records[:10], order[:10])
    monkeypatch.setattr(host, "available_host_bytes", lambda: RESERVE_BYTES + 10 * ONE)
    ids += store.append(records[10:20], order[10:20])  # 6 places were free; no room for 16 more, but for 4
    assert store.allocated_bytes() == {"ram": 20 * ONE}
    held = store.held_bytes()
    with pytest.raises(MemoryError, match=rf"has {20 * ONE:,} bytes, needs {11 * ONE:,} bytes"):
        store.append(records[20:31], order[20:31])
    assert store.held_bytes() == held
    back, back_order = store.read(ids)
    assert torch.equal(back, records[:20])
    assert torch.equal(back_order, order[:20].long())
    store.release(ids[:11])
    again = store.append(records[20:31], order[20:31])
    assert torch.equal(store.read(ids[11:] + again)[0], records[11:31])
    monkeypatch.undo()
    assert torch.equal(store.read(store.append(records[31:], order[31:]))[0], records[31:])


def test_an_allocation_that_fails_leaves_the_store_whole(monkeypatch):
    store = MemoryStore(LAYOUT, CPU, "ram")
    records, order = chunks(40)
    ids = store.append(records[:16], order[:16])

    def refuse(*args):
        raise MemoryError("refused")

    with monkeypatch.context() as patch:
        patch.setattr("hga.store.memory.allocate_host", refuse)
        with pytest.raises(MemoryError, match="refused"):
            store.append(records[16:], order[16:])
    assert store.allocated_bytes() == {"ram": 16 * ONE}
    ids += store.append(records[16:], order[16:])
    assert torch.equal(store.read(ids)[0], records)


def test_order_of_a_wrong_shape_is_refused_and_takes_no_place():
    store = MemoryStore(LAYOUT, CPU, "ram")
    records, order = chunks(3)
    with pytest.raises(ValueError, match=r"order of shape \(2, 2, 16\)"):
        store.append(records, order[:2])
    assert store.held_bytes() == {"ram": 0}


# ---- the cache -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return hga.enable(tiny_model(), SMALL)


def prompt(tokens, rows=1, seed=0):
    return torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("ordering", ["content", "position"])
def test_predicted_bytes_are_what_is_stored(ordering):
    config = SMALL.replace(ordering=ordering)
    model = hga.enable(tiny_model(), config)
    for tokens in (30, 64, 300, 777):
        cache = HGACache(model.config, config)
        model(prompt(tokens), past_key_values=cache)
        layout = record_layout(config, 2, 8, torch.float32)
        assert cache.stats().store_bytes == archive_bytes(config, layout, 2, tokens)


@torch.no_grad()
def test_a_prompt_that_the_host_cannot_hold_is_refused_before_it_is_read(model, monkeypatch):
    expected = model.generate(prompt(700), max_new_tokens=3, do_sample=False)
    layout = record_layout(SMALL, 2, 8, torch.float32)
    wanted = 3 * archive_bytes(SMALL, layout, 2, 700)
    cache = HGACache(model.config, SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(host, "available_host_bytes", lambda: RESERVE_BYTES + wanted - 1)
        with pytest.raises(MemoryError, match=rf"700 tokens, prompt and answer, needs {wanted:,} bytes"):
            model(prompt(700, rows=3), past_key_values=cache)
        assert cache.get_seq_length() == 0
        assert cache.stats().store_bytes == 0
        model(prompt(700, rows=2), past_key_values=cache)  # a third of it fits
    cache.reset()
    model(prompt(700, rows=3), past_key_values=cache)
    assert torch.equal(model.generate(prompt(700), max_new_tokens=3, do_sample=False), expected)


@torch.no_grad()
def test_a_second_prompt_is_checked_for_what_it_adds(model, monkeypatch):
    cache = HGACache(model.config, SMALL)
    model(prompt(700), past_key_values=cache)
    wanted = sum(layer.growth_bytes(500, 1, torch.float32) for layer in cache.routed)
    one = record_layout(SMALL, 2, 8, torch.float32)
    added = 2 * (archived_chunks(SMALL, 1200) - archived_chunks(SMALL, 700))
    allocated = sum(layer._stores[0].allocated_bytes()["ram"] for layer in cache.routed)
    unused = allocated - cache.stats().store_bytes
    assert wanted == added * (one.chunk_bytes + one.order_bytes) - unused
    monkeypatch.setattr(host, "available_host_bytes", lambda: RESERVE_BYTES + wanted - 1)
    with pytest.raises(MemoryError, match="tokens, prompt and answer"):
        model(prompt(500), past_key_values=cache)
    assert cache.get_seq_length() == 700


@torch.no_grad()
def test_a_host_that_fills_up_amid_a_prefill_leaves_model_and_process_usable(model, mappings, monkeypatch):
    expected = model.generate(prompt(1500), max_new_tokens=3, do_sample=False)
    cache = HGACache(model.config, SMALL)
    left = chain([1 << 40] * 5, repeat(RESERVE_BYTES))  # the prompt passes, later segments do not
    with monkeypatch.context() as patch:
        patch.setattr(host, "available_host_bytes", lambda: next(left))
        with pytest.raises(MemoryError, match="a layer's archive, which has"):
            model(prompt(1500), past_key_values=cache)
    assert 0 < cache.get_seq_length() < 1500
    with pytest.raises(RuntimeError, match=r"interrupted.*cache\.reset\(\)"):
        model(prompt(10), past_key_values=cache)  # layers disagree: never continue silently
    assert torch.equal(model.generate(prompt(1500), max_new_tokens=3, do_sample=False), expected)
    cache.reset()
    assert not mappings
    model(prompt(1500), past_key_values=cache)
    assert cache.get_seq_length() == 1500


@torch.no_grad()
def test_a_dropped_cache_gives_its_memory_back_without_the_garbage_collector(model, mappings):
    gc.collect()
    gc.disable()
    try:
        cache = HGACache(model.config, SMALL)
        model(prompt(700), past_key_values=cache)
        assert mappings
        del cache
        assert not mappings
        model.generate(prompt(700), max_new_tokens=2, do_sample=False)
        assert not mappings
    finally:
        gc.enable()


# ---- with a GPU ----------------------------------------------------------------------------------------

WIDE = RecordLayout(kv_heads=4, groups=64, group_size=4, head_dim=128, dtype=torch.bfloat16, ordered=True)


if find_spec("triton"):
    import triton
    from triton import language as tl

    @triton.jit
    def copy_by_address(addresses, out, numbers, BLOCK: tl.constexpr):
        record, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        source = tl.load(addresses + record).to(tl.pointer_type(tl.int16))
        place = part * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + record * numbers + place, tl.load(source + place))


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["ram", "device"])
def test_kernels_read_records_by_address(gpu, tier):
    pytest.importorskip("triton")
    store = MemoryStore(WIDE, CPU if tier == "ram" else gpu, tier)
    records, order = chunks(60, layout=WIDE)
    ids = [
        chunk
        for start in range(0, 60, 20)
        for chunk in store.append(records[start : start + 20].to(gpu), order[start : start + 20].to(gpu))
    ]
    assert store.gpu_readable
    out = torch.empty(60, *WIDE.shape, dtype=WIDE.dtype, device=gpu)
    numbers = records[0].numel()
    copy_by_address[60, numbers // 1024](store.addresses(ids).to(gpu), out.view(torch.int16), numbers, BLOCK=1024)
    assert torch.equal(out.cpu().view(torch.int16), records.view(torch.int16))


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


def busy(gpu):
    """Keep the current stream busy for some 50 ms, so that what is not ordered after it comes too early."""
    torch.cuda._sleep(100_000_000)


@pytest.mark.gpu
def test_copies_aside_are_bit_for_bit_over_growth_and_reuse(gpu):
    store = MemoryStore(WIDE, CPU, "ram")
    records, order = chunks(150, layout=WIDE)
    held = {}
    for step, start in enumerate(range(0, 150, 10)):
        here = slice(start, start + 10)
        target = torch.empty(10, *WIDE.shape, dtype=WIDE.dtype, device=gpu)
        busy(gpu)
        target.copy_(records[here])  # behind the delay: a copy aside that did not wait would take rubbish
        ids = store.append(target, order[here].to(gpu))
        target = None  # its memory is free for others at once
        torch.full((10, *WIDE.shape), float("nan"), dtype=WIDE.dtype, device=gpu)
        held.update(zip(ids, range(start, start + 10), strict=True))
        if step % 3 == 2:
            gone = ids[1::2]
            store.release(gone)
            for chunk in gone:
                del held[chunk]
    assert store.gpu_readable
    assert all(segment.is_pinned() for segment in store._segments)
    assert len(store._segments) > 4
    ids, source = list(held), list(held.values())
    for device in (CPU, gpu):
        back, back_order = store.read(ids, device)
        assert back.device == device
        assert torch.equal(back.cpu().view(torch.int16), records[source].view(torch.int16))
        assert torch.equal(back_order.cpu(), order[source].long())
    places = torch.tensor(sorted(ids)).expand(WIDE.kv_heads, -1)
    keys, _ = store.fetch(places, torch.full_like(places, 5))
    wanted = torch.stack([records[held[chunk], :, 5, 0] for chunk in sorted(ids)], 1)
    assert torch.equal(keys.view(torch.int16), wanted.view(torch.int16))
    for address, index in zip(store.addresses(ids).tolist(), source, strict=True):
        raw = records[index].view(torch.int16).numpy().tobytes()
        assert ctypes.string_at(address, WIDE.chunk_bytes) == raw


@pytest.mark.gpu
def test_a_readers_work_is_done_before_its_places_are_taken_or_given_back(gpu, mappings):
    store = MemoryStore(WIDE, CPU, "ram")
    records, order = chunks(32, layout=WIDE)
    ids = store.append(records[:16].to(gpu), order[:16].to(gpu))
    busy(gpu)
    before, _ = store.read(ids, gpu)
    store.release(ids[1:])
    again = store.append(records[16:31].to(gpu), order[16:31].to(gpu))
    assert again == ids[1:]
    busy(gpu)
    after, _ = store.read(again, gpu)
    store.release(ids)
    assert not mappings
    assert store.allocated_bytes() == {"ram": 0}
    assert torch.equal(before.cpu().view(torch.int16), records[:16].view(torch.int16))
    assert torch.equal(after.cpu().view(torch.int16), records[16:31].view(torch.int16))


@pytest.mark.gpu
def test_a_real_refusal_leaves_cuda_usable_and_the_contents_right(gpu, monkeypatch):
    block = allocate_host(1 << 20, gpu)
    assert block.pinned
    assert host._register(block.bytes.data_ptr(), 1 << 20, gpu) is not None  # already locked: refused
    assert torch.ones(4, device=gpu).sum().item() == 4  # the error was taken back
    monkeypatch.setattr(host, "_register", lambda *piece: "refused")
    host._warn_unpinned.cache_clear()
    store = MemoryStore(WIDE, CPU, "ram")
    records, order = chunks(20, layout=WIDE)
    with pytest.warns(RuntimeWarning, match="refused"):
        ids = store.append(records.to(gpu), order.to(gpu))
    assert not store.gpu_readable
    for device in (CPU, gpu):
        back, back_order = store.read(ids, device)
        assert torch.equal(back.cpu().view(torch.int16), records.view(torch.int16))
        assert torch.equal(back_order.cpu(), order.long())


@pytest.mark.gpu
@torch.no_grad()
def test_a_model_on_the_gpu_survives_a_host_that_fills_up(gpu, mappings, monkeypatch):
    model = hga.enable(tiny_model().to(gpu), SMALL)
    ids = prompt(1500).to(gpu)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)
    left = chain([1 << 40] * 5, repeat(RESERVE_BYTES))  # the prompt passes, later segments do not
    with monkeypatch.context() as patch:
        patch.setattr(host, "available_host_bytes", lambda: next(left))
        with pytest.raises(MemoryError, match="a layer's archive, which has"):
            model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), expected)
    gc.collect()
    assert not mappings
