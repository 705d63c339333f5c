"""What every attention kernel here shares: logits, the running softmax, and launch sizes."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Launch(NamedTuple):
    """Rows (queries times heads) and keys of a tile, warps, and loads in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


# By head dim, best first; the first whose tiles fit the card's shared memory is taken.
_HALF = {
    64: (Launch(128, 128, 8, 3), Launch(128, 64, 4, 3), Launch(128, 64, 4, 2)),
    128: (Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(128, 32, 8, 2), Launch(64, 32, 4, 2)),
    256: (Launch(128, 32, 8, 2), Launch(64, 32, 4, 2), Launch(64, 32, 4, 1)),
}
_FLOAT = {64: (Launch(64, 32, 8, 1),), 128: (Launch(64, 32, 8, 1),), 256: (Launch(32, 32, 8, 1),)}
_SMALLEST_SHARED_BYTES = 99 * 1024


def choose_launch(width: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The launch of an attention kernel for head dim `width`. ValueError where the kernels do not serve it."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype={dtype}: the kernels serve float16, bfloat16, float32; use the PyTorch reference")
    if width > 256:
        raise ValueError(f"head dim {width}: the kernels serve at most 256; use the PyTorch reference")
    sizes = (_FLOAT if dtype == torch.float32 else _HALF)[padded_width(width)]
    shared_bytes = _SMALLEST_SHARED_BYTES
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared_bytes = getattr(properties, "shared_memory_per_block_optin", shared_bytes)
    row_bytes = padded_width(width) * dtype.itemsize
    fitting = [x for x in sizes if row_bytes * (x.rows + 2 * x.keys * x.stages) <= shared_bytes]
    return fitting[0] if fitting else sizes[-1]


def padded_width(width: int) -> int:
    """The power of two, at least 64, in which a head dim is computed."""
    return max(64, 1 << (width - 1).bit_length())


@triton.jit
def load_rows(base, at, column, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows (N, D) at offsets `at`, padded with zeros to BLOCK_WIDTH."""
    pointers = base + at[:, None] + column[None, :]
    if WIDTH == BLOCK_WIDTH:
        return tl.load(pointers)
    return tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)


@triton.jit
def cap_logits(logits, softcap: tl.constexpr):
    """tanh(logits / softcap) * softcap, as a series where the exponential form would cancel."""
    x = logits / softcap
    square = x * x
    small = x * (1 + square * (-0.3333333333 + square * (0.1333333333 - square * 0.0539682540)))
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    large = (1 - decay) / (1 + decay)
    return softcap * tl.where(square < 0.04, small, tl.where(x < 0, -large, large))


@triton.jit
def dot_logits(query, keys, scale, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Logits in powers of two: query (M, D), keys (N, D) -> float32 (M, N). SOFTCAP 0 stands for none."""
    logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
    if SOFTCAP > 0:
        logits = cap_logits(logits, SOFTCAP)
    return logits * LOG2_E


@triton.jit
def absorb(logits, values, peak, total, output, PRECISION: tl.constexpr):
    """One step of the running softmax: logits (M, N) in powers of two, -inf where not attended; values (N, D)."""
    higher = tl.maximum(peak, tl.max(logits, 1))
    origin = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    weights = tl.exp2(logits - origin[:, None])
    shrink = tl.exp2(peak - origin)
    total = total * shrink + tl.sum(weights, 1)
    output = tl.dot(weights.to(values.dtype), values, output * shrink[:, None], input_precision=PRECISION)
    return higher, total, output


@triton.jit
def finish(peak, total, output):
    """The value (M, D) and natural log-sum-exp (M,) of a running softmax; 0 and -inf where nothing was attended."""
    some = total > 0
    divisor = tl.where(some, total, 1.0)
    return output / divisor[:, None], tl.where(some, (peak + tl.log2(divisor)) * LN_2, float("-inf"))
