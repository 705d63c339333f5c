"""Routed prefill: the reference against a row fed block by block, the kernels against the reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from rows import SMALL, dense, new_row, random_sequence
from torch import Tensor

from hga.cache.routed import Scoring
from hga.cache.row import Row
from hga.config import HGAConfig
from hga.ops import prefill_routed, tiles
from hga.ops.coding import Codes
from hga.ops.nibbles import Nibbles
from hga.ops.precision import Rows
from hga.ops.prefill_routed import ClosedChunks
from hga.ops.routing import count_steps

kernels = pytest.importorskip("hga.ops.kernels.prefill_routed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
FREQUENCIES = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
CODED = SMALL.replace(node_size=16, overselection=2, group_size=2, coded=True)
CONFIGS = {
    "one level": SMALL,
    "two levels": SMALL.replace(node_size=16, overselection=2),
    "coded": CODED,
    "coded, fp8": SMALL.replace(node_size=8, overselection=2, coded=True, summary_dtype="fp8"),
    "per head": SMALL.replace(selection="per_head"),
    "per head, two levels": SMALL.replace(selection="per_head", node_size=16, overselection=2),
    "no far field": SMALL.replace(far_field=False, node_size=8, overselection=2),
    "fp8": SMALL.replace(summary_dtype="fp8"),
    "mixed rope": SMALL.replace(ordering="position", summary="mixed_rope"),
    "nothing routed": SMALL.replace(budget_tokens=16),
    "everything routed": SMALL.replace(budget_tokens=4096),
    "large groups": SMALL.replace(group_size=8, node_size=8, window_tokens=13, sink_tokens=3, budget_tokens=41),
}

NODES = SMALL.replace(node_size=8, overselection=2, group_size=2, coded=True)


@dataclass
class Block:
    """What a row would hand over for the block [first, last), and the row's own output."""

    query: Tensor
    near: tuple[Tensor, Tensor]
    closed: ClosedChunks | None
    first: int
    output: Tensor


def take_block(config: HGAConfig, first: int, last: int, softcap: float | None, seed: int = 0) -> Block:
    """Feed a row up to `first`, then the block [first, last)."""
    sequence = random_sequence(last, seed)
    frequencies = FREQUENCIES if config.summary == "mixed_rope" else None
    row, opened = new_row(config, frequencies)
    scoring = Scoring(0.25, softcap)
    if first:
        row.append(sequence.key[:, :first], sequence.value[:, :first])
        row.attend(sequence.query[:, :, :first], scoring)
    row.append(sequence.key[:, first:], sequence.value[:, first:])
    near = tuple(x[:, : row.near_length].clone() for x in (row._keys, row._values))
    output = row.attend(sequence.query[:, :, first:], scoring)
    return Block(sequence.query[:, :, first:], near, closed_of(config, row, opened), first, output)


def closed_of(config: HGAConfig, row: Row, opened: dict) -> ClosedChunks | None:
    if not row.chunks:
        return None
    summaries = row._archive.summaries
    keys = summaries.node_keys.held()
    values = summaries.held_node_values() if config.far_field else None
    groups = summaries.held_group_keys() if config.two_level else None
    return ClosedChunks(opened["store"].read(row._archive.chunks)[0], keys, values, groups)


def route(function, config: HGAConfig, block: Block, softcap: float | None, opened: Tensor | None = None):
    frequencies = FREQUENCIES if config.summary == "mixed_rope" else None
    return function(config, block.query, *block.near, block.closed, block.first, 0.25, softcap, frequencies, opened)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize(
    ("first", "last", "softcap"), [(0, 300, None), (150, 420, 3.0), (333, 334, None), (0, 9, None)]
)
def test_reference_is_a_row(name, first, last, softcap):
    config = CONFIGS[name]
    block = take_block(config, first, last, softcap)
    output = route(prefill_routed.attend_prefill_routed, config, block, softcap)
    torch.testing.assert_close(output.value, block.output, rtol=0, atol=1e-10)


