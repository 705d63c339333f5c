"""Node values in four bits, and steps of coded keys in one byte: reference and kernels."""

from __future__ import annotations

import pytest
import torch
from test_closing import BOTH, CODED, DTYPES, FP8, _constant, _equal_keys, _large, _tiny, draw, ordered_rows, rule
from torch import Tensor

from hga.cache.layout import summary_bytes_per_token
from hga.config import HGAConfig
from hga.ops.closing import Closed, close_chunks
from hga.ops.coding import Codes, decode_steps, encode_steps
from hga.ops.nibbles import TENTHS, Nibbles, decode_either, decode_nibbles, encode_nibbles, nibble_bytes
from hga.ops.precision import encode_rows

kernels = pytest.importorskip("hga.ops.kernels.closing")


def mean_values(closed: Closed, node_size: int) -> Tensor:
    """Of the tokens of each node (Hkv, nodes, D), float32."""
    return ordered_rows(closed)[1].transpose(0, 1).flatten(1, 2).float().unflatten(1, (-1, node_size)).mean(2)


def test_halves_of_a_row_are_halves_of_bytes():
    rows = torch.tensor([[-7.5, -0.5, 0.5, 7.5], [15.0, 1.0, -1.0, -15.0]])
    coded = encode_nibbles(rows)
    assert coded.data.tolist() == [[0x80, 0xF7], [0x7F, 0x08]]
    assert coded.scale.flatten().tolist() == [1.0, 2.0]
    assert torch.equal(decode_nibbles(coded, torch.float64), rows.double())
    assert coded.data.nbytes + coded.scale.nbytes == 2 * nibble_bytes(4)


def test_the_best_of_the_steps_is_taken():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 64, generator=generator) * torch.logspace(-6, 4, 300)[:, None]
    rows[::2, 5] *= 3  # one number stands apart
    rows[7] = 0
    error = (decode_nibbles(encode_nibbles(rows), torch.float32) - rows).norm(dim=-1)
    assert (error <= 0.25 * rows.norm(dim=-1) + 1e-30).all()
    for tenths in TENTHS:
        step = (rows.abs().amax(-1, keepdim=True) * tenths / 75).clamp(min=1e-37).bfloat16().float()
        other = ((rows / step).floor().clamp(-8, 7) + 0.5) * step
        assert (error <= 1.001 * (other - rows).norm(dim=-1)).all()


def test_either_way_of_keeping_rows_is_decoded():
    rows = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(1))
    here = (slice(None), slice(4))
    for kept, error in ((encode_nibbles(rows), 0.3), (encode_rows(rows, FP8), 0.1), (encode_rows(rows, rows.dtype), 0)):
        found = decode_either(kept, torch.float32, here)
        assert (found - rows[:, :4]).norm() <= error * rows[:, :4].norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODED)
def test_kernel_codes_values_as_the_reference(name, dtype):
    heads, chunks, width, changes = CODED[name]
    how = rule(coded=True, **changes)
    keys, values = draw(heads, chunks * how["chunk_size"], width, dtype, seed=7)
    closed = kernels.close_chunks(keys, values, **how)
    found, expected = closed.node_values, encode_nibbles(mean_values(closed, how["node_size"]))
    assert isinstance(found, Nibbles)
    assert found.data.dtype == torch.uint8
    assert found.data.shape == expected.data.shape
    alike = (found.scale == expected.scale).squeeze(-1)  # two steps may be as good as each other
    assert alike.float().mean() > 0.95
    assert (found.data[alike] == expected.data[alike]).float().mean() > 0.999  # numbers on the edge of two levels
    torch.testing.assert_close(found.scale.float(), expected.scale.float(), rtol=0.5, atol=0)


@BOTH
def test_values_are_kept_with_a_far_field_only(close):
    how = rule(coded=True, chunk_size=16, group_size=2, node_size=8, far_field=False)
    assert close(*draw(1, 16, 16, torch.float32), **how).node_values is None


def close_by_kernel(keys: Tensor, values: Tensor, **how: object) -> Closed:
    return kernels.close_chunks(keys, values, **how)


@pytest.mark.parametrize("close", [close_chunks, close_by_kernel], ids=["reference", "kernel"])
@pytest.mark.parametrize("spoil", [_equal_keys, _constant, _large, _tiny])
def test_degenerate_values(close, spoil):
    how = rule(chunk_size=16, group_size=2, node_size=8, summary_dtype=FP8, coded=True)
    keys, values = draw(1, 16, 16, torch.float16, seed=3)
    spoil(keys, values)
    closed = close(keys, values, **how)
    means = mean_values(closed, 8)
    decoded = decode_nibbles(closed.node_values, torch.float32)
    assert torch.isfinite(decoded).all()
    assert ((decoded - means).square().mean(-1).sqrt() <= 0.1 * means.abs().amax(-1) + 1e-30).all()


def test_a_byte_holds_a_step():
    steps = torch.exp2(torch.linspace(-25.9, 5.8, 5000, dtype=torch.float64))
    codes = encode_steps(steps)
    assert codes.dtype == torch.uint8
    assert (decode_steps(codes, torch.float64) / steps).log2().abs().max() <= 1 / 16 + 1e-12  # 4.4%
    every = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(encode_steps(decode_steps(every, dtype)), every)
    assert encode_steps(torch.tensor([0.0, 1e-30, 1e30])).tolist() == [0, 0, 255]
    assert decode_steps(torch.tensor([208], dtype=torch.uint8), torch.float32).item() == 1


@BOTH
def test_steps_of_groups_are_bytes(close):
    how = rule(chunk_size=32, group_size=2, node_size=16, coded=True)
    codes = close(*draw(2, 64, 16, torch.float32, seed=8), **how).group_keys
    assert isinstance(codes, Codes)
    assert codes.scale.dtype == torch.uint8
    assert 0 < codes.scale.min() <= codes.scale.max() < 255


@pytest.mark.parametrize(("preset", "width", "share"), [("balanced", 64, 0.0586), ("balanced", 128, 0.0571)])
def test_summaries_of_the_default_are_at_most_six_hundredths(preset, width, share):
    found = summary_bytes_per_token(HGAConfig.preset(preset), width, torch.bfloat16) / (4 * width)
    assert found == pytest.approx(share, abs=5e-5)
    assert found <= 0.06
