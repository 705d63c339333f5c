"""What the launches of one decode step share: shapes, encodings, scratch."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga.config import HGAConfig
from hga.ops.decode import CACHED_SPLITS, NEAR_SPLITS, PENDING_BLOCK, DecodeLayer, padded_width
from hga.ops.nibbles import Nibbles
from hga.ops.precision import Rows
from hga.ops.tiles import pending_capacity

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def widened(dtype: torch.dtype) -> tl.dtype:
    """The type in which fp8 and coded summaries meet queries and weights: e4m3 is exact in float16."""
    return tl.float32 if dtype == torch.float32 else tl.float16


@functools.cache
def lacks_fp8(device: torch.device) -> bool:
    """Whether a device cannot convert e4m3 itself (before compute capability 8.9, and the interpreter)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)


class Step:
    """The numbers that the kernels of one step share."""

    def __init__(self, query: Tensor, layer: DecodeLayer, counts: Tensor, config: HGAConfig) -> None:
        self.config, self.layer, self.counts = config, layer, counts
        batch, self.heads, _, self.width = query.shape
        self.kv_heads = layer.near_keys.shape[1]
        self.problems = batch * self.kv_heads
        repeats = self.heads // self.kv_heads
        self.selectors_each = config.selectors(repeats)
        self.selectors = self.problems * self.selectors_each
        self.wide = padded_width(self.width)
        self.group_bytes = 2 * config.group_size * self.width * layer.near_keys.element_size()
        self.first = pending_capacity(config, PENDING_BLOCK)
        self.per_node = config.node_size // config.group_size if config.two_level else 0
        self.tile = {
            "ROWS": repeats // self.selectors_each,
            "SELECTORS": self.selectors_each,
            "RB": max(16, triton.next_power_of_2(repeats // self.selectors_each)),
            "DB": self.wide,
        }
        scratch = layer.scratch
        self.parts = (scratch.peaks, scratch.totals, scratch.sums)
        self.parts_stride = scratch.peaks.shape[1]
        held = layer.node_values
        if held is None:  # without a far field no program looks at values, and any tensor does
            held = Rows(layer.near_keys, None)
        data, scale = held
        self.far_block = 64 if data.dtype.itemsize > 1 else 128
        self.far_splits = min(scratch.splits, triton.cdiv(data.shape[2], self.far_block))  # those that can have units
        self.used_parts = CACHED_SPLITS + NEAR_SPLITS
        if layer.node_values is not None:
            self.used_parts += self.far_splits + (CACHED_SPLITS if config.two_level else 0)
        halved, scaled = isinstance(held, Nibbles), scale is not None
        bits = data.view(torch.uint8) if scaled else data
        self.values = (bits, scale if scaled else data, data.shape[2])
        self.encoding = {
            "WIDE": padded_width(data.shape[3]),
            "HALVED": halved,
            "FP8": scaled and not halved,
            "BY_BITS": lacks_fp8(query.device),
            "VALUE_DTYPE": widened(query.dtype) if scaled else TYPES[query.dtype],
        }
