"""Closing chunks: the reference and the kernel keep one contract, and agree with each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hga.ops.closing import Closed, close_chunks
from hga.ops.coding import Codes, decode_differences, encode_differences
from hga.ops.ordering import POWER_ITERATIONS, VALUE_WEIGHT, start_vector
from hga.ops.precision import Rows, decode_rows, encode_rows
from hga.store import RecordLayout

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("hga.ops.kernels.closing")
encode = pytest.importorskip("hga.ops.kernels.encode")
tl, encode_e4m3, round_bfloat16 = triton.language, encode.encode_e4m3, encode.round_bfloat16

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
FP8 = torch.float8_e4m3fn
RULES = {  # heads, chunks, D, and the rule
    "one level, fp8": (2, 2, 16, {"chunk_size": 16, "group_size": 4, "node_size": 4, "summary_dtype": FP8}),
    "two levels, odd sizes": (1, 2, 20, {"chunk_size": 24, "group_size": 3, "node_size": 6, "summary_dtype": FP8}),
    "a node is the chunk": (2, 1, 16, {"chunk_size": 16, "group_size": 4, "node_size": 16, "summary_dtype": FP8}),
    "bfloat16 summaries": (1, 1, 16, {"chunk_size": 16, "group_size": 4, "node_size": 8}),
    "no far field, no tree": (1, 2, 18, {"chunk_size": 8, "group_size": 8, "node_size": 8, "far_field": False}),
    "by position": (2, 2, 16, {"chunk_size": 20, "group_size": 5, "node_size": 10, "ordering": "position"}),
}
LARGE = {
    "balanced": (4, 8, 128, {"chunk_size": 256, "group_size": 4, "node_size": 4, "summary_dtype": FP8}),
    "lean": (4, 8, 128, {"chunk_size": 256, "group_size": 8, "node_size": 32, "summary_dtype": FP8}),
    "the largest chunk": (8, 3, 256, {"chunk_size": 512, "group_size": 16, "node_size": 128, "summary_dtype": FP8}),
    "a group is half the chunk": (2, 2, 80, {"chunk_size": 512, "group_size": 256, "node_size": 512}),
    "a width of 96": (2, 5, 96, {"chunk_size": 192, "group_size": 6, "node_size": 12}),
}
TREES = {
    "a deep tree": (1, 1, 16, {"chunk_size": 32, "group_size": 2, "node_size": 4, "summary_dtype": FP8}),
    "odd sizes": (2, 1, 20, {"chunk_size": 24, "group_size": 3, "node_size": 6}),
}
if GPU:
    RULES, TREES = RULES | LARGE, TREES | LARGE


def close_by_kernel(keys: Tensor, values: Tensor, **how: object) -> Closed:
    """The kernel, its outputs poisoned: what it does not write is NaN (in integers, the largest number)."""
    torch.use_deterministic_algorithms(True)  # this fills new memory
    try:
        return kernels.close_chunks(keys, values, **how)
    finally:
        torch.use_deterministic_algorithms(False)


BOTH = pytest.mark.parametrize("close", [close_chunks, close_by_kernel], ids=["reference", "kernel"])


def rule(**changes: object) -> dict[str, object]:
    return {"ordering": "content", "summary_dtype": torch.bfloat16, "far_field": True} | changes


def draw(heads: int, tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random K/V whose rows fall into kinds, as real keys do: a slice of a buffer, so that strides matter."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(2, heads, 6, width, generator=generator)
    kind = torch.randint(0, 6, (heads, tokens, 1), generator=generator).expand(-1, -1, width)
    noise = torch.randn(2, heads, tokens, width, generator=generator)
    rows = [(3 * kinds[i].gather(1, kind) + noise[i]).to(DEVICE, dtype) for i in range(2)]
    buffer = torch.full((2, heads, tokens + 5, width), math.nan, dtype=dtype, device=DEVICE)
    for held, given in zip(buffer, rows, strict=True):
        held[:, 2:-3] = given
    return buffer[0, :, 2:-3], buffer[1, :, 2:-3]


def ordered_rows(closed: Closed) -> tuple[Tensor, Tensor]:
    """A record's K/V, each (N, Hkv, C, D), in group order."""
    chunks, heads, groups, _, size, width = closed.records.shape
    layout = RecordLayout(heads, groups, size, width, closed.records.dtype, closed.order is not None)
    assert closed.records.shape == (chunks, *layout.shape)
    return layout.unpack(closed.records)


