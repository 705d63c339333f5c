"""The memory store: layout, sharing, growth and accounting."""

import pytest
import torch

from hga.ops.closing import pack_records
from hga.store import MemoryStore, RecordLayout

LAYOUT = RecordLayout(kv_heads=3, groups=4, group_size=2, head_dim=5, dtype=torch.float32, ordered=True)


def _chunks(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, count, 3, 8, 5, generator=generator)
    order = torch.stack([torch.randperm(8, generator=generator) for _ in range(3 * count)]).view(count, 3, 8)
    return keys, values, order.to(torch.int16)


def _store() -> MemoryStore:
    return MemoryStore(LAYOUT, torch.device("cpu"), "ram")


def test_a_group_is_one_contiguous_run_of_keys_then_values():
    keys, values, _ = _chunks(1)
    packed = pack_records(keys, values, LAYOUT.group_size)
    assert packed.shape == (1, *LAYOUT.shape)
    assert packed[0, 1, 2].is_contiguous()
    assert torch.equal(packed[0, 1, 2, 0], keys[0, 1, 4:6])
    assert torch.equal(packed[0, 1, 2, 1], values[0, 1, 4:6])
    for given, back in zip((keys, values), LAYOUT.unpack(packed), strict=True):
        assert torch.equal(given, back)


def test_bytes_are_exact_and_one_byte_types_count_their_scales():
    assert LAYOUT.group_bytes == 2 * 2 * 5 * 4
    assert LAYOUT.chunk_bytes == 3 * 4 * LAYOUT.group_bytes
    assert LAYOUT.order_bytes == 2 * 3 * 8
    int8 = RecordLayout(kv_heads=3, groups=4, group_size=2, head_dim=5, dtype=torch.int8, ordered=False)
    assert int8.group_bytes == 2 * 2 * (5 + 2)
    assert int8.order_bytes == 0


@pytest.mark.parametrize("count", [1, 16, 17, 100])
def test_read_and_fetch_over_growing_segments(count):
    store = _store()
    keys, values, order = _chunks(count)
    packed = pack_records(keys, values, LAYOUT.group_size)
    ids = [
        chunk
        for start in range(0, count, 7)
        for chunk in store.append(packed[start : start + 7], order[start : start + 7])
    ]
    assert len(set(ids)) == count
    records, orders = store.read(ids)
    assert torch.equal(records, packed)
    assert torch.equal(orders, order.long())
    generator = torch.Generator().manual_seed(1)
    chosen, groups = (
        torch.randint(0, count, (3, 50), generator=generator),
        torch.randint(0, 4, (3, 50), generator=generator),
    )
    held = torch.tensor(ids)
    places = (held[chosen] * 4 + groups).sort(-1).values  # ascending for each head, with repetitions
    fetched = torch.stack(store.fetch(places // 4, places % 4), 2)
    of_id = {chunk: index for index, chunk in enumerate(ids)}
    for head in range(3):
        wanted = [packed[of_id[int(place) // 4], head, int(place) % 4] for place in places[head]]
        assert torch.equal(fetched[head], torch.stack(wanted))
    assert store.held_bytes() == {"ram": count * (LAYOUT.chunk_bytes + LAYOUT.order_bytes)}


def test_sharing_counts_a_chunk_once_and_frees_it_with_its_last_holder():
    store = _store()
    keys, values, order = _chunks(3)
    ids = store.append(pack_records(keys, values, LAYOUT.group_size), order)
    one = LAYOUT.chunk_bytes + LAYOUT.order_bytes
    store.retain(ids[:2])
    assert store.held_bytes() == {"ram": 3 * one}
    store.release(ids)
    assert store.held_bytes() == {"ram": 2 * one}
    with pytest.raises(KeyError, match="not held"):
        store.read([ids[2]])
    again = store.append(pack_records(keys[:1], values[:1], LAYOUT.group_size), order[:1])
    assert again == [ids[2]]  # its place is reused
    store.release(ids[:2] + again)
    assert store.held_bytes() == {"ram": 0}


def test_records_of_another_layout_are_refused():
    store = _store()
    keys, values, order = _chunks(1)
    packed = pack_records(keys, values, LAYOUT.group_size)
    with pytest.raises(ValueError, match="do not fit this store's layout"):
        store.append(packed.double(), order)
    with pytest.raises(ValueError, match="do not fit this store's layout"):
        store.append(packed[..., :4], order)
    with pytest.raises(ValueError, match="ordered=True"):
        store.append(packed, None)
    assert store.held_bytes() == {"ram": 0}
