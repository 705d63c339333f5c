"""The decode step in kernels against its reference, and the reference against the cache's routed path."""

from __future__ import annotations

import pytest
import rows
import torch
from torch import Tensor

from hga import HGAConfig
from hga.cache.routed import Scoring
from hga.cache.row import Counters, Row
from hga.ops.coding import Codes
from hga.ops.decode import PENDING_BLOCK, DecodeLayer, Scratch, SlotCache, _read_archive, attend_decode
from hga.ops.nibbles import Nibbles
from hga.ops.precision import Rows
from hga.ops.tiles import pending_capacity, pending_groups
from hga.store import MemoryStore

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE = rows.SMALL.replace(summary_dtype="auto", budget_tokens=64)
CONFIGS = {
    "balanced": BASE,
    "per_head": BASE.replace(selection="per_head"),
    "no far field": BASE.replace(far_field=False),
    "two levels": BASE.replace(node_size=8, overselection=2),
    "coded": BASE.replace(node_size=16, overselection=2, group_size=2, coded=True),
    "coded per head, fp8": BASE.replace(
        node_size=8, overselection=2, coded=True, selection="per_head", summary_dtype="fp8"
    ),
    "two levels per head": BASE.replace(node_size=16, overselection=1, selection="per_head"),
    "fp8": BASE.replace(summary_dtype="fp8"),
    "by position": BASE.replace(ordering="position", group_size=16, window_tokens=20, node_size=16),
    "nothing routed": BASE.replace(budget_tokens=16),
    "long": BASE.replace(budget_tokens=700),
    "everything routed": BASE.replace(budget_tokens=4096),
}


def filled_row(config: HGAConfig, length: int, heads: int, width: int, dtype: torch.dtype) -> Row:
    """A row that holds `length` random tokens."""
    row = Row(config, lambda layout: MemoryStore(layout, torch.device("cpu"), "ram"), Counters(), None)
    keys, values = (torch.randn(heads, length, width, dtype=torch.float32) for _ in range(2))
    device = "cpu" if dtype == torch.float64 else DEVICE
    row.append(keys.to(device, dtype), values.to(device, dtype))
    row.attend(torch.randn(heads, 1, 1, width).to(device, dtype), Scoring(width**-0.5))
    return row


def decode_layer(config: HGAConfig, rows: list[Row], repeats: int) -> tuple[DecodeLayer, Tensor]:
    """The rows' buffers as one layer, poisoned where nothing is in use, and counts for the next token."""
    summaries = [row._archive.summaries for row in rows]
    heads, width, dtype = rows[0]._keys.shape[0], rows[0]._keys.shape[2], rows[0]._keys.dtype
    chunks = max(row.chunks for row in rows) + 3

    def stack(name: str, unit: int) -> Rows | None:
        grown = [getattr(summary, name) for summary in summaries]
        if grown[0]._data is None:
            return None
        count = chunks * config.chunk_size // unit
        data = grown[0]._data.new_empty(len(rows), heads, count, grown[0]._data.shape[2])
        data.view(torch.uint8).fill_(0xFF)  # NaN in every type
        scale = None
        if grown[0]._scale is not None:
            scale = grown[0]._scale.new_empty(len(rows), heads, count, 1)
            scale.view(torch.uint8).fill_(0xFF)
        for index, one in enumerate(grown):
            data[index, :, : one.length] = one._data[:, : one.length]
            if scale is not None:
                scale[index, :, : one.length] = one._scale[:, : one.length]
        return Rows(data.to(DEVICE), None if scale is None else scale.to(DEVICE))

    near = [torch.full((len(rows), heads, 256, width), float("nan"), dtype=dtype) for _ in range(2)]
    addresses = torch.zeros(len(rows), chunks, dtype=torch.int64)
    for index, row in enumerate(rows):
        for buffer, held in zip(near, row._near(), strict=True):
            buffer[index, :, : row.near_length] = held
        addresses[index, : row.chunks] = row._archive.addresses()
    near = [x.to(DEVICE) for x in near]
    group_keys, channels = stack("group_keys", config.group_size), stack("group_channels", config.chunk_size)
    if channels is not None:
        group_keys = Codes(*group_keys, channels.data)
    node_values = stack("node_values", config.node_size)
    if config.coded and node_values is not None:
        node_values = Nibbles(*node_values)
    counts = torch.tensor([[row.near_length + 1, row.chunks, 1, 0] for row in rows], dtype=torch.int32)
    scratch = Scratch.allocate(config, len(rows), heads, repeats, width, chunks, torch.device(DEVICE))
    for owner in filter(None, (scratch, scratch.nodes, scratch.groups)):
        for buffer in vars(owner).values():
            if isinstance(buffer, Tensor) and buffer.is_floating_point():
                buffer.view(torch.int32).fill_(0x7FA00000)  # a signalling NaN: numpy warns of any arithmetic with it
    layer = DecodeLayer(
        near_keys=near[0],
        near_values=near[1],
        node_keys=stack("node_keys", config.node_size),
        node_values=node_values,
        group_keys=group_keys,
        addresses=addresses.to(DEVICE),
        slots=SlotCache.allocate(config, len(rows) * heads, repeats, chunks, near[0]),
        scratch=scratch,
        faults=torch.zeros(1, dtype=torch.int32, pin_memory=DEVICE == "cuda"),
    )
    return layer, counts.to(DEVICE)


