"""Triton kernels that mark, for each query of a strip, the candidates with the largest masses; what R heads marked."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga.ops.kernels.candidates import Chosen
from hga.ops.kernels.strips import Strips

_MOST_HELD = 16384  # 128 registers of each thread
_MARKED_AT_ONCE = 8192


def mark_largest(mass: Tensor, counts: Tensor, keep: int, pending_width: int, chosen: Chosen) -> None:
    """Mark the `keep` largest masses of each query, of equal ones the lower columns: to `chosen`.

    mass, int16 (S, H, queries, W), in whole steps: of `pending_width` pending groups, then of archive columns, of
    which there are counts, int32 (S, H); below 0 where a query may not choose.
    """
    strips, heads, queries, width = mass.shape
    limits = torch.empty((2, strips, heads, queries), dtype=torch.int32, device=mass.device)
    # A query a program where they run side by side; all at once where they are interpreted.
    lines = 1 if mass.device.type == "cuda" else queries
    block = min(_MOST_HELD, max(4096, triton.next_power_of_2(width - pending_width)))
    _limit_kernel[(queries // lines, strips * heads)](
        mass,
        counts,
        limits[0],
        limits[1],
        width,
        pending_width,
        keep,
        QUERIES=queries,
        LINES=lines,
        PENDING=max(16, triton.next_power_of_2(pending_width)),
        BLOCK=block,
        num_warps=4,
    )
    _mark_kernel[(strips * heads,)](
        mass,
        counts,
        limits[0],
        limits[1],
        *chosen,
        width,
        pending_width,
        QUERIES=queries,
        BLOCK=max(64, _MARKED_AT_ONCE // queries),
        num_warps=8,
    )


def count_unions(
    strips: Strips,
    start: int,
    opened: Chosen,
    counts: Tensor,
    within: tuple[Chosen, int] | None,
    groups: int,
    into: Tensor,
) -> None:
    """How many groups the heads of a KV head opened between them, for each query of the strips from `start` on.

    counts int32 (S, H): archive columns of these strips. within: the chosen nodes, and groups a node, where a column is
    a group of a chosen node. groups: of the archive. into: int32 (Hkv, T), of which the strips' part is written.
    """
    queries, pending = strips.constants["QUERIES"], strips.constants["PENDING_WIDTH"]
    number, heads, width = opened.words.shape
    repeats = heads // into.shape[0]
    column = torch.arange(width, device=into.device)
    archived = (column - pending).clamp(min=0)
    union = opened.words.new_zeros(number, into.shape[0], pending + groups + 1)  # the last takes what is no column
    for head in range(repeats):
        words = opened.words[:, head::repeats]  # (S, Hkv, W)
        real = column < pending + counts[:, head::repeats, None]  # what follows the last column was never written
        place = column
        if within is not None:
            nodes, per_node = within
            node = nodes.listed[:, head::repeats].gather(-1, (archived // per_node).where(real, 0))
            place = torch.where(column < pending, column, pending + node * per_node + archived % per_node)
        place = torch.where(real, place, pending + groups)
        union.scatter_(-1, place, union.gather(-1, place) | words)
    union = union[..., :-1]
    found = torch.stack([(union >> lane & 1).sum(-1) for lane in range(queries)], -1)  # (S, Hkv, queries)
    found = found.transpose(0, 1).flatten(1)
    first = (strips.first // queries + start) * queries - strips.first  # a block may begin and end within a strip
    begin, end = max(0, first), min(into.shape[1], first + number * queries)
    into[:, begin:end] = found[:, begin - first : end - first]


@triton.jit(do_not_specialize=("keep",))
def _limit_kernel(
    mass,
    counts,
    limits,
    ties,
    mass_width,
    pending_width,
    keep,
    QUERIES: tl.constexpr,
    LINES: tl.constexpr,
    PENDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mass, in steps, from which a query chooses; and the column before which it takes masses of a step less."""
    strip = tl.program_id(1).to(tl.int64)
    place = strip * QUERIES + tl.program_id(0) * LINES + tl.arange(0, LINES)
    width = pending_width + tl.load(counts + strip)
    column = pending_width + tl.arange(0, BLOCK)
    rows = mass + place[:, None] * mass_width
    # What is loaded here stays in registers: of most rows it is all.
    pending = _load(rows, tl.arange(0, PENDING), pending_width)
    archived = _load(rows, column, width)
    allowed = _count(pending, archived, tl.zeros([LINES], tl.int32))
    highest = tl.maximum(tl.max(pending, 1), tl.max(archived, 1))
    for start in range(BLOCK, width - pending_width, BLOCK):
        steps = _load(rows, start + column, width)
        allowed += tl.sum((steps >= 0).to(tl.int32), 1)
        highest = tl.maximum(highest, tl.max(steps, 1))
    # More than `keep` masses are at least `low`; `above`, at most `keep`, are at least `high`.
    few = allowed <= keep
    low = tl.zeros([LINES], tl.int32)
    high = tl.where(few, 0, highest + 1)
    above = tl.where(few, keep, 0)
    searching = (high - low > 1) & (above < keep)
    while tl.max(searching.to(tl.int32), 0) > 0:
        middle = low + (high - low) // 2
        found = _count(pending, archived, middle)
        for start in range(BLOCK, width - pending_width, BLOCK):
            found += tl.sum((_load(rows, start + column, width) >= middle[:, None]).to(tl.int32), 1)
        many = found > keep
        low = tl.where(searching & many, middle, low)
        high = tl.where(searching & ~many, middle, high)
        above = tl.where(searching & ~many, found, above)
        searching = (high - low > 1) & (above < keep)
    cut = tl.zeros([LINES], tl.int32)
    missing = keep - above
    if tl.max(missing, 0) > 0:  # equal masses at the limit: the lower columns first
        missing, cut = _find_cut(pending, tl.arange(0, PENDING), low, missing, cut)
        missing, cut = _find_cut(archived, column, low, missing, cut)
        for start in range(BLOCK, width - pending_width, BLOCK):
            missing, cut = _find_cut(_load(rows, start + column, width), start + column, low, missing, cut)
    tl.store(limits + place, high)
    tl.store(ties + place, cut)