def assert_encoded(given: Rows, means: Tensor, dtype: torch.dtype) -> None:
    """`given` holds the means (Hkv, n, D) as `dtype`, each within one step of that type."""
    expected = encode_rows(means, dtype)
    assert given.data.dtype == dtype
    assert given.data.shape == expected.data.shape
    assert (given.scale is None) == (expected.scale is None)
    found, wanted = decode_rows(given, torch.float32), decode_rows(expected, torch.float32)
    if given.scale is None or expected.scale is None:
        step = wanted.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
    else:
        assert given.scale.dtype == torch.bfloat16
        torch.testing.assert_close(given.scale, expected.scale, rtol=2**-7, atol=0)
        step = (wanted.abs() * 2**-3).clamp(min=2**-9 * expected.scale.float())
    assert ((found - wanted).abs() <= 1.01 * step).all()
    differ = found != wanted
    if given.scale is not None and expected.scale is not None:
        # PyTorch on a GPU multiplies by the reciprocal of 448: a scale halfway between two bfloat16 may round apart.
        alike = given.scale == expected.scale
        assert alike.float().mean() > 0.8
        differ = differ & alike
    assert differ.float().mean() < 1e-3


def assert_closed(closed: Closed, keys: Tensor, values: Tensor, **how: object) -> None:
    """The contract: records hold each token once, `order` says where, and summaries are of just these rows."""
    chunk, group, node, dtype = (how[x] for x in ("chunk_size", "group_size", "node_size", "summary_dtype"))
    given = [x.unflatten(1, (-1, chunk)).transpose(0, 1) for x in (keys, values)]  # (N, Hkv, C, D)
    if how["ordering"] == "position":
        assert closed.order is None
        order = torch.arange(chunk, device=DEVICE).expand(given[0].shape[:3])
    else:
        assert closed.order.dtype == torch.int16
        order = closed.order.long()
    assert torch.equal(order.sort(-1).values, torch.arange(chunk, device=DEVICE).expand_as(order))
    rows = ordered_rows(closed)
    for kept, before in zip(rows, given, strict=True):
        assert torch.equal(kept, before.gather(2, order[..., None].expand_as(before)))
    keys, values = (x.transpose(0, 1).flatten(1, 2).float() for x in rows)
    assert_encoded(closed.node_keys, keys.unflatten(1, (-1, node)).mean(2), dtype)
    assert (closed.node_values is not None) == how["far_field"]
    if closed.node_values is not None:
        assert_encoded(closed.node_values, values.unflatten(1, (-1, node)).mean(2), dtype)
    assert (closed.group_keys is not None) == (node > group)
    if closed.group_keys is not None:
        assert_encoded(closed.group_keys, keys.unflatten(1, (-1, group)).mean(2), dtype)


