"""Keys of groups in two bits a number: what is kept is how a group's mean differs from its node's."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS_PER_BYTE = 4
STEP = 0.996
"""Distance of the four levels, in standard deviations: the least squared error for a normal variable."""
PEAK, LEAST = 448.0, 2.0**-6
"""Largest and least channel spread, as e4m3 keeps them: a channel of less spread is coded as if it had that much."""
STEPS_PER_OCTAVE, UNIT_STEP = 8, 208
"""A byte u is a step of 2 ** ((u - 208) / 8): from 2 ** -26 to 2 ** 5.9, at most 4.4% beside what is wanted. Keys that
differ by less than 1e-5, or by more than 1e4, are coded more coarsely."""
_TINY = torch.finfo(torch.bfloat16).tiny


class Codes(NamedTuple):
    """Coded keys of n groups: number d of group i is its node's plus (code - 1.5) * step(i) * channels[chunk of i, d].

    data uint8 (..., n, D / 4): number 4 b + j is in bits 2 j and 2 j + 1 of byte b. scale uint8 (..., n, 1): the steps,
    encoded (`encode_steps`).
    channels float8_e4m3fn (..., c, D): how far groups spread in each channel, one row for every n / c groups.
    """

    data: Tensor
    scale: Tensor
    channels: Tensor


def code_bytes(width: int, group_size: int, chunk_size: int) -> float:
    """Bytes a token of coded group keys: codes and a step a group, a row of channels a chunk."""
    return (width / NUMBERS_PER_BYTE + 1) / group_size + width / chunk_size


def check_codable(width: int) -> None:
    """ValueError unless rows of `width` numbers fill whole bytes."""
    if width % NUMBERS_PER_BYTE:
        raise ValueError(
            f"coded=True packs {NUMBERS_PER_BYTE} numbers a byte, and head_dim={width} is no multiple of "
            f"{NUMBERS_PER_BYTE}; use coded=False"
        )


def encode_differences(groups: Tensor, nodes: Tensor, chunks: int) -> Codes:
    """Code mean keys of groups (..., n, D) against those of their nodes (..., N, D), as the nodes are kept.

    A step a group alone fails where single channels dominate (docs/fidelity.md), so each is first divided by its
    spread over the chunk's groups. ValueError if D is no multiple of 4.
    """
    check_codable(groups.shape[-1])
    rest = groups.unflatten(-2, (nodes.shape[-2], -1)) - nodes[..., None, :]
    rest = rest.flatten(-3, -2).unflatten(-2, (chunks, -1))  # (..., c, n / c, D)
    spread = rest.square().mean(-2).sqrt()
    peak = spread.amax(-1, keepdim=True).clamp(min=_TINY)
    channels = (spread / peak * PEAK).clamp(LEAST, PEAK).float().to(torch.float8_e4m3fn)  # (..., c, D)
    even = rest / channels[..., None, :].to(rest.dtype)
    scale = encode_steps(even.square().mean(-1, keepdim=True).sqrt() * STEP)
    levels = ((even / decode_steps(scale, rest.dtype)).floor().clamp(-2, 1) + 2).to(torch.uint8)
    parts = levels.flatten(-3, -2).unflatten(-1, (-1, NUMBERS_PER_BYTE)).unbind(-1)
    data = parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6
    return Codes(data, scale.flatten(-3, -2), channels)


def decode_differences(codes: Codes, nodes: Tensor) -> Tensor:
    """Mean keys of groups (..., n, D) from their codes and their nodes' keys (..., N, D), in the nodes' type."""
    table = _levels_of_bytes(nodes.dtype, nodes.device)
    rest = table.index_select(0, codes.data.flatten().int()).view(*codes.data.shape[:-1], -1)  # (..., n, D)
    chunks = codes.channels.shape[-2]
    if chunks:
        rest.unflatten(-2, (chunks, -1)).mul_(codes.channels[..., None, :].to(nodes.dtype))
        by_node = rest.mul_(decode_steps(codes.scale, nodes.dtype)).unflatten(-2, (nodes.shape[-2], -1))
        by_node.add_(nodes[..., None, :])
    return rest


def encode_steps(steps: Tensor) -> Tensor:
    """The byte whose step is nearest, by its logarithm, to each positive number; to the least one for zero."""
    return (steps.log2() * STEPS_PER_OCTAVE + UNIT_STEP).round().clamp(0, 255).to(torch.uint8)


def decode_steps(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The steps of bytes, as `dtype`."""
    return ((codes.to(dtype) - UNIT_STEP) / STEPS_PER_OCTAVE).exp2()


@functools.lru_cache(maxsize=8)
def _levels_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The levels of the four numbers of each byte (256, 4): looking them up is the fastest way to unpack on a CPU."""
    shifts = torch.arange(0, 2 * NUMBERS_PER_BYTE, 2)
    return ((torch.arange(256)[:, None] >> shifts & 3) - 1.5).to(device, dtype)