@triton.jit
def _count(pending, archived, least):
    """How many of each line's masses are at least `least` (LINES,)."""
    return tl.sum((pending >= least[:, None]).to(tl.int32), 1) + tl.sum((archived >= least[:, None]).to(tl.int32), 1)


@triton.jit
def _find_cut(steps, column, low, missing, cut):
    """Where among some columns the last missing one of those at `low` is: what is missing behind them, and `cut`."""
    equal = (steps == low[:, None]).to(tl.int32)
    rank = tl.cumsum(equal, 1)
    last = (equal == 1) & (rank == missing[:, None])
    return missing - tl.max(rank, 1), tl.maximum(cut, tl.max(tl.where(last, column[None, :] + 1, 0), 1))


@triton.jit
def _load(rows, column, width):
    """Masses (LINES, N) of some columns, negative where there is none."""
    return tl.load(rows + column[None, :], mask=(column < width)[None, :], other=-1).to(tl.int32)


@triton.jit
def _mark_kernel(
    mass,
    counts,
    limits,
    ties,
    words,
    listed,
    listed_counts,
    width,
    pending_width,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A strip's choices: a word a candidate with a bit for each query, and the archive columns that any query chose."""
    line = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, QUERIES)
    limit = tl.load(limits + line * QUERIES + lane)[:, None]
    cut = tl.load(ties + line * QUERIES + lane)[:, None]
    rows = mass + (line * QUERIES + lane)[:, None] * width
    end = pending_width + tl.load(counts + line)
    found = tl.zeros([], tl.int32)
    for start in range(0, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < end
        steps = _load(rows, column, end)
        chosen = (steps >= 0) & ((steps >= limit) | ((steps == limit - 1) & (column[None, :] < cut)))
        word = tl.sum(chosen.to(tl.int64) << lane[:, None].to(tl.int64), 0)
        tl.store(words + line * width + column, word, mask=inside)
        some = inside & (word != 0) & (column >= pending_width)
        rank = found + tl.cumsum(some.to(tl.int32), 0) - 1
        tl.store(listed + line * width + rank, column - pending_width, mask=some)
        found += tl.sum(some.to(tl.int32), 0)
    tl.store(listed_counts + line, found)