def clear_groups(keys: Tensor, values: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Groups of each chunk's tokens, (X, C, D) -> (X, C), by a float64 tree, and how clear its splits are, (X,).

    Clear: the smallest gap between the halves of a node, in standard deviations of its projections.
    """
    chunks, chunk, _ = keys.shape
    groups = torch.zeros(chunks, chunk, dtype=torch.long)
    clear = torch.full((chunks,), math.inf, dtype=torch.float64)
    start = start_vector(2 * keys.shape[2], torch.float64, torch.device("cpu"))[:, 0]
    for index in range(chunks):
        key, value = keys[index].double(), values[index].double()
        features = torch.cat([key / key.std(correction=0), VALUE_WEIGHT * value / value.std(correction=0)], -1)
        nodes = [torch.arange(chunk)]
        while len(nodes[0]) > group_size:
            halves = []
            for tokens in nodes:
                rows = features[tokens] - features[tokens].mean(0)
                axis = start
                for _ in range(POWER_ITERATIONS):
                    axis = rows.mT @ (rows @ axis)
                    axis = axis / axis.norm()
                along, split = (rows @ axis).sort()
                half = len(tokens) // 2
                clear[index] = min(clear[index], (along[half] - along[half - 1]) / along.std())
                halves += [tokens[split[:half]], tokens[split[half:]]]
            nodes = halves
        for number, tokens in enumerate(nodes):
            groups[index, tokens] = number
    return groups, clear


def groups_of(order: Tensor, group_size: int) -> Tensor:
    """The group of each token, from orders (..., C)."""
    return order.long().argsort(-1) // group_size


def spread_inside(closed: Closed) -> float:
    """Mean variance of keys and values inside a group."""
    return float(closed.records.double().var(4, correction=0).mean())


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_records_order_and_summaries_name_the_same_rows(close, name, dtype):
    heads, chunks, width, changes = RULES[name]
    how = rule(**changes)
    keys, values = draw(heads, chunks * how["chunk_size"], width, dtype)
    assert_closed(close(keys, values, **how), keys, values, **how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TREES)
def test_the_kernel_groups_as_the_reference_does(name, dtype, monkeypatch):
    if not GPU:
        monkeypatch.setattr(kernels, "_TILE_NUMBERS", 128)  # so that small nodes are read in several blocks too
    heads, chunks, width, changes = TREES[name]
    how = rule(**changes)
    keys, values = draw(heads, chunks * how["chunk_size"], width, dtype, seed=1)
    kernel, reference = close_by_kernel(keys, values, **how), close_chunks(keys, values, **how)
    size = how["group_size"]
    units = [x.cpu().unflatten(1, (-1, how["chunk_size"])).transpose(0, 1).flatten(0, 1) for x in (keys, values)]
    groups, gap = clear_groups(*units, size)
    clear = gap > 1e-4  # of a node's spread: far above float32 rounding
    assert clear.float().mean() > 0.2
    assert torch.equal(groups_of(kernel.order.cpu(), size).flatten(0, 1)[clear], groups[clear])
    assert spread_inside(kernel) == pytest.approx(spread_inside(reference), rel=0.01)


@BOTH
def test_a_chunk_closes_alike_alone_and_among_others(close):
    how = rule(chunk_size=16, group_size=4, node_size=8, summary_dtype=FP8)
    keys, values = draw(2, 3 * 16, 16, torch.float16, seed=2)
    together, alone = close(keys, values, **how), close(keys[:, 16:32], values[:, 16:32], **how)
    assert torch.equal(together.order[1:2], alone.order)
    assert torch.equal(together.records[1:2], alone.records)
    for many, one, size in (
        (together.node_keys, alone.node_keys, 2),
        (together.node_values, alone.node_values, 2),
        (together.group_keys, alone.group_keys, 4),
    ):
        here = slice(size, 2 * size)
        assert torch.equal(many.data[:, here].view(torch.uint8), one.data.view(torch.uint8))
        assert torch.equal(many.scale[:, here], one.scale)


def _equal_keys(keys: Tensor, values: Tensor) -> None:
    keys.copy_(keys[:, :1].expand_as(keys).clone())
    values.copy_(values[:, :1].expand_as(values).clone())


def _constant(keys: Tensor, values: Tensor) -> None:
    keys.fill_(40)
    values.zero_()


def _constant_keys(keys: Tensor, values: Tensor) -> None:
    keys.fill_(-60000)


def _large(keys: Tensor, values: Tensor) -> None:
    keys.mul_(1e4 / keys.abs().max())
    values.mul_(6e4 / values.abs().max())


def _tiny(keys: Tensor, values: Tensor) -> None:
    keys.mul_(1e-6)
    values.mul_(1e-7)


@BOTH
@pytest.mark.parametrize("spoil", [_equal_keys, _constant, _constant_keys, _large, _tiny])
def test_degenerate_chunks_close_without_nan(close, spoil):
    how = rule(chunk_size=16, group_size=4, node_size=8, summary_dtype=FP8)
    keys, values = draw(1, 16, 16, torch.float16, seed=3)
    spoil(keys, values)
    closed = close(keys, values, **how)
    assert_closed(closed, keys, values, **how)
    for rows in (closed.node_keys, closed.node_values, closed.group_keys):
        assert torch.isfinite(decode_rows(rows, torch.float32)).all()
    if spoil in (_equal_keys, _constant):
        assert torch.equal(closed.order, torch.arange(16, device=DEVICE).expand_as(closed.order))
    if spoil is _constant_keys:  # values alone tell the tokens apart
        assert not torch.equal(closed.order, torch.arange(16, device=DEVICE).expand_as(closed.order))


@pytest.mark.parametrize("order", ["(T, Hkv, D)", "every other number"])
def test_the_kernel_reads_any_strides(order):
    how = rule(chunk_size=8, group_size=4, node_size=4)
    keys, values = (x.contiguous() for x in draw(2, 16, 16, torch.float32, seed=4))
    if order == "(T, Hkv, D)":
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (keys, values)]
    else:
        strided = [torch.stack([x, x * math.nan], -1).flatten(-2)[..., ::2] for x in (keys, values)]
    expected, closed = kernels.close_chunks(keys, values, **how), kernels.close_chunks(*strided, **how)
    assert torch.equal(closed.records, expected.records)
    assert torch.equal(closed.node_keys.data, expected.node_keys.data)


def test_what_the_kernel_does_not_take_is_named():
    keys, values = draw(1, 1024, 16, torch.float32)
    how = rule(chunk_size=512, group_size=4, node_size=4)
    with pytest.raises(ValueError, match=r"mixed-RoPE.*use hga\.ops\.closing"):
        kernels.close_chunks(keys, values, **how | {"inverse_frequencies": torch.ones(8)})
    with pytest.raises(ValueError, match="chunk_size=1024 must be at most 512"):
        kernels.close_chunks(keys, values, **how | {"chunk_size": 1024})
    with pytest.raises(TypeError, match=r"float64.*use hga\.ops\.closing"):
        kernels.close_chunks(keys.double(), values.double(), **how)


@BOTH
def test_parts_of_chunks_are_refused(close):
    keys, values = draw(1, 40, 16, torch.float32)
    how = rule(chunk_size=32, group_size=4, node_size=4)
    with pytest.raises(ValueError, match="40 tokens are not a whole number of chunks"):
        close(keys, values, **how)
    with pytest.raises(ValueError, match="0 tokens are not a whole number"):
        close(keys[:, :0], values[:, :0], **how)
    with pytest.raises(ValueError, match="must have one shape"):
        close(keys, values[:, :32], **how)


@triton.jit
def _encode(numbers, codes, rounded, COUNT: tl.constexpr):
    place = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    number = tl.load(numbers + place)
    tl.store(codes + place, encode_e4m3(tl.minimum(tl.maximum(number, -448.0), 448.0)))
    tl.store(rounded + place, round_bfloat16(number))


def test_rounding_by_bits_is_torchs_rounding():
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    exact = codes[codes.isfinite()].sort().values
    between = (exact[1:] + exact[:-1]) / 2  # ties
    numbers = torch.cat([exact, between])
    around = [numbers.nextafter(torch.tensor(away)) for away in (-math.inf, math.inf)]
    generator = torch.Generator().manual_seed(5)
    random = torch.randn(2000, generator=generator) * torch.logspace(-45, 38, 2000)
    numbers = torch.cat([numbers, *around, random[random.isfinite()], torch.tensor([0.0, -0.0])])
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 1024)).to(DEVICE)
    found = torch.full(numbers.shape, 0xAA, dtype=torch.uint8, device=DEVICE)
    rounded = torch.full_like(numbers, math.nan)
    _encode[(len(numbers) // 1024,)](numbers, found, rounded, COUNT=1024)
    assert torch.equal(found, numbers.clamp(-448, 448).to(FP8).view(torch.uint8))
    assert torch.equal(rounded, numbers.bfloat16().float())


CODED = {  # heads, chunks, D, and the rule
    "fp8 nodes": (2, 2, 16, {"chunk_size": 32, "group_size": 2, "node_size": 16, "summary_dtype": FP8}),
    "bfloat16 nodes, odd sizes": (1, 3, 20, {"chunk_size": 24, "group_size": 3, "node_size": 12}),
    "by position": (2, 1, 16, {"chunk_size": 20, "group_size": 5, "node_size": 10, "ordering": "position"}),
}
if GPU:
    CODED |= {
        "balanced": (4, 8, 128, {"chunk_size": 256, "group_size": 2, "node_size": 32, "summary_dtype": FP8}),
        "lean, a width of 80": (4, 8, 80, {"chunk_size": 256, "group_size": 4, "node_size": 32, "summary_dtype": FP8}),
    }


def coded_error(codes: Codes, nodes: Tensor, means: Tensor) -> Tensor:
    """Squared error of decoded keys over their squared distance from the nodes, a group (Hkv, n)."""
    nodes = decode_rows(nodes, torch.float32)
    away = means.unflatten(1, (nodes.shape[1], -1)) - nodes[:, :, None]
    return (decode_differences(codes, nodes) - means).square().sum(-1) / away.flatten(1, 2).square().sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODED)
def test_coded_keys_of_kernel_and_reference(name, dtype):
    """Two bits keep all but an eighth of the variance (0.119 for a normal variable), the kernel as the reference."""
    heads, chunks, width, changes = CODED[name]
    how = rule(coded=True, **changes)
    keys, values = draw(heads, chunks * how["chunk_size"], width, dtype, seed=6)
    reference, kernel = close_chunks(keys, values, **how), close_by_kernel(keys, values, **how)
    for closed in (reference, kernel):
        rows, _ = ordered_rows(closed)
        means = rows.transpose(0, 1).flatten(1, 2).float().unflatten(1, (-1, how["group_size"])).mean(2)
        assert closed.group_keys.data.dtype == torch.uint8
        assert closed.group_keys.channels.shape == (heads, chunks, width)
        assert coded_error(closed.group_keys, closed.node_keys, means).mean() < 0.2
    expected = encode_differences(
        means := ordered_rows(kernel)[0]
        .transpose(0, 1)
        .flatten(1, 2)
        .float()
        .unflatten(1, (-1, how["group_size"]))
        .mean(2),
        decode_rows(kernel.node_keys, torch.float32),
        chunks,
    )
    found = kernel.group_keys
    alike = (found.channels.float() == expected.channels.float()).all(-1)  # a spread may round to the next e4m3
    assert alike.float().mean() > 0.5
    per_chunk = expected.data.shape[1] // chunks
    same = found.data.unflatten(1, (chunks, per_chunk))[alike] == expected.data.unflatten(1, (chunks, per_chunk))[alike]
    assert same.float().mean() > 0.995  # numbers on the edge between two levels
    nodes = decode_rows(kernel.node_keys, torch.float32)
    gap = coded_error(found, kernel.node_keys, means).mean() - coded_error(expected, kernel.node_keys, means).mean()
    assert abs(gap) < 0.01
    assert torch.isfinite(decode_differences(found, nodes)).all()


@BOTH
@pytest.mark.parametrize("spoil", [_equal_keys, _constant, _constant_keys, _large, _tiny])
def test_degenerate_chunks_are_coded_without_nan(close, spoil):
    how = rule(chunk_size=16, group_size=2, node_size=8, summary_dtype=FP8, coded=True)
    keys, values = draw(1, 16, 16, torch.float16, seed=3)
    spoil(keys, values)
    closed = close(keys, values, **how)
    nodes = decode_rows(closed.node_keys, torch.float32)
    decoded = decode_differences(closed.group_keys, nodes)
    assert torch.isfinite(decoded).all()
    means = ordered_rows(closed)[0].transpose(0, 1).flatten(1, 2).float().unflatten(1, (-1, 2)).mean(2)
    assert ((decoded - means).norm() <= 1.01 * (nodes.repeat_interleave(4, 1) - means).norm() + 1e-30).all()


def test_widths_that_fill_no_bytes_are_refused():
    keys, values = draw(1, 16, 18, torch.float32)
    how = rule(chunk_size=16, group_size=2, node_size=8, coded=True)
    for close in (close_chunks, kernels.close_chunks):
        with pytest.raises(ValueError, match=r"head_dim=18 is no multiple of 4; use coded=False"):
            close(keys, values, **how)