def random_step(batch: int, heads: int, repeats: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(batch, heads * repeats, 1, width, device=DEVICE) * 2
    keys, values = (torch.randn(batch, heads, 1, width, device=DEVICE) for _ in range(2))
    return query.to(dtype), keys.to(dtype), values.to(dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is the CPU's")
@pytest.mark.parametrize("name", [name for name in CONFIGS if "fp8" not in name])
def test_reference_equals_routed_path(name: str) -> None:
    config, heads, repeats, width = CONFIGS[name], 2, 3, 16
    row = filled_row(config.replace(summary_dtype="model"), 301, heads, width, torch.float64)
    layer, counts = decode_layer(config, [row], repeats)
    query, keys, values = random_step(1, heads, repeats, width, torch.float64)
    out = attend_decode(query, keys, values, layer, counts, config, 0.3)
    row.append(keys[0], values[0])
    expected = row.attend(query[0].unflatten(0, (heads, repeats)), Scoring(0.3))
    torch.testing.assert_close(out[0, :, 0], expected.flatten(0, 1)[:, 0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_equal_reference(name: str) -> None:
    pytest.importorskip("triton")
    from hga.ops.kernels import decode as kernels

    config, heads, repeats, width, dtype = CONFIGS[name], 2, 3, 24, torch.float32
    lengths = (3900, 157) if name == "long" else (301, 157)
    rows = [filled_row(config, length, heads, width, dtype) for length in lengths]
    layer, counts = decode_layer(config, rows, repeats)
    for _ in range(2):
        query, keys, values = random_step(2, heads, repeats, width, dtype)
        out = kernels.attend_decode(query, keys, values, layer, counts, config, 0.3)
        expected = attend_decode(query, keys, values, layer, counts, config, 0.3)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        counts[:, 0] += 1
        counts[:, 2] += 1


@pytest.mark.parametrize("name", ["coded", "two levels per head", "long"])
def test_blocks_do_not_change_the_choice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that looks at several blocks of columns, as in long contexts, numbers what it chooses across them."""
    pytest.importorskip("triton")
    from hga.ops.kernels import decode as kernels
    from hga.ops.kernels import decode_choice

    monkeypatch.setattr(decode_choice, "SELECTION_BLOCK", 16)
    config, heads, repeats, width = CONFIGS[name], 2, 3, 24
    rows = [filled_row(config, length, heads, width, torch.float32) for length in (1203, 157)]
    layer, counts = decode_layer(config, rows, repeats)
    query, keys, values = random_step(2, heads, repeats, width, torch.float32)
    out = kernels.attend_decode(query, keys, values, layer, counts, config, 0.3)
    expected = attend_decode(query, keys, values, layer, counts, config, 0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    for choice in filter(None, (layer.scratch.nodes, layer.scratch.groups)):
        for chosen, count in zip(choice.chosen.tolist(), choice.counts.tolist(), strict=True):
            assert sorted(set(chosen[:count])) == chosen[:count], "ascending"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about NaN
@pytest.mark.parametrize("name", ["balanced", "two levels"])
def test_nan_query_stays_inside_its_buffers(name: str) -> None:
    pytest.importorskip("triton")
    from hga.ops.kernels import decode as kernels

    config = CONFIGS[name]
    row = filled_row(config, 301, 2, 16, torch.float32)  # keeps its records alive
    layer, counts = decode_layer(config, [row], 2)
    query, keys, values = random_step(1, 2, 2, 16, torch.float32)
    query[0, 1] = float("nan")
    out = kernels.attend_decode(query, keys, values, layer, counts, config, 0.3)
    assert out[0, 1].isnan().all(), "garbage in, NaN out"
    assert (layer.scratch.groups.counts <= layer.scratch.groups.keep).all()
    query, keys, values = random_step(1, 2, 2, 16, torch.float32)
    counts[:, 2] += 1
    out = kernels.attend_decode(query, keys, values, layer, counts, config, 0.3)
    torch.testing.assert_close(out, attend_decode(query, keys, values, layer, counts, config, 0.3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [16, 512])
@pytest.mark.parametrize("length", [301, 3900])
def test_equal_masses_choose_the_lower_columns(length: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one block of columns, several of one program, and several programs: pending groups, then the oldest."""
    pytest.importorskip("triton")
    from hga.ops.kernels import decode as kernels
    from hga.ops.kernels import decode_choice

    monkeypatch.setattr(decode_choice, "SELECTION_BLOCK", block)
    config, heads, repeats, width = CONFIGS["coded"], 2, 2, 16
    row = filled_row(config, length, heads, width, torch.float32)
    layer, counts = decode_layer(config, [row], repeats)
    query, keys, values = random_step(1, heads, repeats, width, torch.float32)
    kernels.attend_decode(0 * query, keys, values, layer, counts, config, 0.3)
    nodes, groups = layer.scratch.nodes, layer.scratch.groups
    assert nodes is not None
    pending, first = pending_groups(config, row.near_length), pending_capacity(config, PENDING_BLOCK)
    columns = [*range(pending), *range(first, groups.scores.shape[1])]
    for selector in range(heads):
        assert nodes.chosen[selector].tolist() == list(range(nodes.keep))
        assert groups.chosen[selector].tolist() == columns[: groups.keep]
        assert groups.limits[selector, 1] == columns[groups.keep - 1]
    assert (groups.counts == groups.keep).all()


def stored_groups(layer: DecodeLayer, counts: Tensor, config: HGAConfig) -> Tensor:
    """What the store holds (B Hkv, groups, 2, g, D), NaN where there is no chunk."""
    held, heads = layer.slots.records, layer.near_keys.shape[1]
    groups = held.new_full((held.shape[0], layer.slots.slot_of.shape[1], *held.shape[2:]), float("nan"))
    for row, chunks in enumerate(counts[:, 1].tolist()):
        read = _read_archive(layer, row, chunks, heads, config, held[:0, 0].cpu(), None)
        kv = torch.stack([x.unflatten(1, (-1, config.group_size)) for x in read], 2)
        groups[row * heads : (row + 1) * heads, : kv.shape[1]] = kv.to(held.device)
    return groups


STEPS = {  # config, type
    "shared": (CONFIGS["balanced"], torch.float32),
    "float16": (CONFIGS["balanced"], torch.float16),
    "two levels, bfloat16": (CONFIGS["two levels"], torch.bfloat16),
    "coded, groups of 2": (CONFIGS["coded"], torch.float32),
    "coded, float16": (CONFIGS["coded"], torch.float16),
    "groups of 16": (CONFIGS["by position"], torch.float32),
    "odd groups": (BASE.replace(chunk_size=24, group_size=3, node_size=3), torch.float32),
    "all hit": (CONFIGS["everything routed"], torch.float32),
    "per head": (CONFIGS["per_head"], torch.float32),
}


@pytest.mark.parametrize("name", STEPS)
def test_missing_groups_reach_their_slots(name: str) -> None:
    """Cold, warm and all hits; bit for bit what the store holds, and no other slot is touched."""
    pytest.importorskip("triton")
    from hga.ops.kernels import decode as kernels

    (config, dtype), heads, repeats, width = STEPS[name], 2, 2, 24
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cannot multiply bfloat16")
    torch.manual_seed(0)
    rows = [filled_row(config, length, heads, width, dtype) for length in (301, 157)]
    layer, counts = decode_layer(config, rows, repeats)
    slots, stored, steps = layer.slots, stored_groups(layer, counts, config), 4
    slots.records.fill_(float("nan"))
    missed = []
    for step in range(steps):
        if step < steps - 1:
            query, keys, values = random_step(2, heads, repeats, width, dtype)
        expected = attend_decode(query, keys, values, layer, counts, config, 0.3)
        if step == steps - 1:  # the same queries again: the store is not looked at
            nothing = torch.full((config.chunk_size * heads * 2 * width,), float("nan"), dtype=dtype).to(DEVICE)
            layer.addresses.fill_(nothing.data_ptr())
        before, traffic = slots.owner.clone(), slots.traffic.clone()
        out = kernels.attend_decode(query, keys, values, layer, counts, config, 0.3)
        if dtype == torch.float32:
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        else:
            assert (out - expected).abs().mean() < 0.02, "a near tie may be chosen otherwise"
        problem, slot = (slots.owner >= 0).nonzero(as_tuple=True)
        group = slots.owner[problem, slot].long()
        assert torch.equal(slots.records[problem, slot], stored[problem, group])
        assert torch.equal(slots.slot_of[problem, group].long(), slot)
        assert slots.records[slots.owner < 0].isnan().all()
        hits, misses, unique = (slots.traffic - traffic).unbind(1)
        assert torch.equal((slots.owner != before).sum(1), misses)
        assert (unique <= hits + misses).all()
        missed.append(misses.sum().item())
        counts[:, 2] += 1
    assert missed[0] > 0, "cold"
    assert missed[-1] == 0
    assert missed[1] > 0 or name == "all hit"
    if name in ("shared", "float16", "odd groups"):
        assert sum(missed) > (slots.owner >= 0).sum(), "some slots were given twice"