def test_whole_nodes_are_opened_of_chunks_that_have_groups():
    """A long block of prefill="nodes", in PyTorch, tile by tile and by the reference; a short one opens groups."""
    config = NODES.replace(prefill="nodes", block_tokens=16, node_budget_tokens=2 * NODES.budget_tokens)
    assert config.by_nodes().routed_groups == (2 * 48 - 16) // 8
    block = take_block(config, 200, 420, None)
    output = route(prefill_routed.attend_prefill_routed, config.by_nodes(), block, None)
    torch.testing.assert_close(output.value, block.output, rtol=0, atol=1e-10)
    for tokens, rule in ((8, config.by_nodes()), (7, config)):
        block = take_block(config, 300, 300 + tokens, None)
        output = route(prefill_routed.attend_prefill_routed, rule, block, None)
        torch.testing.assert_close(output.value, block.output, rtol=0, atol=1e-10)


def test_whole_nodes_at_full_budget_are_dense():
    config = NODES.replace(budget_tokens=4096)
    block = take_block(config, 180, 250, None)
    output = route(prefill_routed.attend_prefill_routed, config.by_nodes(), block, None)
    expected = dense(random_sequence(250, 0))[:, :, 180:]
    torch.testing.assert_close(output.value, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", [{}, {"summary_dtype": "fp8"}, {"selection": "per_head"}, {"far_field": False}])
def test_kernel_opens_whole_nodes(changes, dtype):
    config = NODES.replace(**changes)
    block = cast(take_block(config, 180, 250, None), dtype)
    expected = route(prefill_routed.attend_prefill_routed, config.by_nodes(), block, None)
    output = route(kernels.attend_prefill_routed, config.by_nodes(), block, None)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps * 4
    torch.testing.assert_close(output.value, expected.value, rtol=0, atol=tolerance)
    torch.testing.assert_close(output.logsumexp, expected.logsumexp, rtol=0, atol=tolerance)


@pytest.mark.parametrize("function", [prefill_routed.attend_prefill_routed, kernels.attend_prefill_routed])
def test_records_are_waited_for(function):
    """Records that are on their way while queries choose are read when they have come."""
    block = cast(take_block(CODED, 180, 204, None), torch.float32)
    expected = route(function, CODED, block, None)
    arriving = torch.full_like(block.closed.records, torch.nan)
    wait = functools.partial(arriving.copy_, block.closed.records)
    block.closed = block.closed._replace(records=arriving, wait=wait)
    torch.testing.assert_close(route(function, CODED, block, None).value, expected.value, rtol=0, atol=0)


@pytest.mark.parametrize("config", [*CONFIGS.values(), HGAConfig(), HGAConfig().by_nodes()])
def test_attended_tokens_of_many_queries(config):
    """Counted at once as one by one."""
    always, opened = tiles.attended_tokens(config, 50, 900)
    for place, position in enumerate(range(50, 900)):
        chunks = tiles.closed_chunks(config, position)
        index = position - chunks * config.chunk_size
        pending = tiles.pending_groups(config, index)
        groups = min(pending + chunks * config.chunk_size // config.group_size, config.routed_groups)
        assert always[place] == index + 1 - pending * config.group_size
        assert opened[place] == groups * config.group_size


def test_refusals():
    block = take_block(SMALL, 150, 420, None)
    with pytest.raises(ValueError, match="near tokens"):
        prefill_routed.attend_prefill_routed(SMALL, block.query, *block.near, block.closed, 151, 0.25)
    with pytest.raises(ValueError, match="0 closed chunks"):
        prefill_routed.attend_prefill_routed(SMALL, block.query, *block.near, None, 150, 0.25)


def cast(block: Block, dtype: torch.dtype) -> Block:
    """The block where kernels run; rounding comes before everything, so that both sides route alike."""
    closed = block.closed and ClosedChunks(
        block.closed.records.to(DEVICE, dtype), *(_cast_rows(x, dtype) for x in block.closed.summaries)
    )
    query, keys, values = (x.to(DEVICE, dtype) for x in (block.query, *block.near))
    return Block(query, (keys, values), closed, block.first, block.output)


def _cast_rows(rows: Rows | Nibbles | Codes | None, dtype: torch.dtype) -> Rows | Nibbles | Codes | None:
    if rows is None:
        return None
    if isinstance(rows, (Codes, Nibbles)):
        return type(rows)(*(x.to(DEVICE) for x in rows))
    data = rows.data if rows.scale is not None else rows.data.to(dtype)
    return Rows(data.to(DEVICE), None if rows.scale is None else rows.scale.to(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_kernel(name, dtype):
    config = CONFIGS[name]
    block = cast(take_block(config, 180, 204, 3.0 if "fp8" in name else None), dtype)
    softcap = 3.0 if "fp8" in name else None
    counts = torch.full((2, 2, 24), -7, dtype=torch.int32, device=DEVICE)
    expected = route(prefill_routed.attend_prefill_routed, config, block, softcap, counts[0])
    output = route(kernels.attend_prefill_routed, config, block, softcap, counts[1])
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps * 4
    different = ((output.value - expected.value).abs() > tolerance).any(-1)
    assert different.sum() == 0, f"{int(different.sum())} of {different.numel()}"
    torch.testing.assert_close(output.logsumexp, expected.logsumexp, rtol=0, atol=tolerance)
    assert counts[1].tolist() == counts[0].tolist()


@pytest.mark.parametrize(("first", "last"), [(0, 19), (59, 66), (290, 400)])
@pytest.mark.parametrize("name", ["one level", "two levels"])
def test_kernel_where_chunks_close(name, first, last):
    """Blocks before anything closes, at the first closing, and over several of them."""
    block = cast(take_block(CONFIGS[name], first, last, None), torch.float32)
    expected = route(prefill_routed.attend_prefill_routed, CONFIGS[name], block, None)
    output = route(kernels.attend_prefill_routed, CONFIGS[name], block, None)
    torch.testing.assert_close(output.value, expected.value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["one level", "per head, two levels"])
def test_batches_do_not_change_the_result(name, monkeypatch):
    """Heads, strips and masses that go by a few at a time: what long contexts run into."""
    config = CONFIGS[name].replace(summary_dtype="fp8")
    block = cast(take_block(config, 180, 230, None), torch.float32)
    counts = torch.full((2, 2, 50), -7, dtype=torch.int32, device=DEVICE)
    expected = route(prefill_routed.attend_prefill_routed, config, block, None, counts[0])
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 1)
    output = route(kernels.attend_prefill_routed, config, block, None, counts[1])
    torch.testing.assert_close(output.value, expected.value, rtol=0, atol=1e-5)
    assert counts[1].tolist() == counts[0].tolist()


@pytest.mark.parametrize("name", ["two levels", "per head, two levels"])
def test_masses_of_a_strip_fit_the_scratch(name, monkeypatch):
    """KV heads go by in batches, too: where each query head chooses, one strip of all is R times as large."""
    config = CONFIGS[name]
    block = cast(take_block(config, 180, 230, None), torch.float32)
    strips = kernels.cut_strips(config, block.query[:1], 180, 0, {"scale": 1.0, "SOFTCAP": 0.0})
    groups = block.closed.records.shape[0] * config.chunk_size // config.group_size
    scratch_bytes = 2 * strips.heads * strips.constants["QUERIES"] * groups
    attended, attend = [], kernels._attend_heads
    monkeypatch.setattr(kernels, "_attend_heads", lambda *given: attended.append(len(given[1])) or attend(*given))
    for room, heads in ((2 * scratch_bytes, [2]), (2 * scratch_bytes - 1, [1, 1])):
        attended.clear()
        monkeypatch.setattr(kernels, "SCRATCH_BYTES", room)
        route(kernels.attend_prefill_routed, config, block, None)
        assert attended == heads


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about NaN
@pytest.mark.parametrize("name", ["two levels", "coded"])
def test_a_nan_query_opens_no_more_than_others(name):
    config = CONFIGS[name].replace(summary_dtype="fp8")
    block = cast(take_block(config, 180, 230, None), torch.float32)
    counts = torch.zeros(2, 2, 50, dtype=torch.int32, device=DEVICE)
    clean = route(kernels.attend_prefill_routed, config, block, None, counts[0])
    block.query[:, 1, 7] = torch.nan
    output = route(kernels.attend_prefill_routed, config, block, None, counts[1])
    assert (counts[1] <= config.routed_groups).all()
    assert output.value[:, 1, 7].isnan().all(), "garbage in, NaN out"
    assert output.value[:, 0, 7].isfinite().all(), "a head that shares the choice attends to what it may"
    others = torch.arange(50, device=DEVICE) != 7
    torch.testing.assert_close(output.value[:, :, others], clean.value[:, :, others], rtol=0, atol=1e-5)  # other unions
    torch.testing.assert_close(counts[1][:, others], counts[0][:, others])


@pytest.mark.parametrize("held", [512, 16384], ids=["held in part", "held whole"])
def test_choices_are_the_best_and_the_lowest(held, monkeypatch):
    """The kernels' own selection, with masses that tie, queries that may choose little and queries that may nothing."""
    marks = pytest.importorskip("hga.ops.kernels.prefill_marks")
    monkeypatch.setattr(marks, "_MOST_HELD", held)
    candidates = pytest.importorskip("hga.ops.kernels.candidates")
    width, queries = 1500, 16
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(1, 1, queries, width, generator=generator)
    mass[:, :, :4] = (mass[:, :, :4] * 8).round() / 8
    mass[:, :, 4:6] = torch.where(mass[:, :, 4:6] < 0.99, 0.0, mass[:, :, 4:6])
    mass[:, :, 6, 90:], mass[:, :, 7], mass[:, :, 8:] = -1.0, -1.0, torch.exp(-100 * mass[:, :, 8:])
    mass[:, :, 9, 30:900] = 100.0  # counts as no more than the last step does, as a NaN
    mass = count_steps(mass).masked_fill(mass < 0, -1).short().to(DEVICE)
    counts = torch.full((1, 1), width - 64, dtype=torch.int32, device=DEVICE)
    for keep in (0, 1, 100, width):
        words = torch.empty(1, 1, width, dtype=torch.int64, device=DEVICE)
        listed, found = torch.empty_like(words, dtype=torch.int32), torch.empty_like(counts)
        marks.mark_largest(mass, counts, keep, 64, candidates.Chosen(words, listed, found))
        order = torch.sort(mass[0, 0], dim=-1, descending=True, stable=True).indices[:, :keep]
        expected = torch.zeros(queries, width, dtype=torch.bool, device=DEVICE).scatter_(1, order, True)
        expected &= mass[0, 0] >= 0
        lanes = torch.arange(queries, device=DEVICE)[:, None]
        torch.testing.assert_close((words[0] >> lanes) & 1 == 1, expected)
        archive = expected[:, 64:].any(0).nonzero().flatten()
        assert listed[0, 0, : int(found)].tolist() == archive.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["balanced", "lean", "fidelity", "contiguous"])
@pytest.mark.parametrize("width", [64, 96, 128])
def test_kernel_at_size(preset, width):
    """bfloat16, R = 8, thousands of candidates: near ties may fall to the other side, in a thousandth of the rows."""
    if DEVICE.type != "cuda":
        pytest.skip("needs a CUDA device")
    config = HGAConfig.preset(preset, prefill="routed", budget_tokens=512)
    first, last = 8192, 8192 + 300
    chunks = prefill_routed.closed_chunks(config, first)
    generator = torch.Generator().manual_seed(0)
    keys, values, query = (
        torch.randn(*shape, width, generator=generator).to(DEVICE, torch.bfloat16)
        for shape in ((2, last), (2, last), (2, 8, last - first))
    )
    row, opened = new_row(config)
    row.append(keys.cpu(), values.cpu())
    row._close(prefill_routed.closed_chunks(config, last))
    closed = cast(Block(query, (keys, values), closed_of(config, row, opened), first, query), torch.bfloat16).closed
    sink = config.sink_tokens
    skipped = sink + chunks * config.chunk_size
    near = tuple(torch.cat([x[:, :sink], x[:, skipped:]], 1) for x in (keys, values))
    block = Block(2 * query, near, closed, first, query)
    expected = route(prefill_routed.attend_prefill_routed, config, block, None)
    output = route(kernels.attend_prefill_routed, config, block, None)
    different = ((output.value - expected.value).abs() > 8 * torch.finfo(torch.bfloat16).eps).any(-1)
    assert different.float().mean() <= 0.001
