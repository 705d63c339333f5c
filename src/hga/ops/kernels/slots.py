"""A cache of archive groups beside the model: which slot holds which group, what to evict, what to copy."""

from __future__ import annotations

import triton
import triton.language as tl

from hga.ops.kernels.scores import COUNTS

AGES = tl.constexpr(64)  # older than this many steps counts as equally old


@triton.jit
def _list_groups(
    chosen,
    chosen_counts,
    listed,
    listed_stride,
    selector,
    keep,
    at,
    PER_NODE: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Archive groups of chosen columns; -1 for pending ones, which live in `near`, and behind the end."""
    count = tl.load(chosen_counts + selector)
    column = tl.load(chosen + at, mask=at < keep, other=-1)  # not masked by `count`: both are asked for at once
    archived = (column >= FIRST) & (at < count)
    unit = column - FIRST
    if PER_NODE > 0:
        node = tl.load(listed + selector.to(tl.int64) * listed_stride + unit // PER_NODE, mask=archived, other=0)
        unit = node * PER_NODE + unit % PER_NODE
    return tl.where(archived, unit, -1)


@triton.jit
def assign_kernel(
    chosen,
    chosen_stride,
    chosen_counts,
    listed,
    listed_stride,
    counts,
    slot_of,
    slot_of_stride,
    owner,
    used_at,
    slots,
    addresses,
    addresses_stride,
    places,
    sources,
    missing_groups,
    missing_places,
    missing_slots,
    missing_counts,
    traffic,
    kv_heads,
    keep,
    groups_per_chunk,
    group_bytes,
    SELECTORS: tl.constexpr,
    SLOTS_B: tl.constexpr,
    KEEP_B: tl.constexpr,
    PER_NODE: tl.constexpr,
    FIRST: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """A slot for every chosen group: its own where it is cached, else that of the least recently used group.

    places, int32 (selectors, chosen_stride): slot, -1 for pending groups. sources, int64 alike: 0, but if
    DIRECT the address in the store of what is missing. What is missing is listed, in the order chosen. traffic, int64
    (problems, 3): hits, misses, unique groups, all summed over steps.
    """
    problem = tl.program_id(0)
    row = problem // kv_heads
    step = tl.load(counts + row * COUNTS + 2)
    slot_of += problem.to(tl.int64) * slot_of_stride
    owner += problem * slots
    used_at += problem * slots
    missing_groups += problem * slots
    missing_places += problem * slots
    missing_slots += problem * slots
    s, at, t = tl.arange(0, SLOTS_B), tl.arange(0, KEEP_B), tl.arange(0, 4)
    traffic += problem * 3 + t
    before = tl.load(traffic, mask=t < 3, other=0)
    misses = 0
    hits = 0
    for head in range(SELECTORS):
        selector = problem * SELECTORS + head
        chosen_here = selector.to(tl.int64) * chosen_stride
        held = tl.load(owner + s, mask=s < slots, other=-1)  # long before it is used: all of this is latencies
        group = _list_groups(
            chosen + chosen_here, chosen_counts, listed, listed_stride, selector, keep, at, PER_NODE, FIRST
        )
        slot = tl.load(slot_of + group, mask=group >= 0, other=-1)
        missing = (group >= 0) & (slot < 0)
        if DIRECT:  # asked for beside the slot, before anything waits for that
            record = tl.load(addresses + row * addresses_stride + group // groups_per_chunk, mask=group >= 0, other=0)
        tl.store(used_at + slot, tl.zeros((KEEP_B,), tl.int32) + step, mask=slot >= 0)
        tl.store(places + chosen_here + at, slot, mask=(at < keep) & (missing == 0))
        source = tl.zeros((KEEP_B,), tl.int64)
        if DIRECT:
            inside = problem % kv_heads * groups_per_chunk + group % groups_per_chunk
            source = tl.where(missing, record + inside.to(tl.int64) * group_bytes, 0)
        tl.store(sources + chosen_here + at, source, mask=at < keep)
        rank = tl.cumsum(missing.to(tl.int32), 0) - 1
        tl.store(missing_groups + misses + rank, group, mask=missing)
        tl.store(missing_places + misses + rank, at, mask=missing)
        wanted = tl.max(rank, 0) + 1
        hits += tl.sum((slot >= 0).to(tl.int32), 0)
        tl.debug_barrier()
        if wanted > 0:
            age = step - tl.load(used_at + s, mask=s < slots, other=step)
            age = tl.maximum(tl.minimum(age, AGES - 1), 0)
            a = tl.arange(0, AGES)
            from_oldest = tl.cumsum(tl.histogram(age, AGES, mask=s < slots), 0, reverse=True)
            oldest = tl.max(tl.where(from_oldest >= wanted, a, 0), 0)
            left = wanted - tl.max(tl.where(a > oldest, from_oldest, 0), 0)  # less those older
            same = (age == oldest) & (s < slots)
            evicted = (age > oldest) | (same & (tl.cumsum(same.to(tl.int32), 0) <= left))
            # The first slot that is given up takes the first missing group. What was held and what is missing differ.
            turn = misses + tl.cumsum(evicted.to(tl.int32), 0) - 1
            taken = tl.load(missing_groups + turn, mask=evicted, other=0)
            place = tl.load(missing_places + turn, mask=evicted, other=0)
            tl.store(slot_of + held, tl.zeros((SLOTS_B,), tl.int32) - 1, mask=evicted & (held >= 0))
            tl.store(slot_of + taken, s, mask=evicted)
            tl.store(owner + s, taken, mask=evicted)
            tl.store(used_at + s, tl.zeros((SLOTS_B,), tl.int32) + step, mask=evicted)
            tl.store(places + chosen_here + place, s, mask=evicted)
            tl.store(missing_slots + turn, s, mask=evicted)
            misses += wanted
        if SELECTORS > 1:
            tl.debug_barrier()
    tl.store(missing_counts + problem, misses)
    unique = hits + misses
    if SELECTORS > 1:
        in_use = tl.load(used_at + s, mask=s < slots, other=-1) == step
        unique = tl.sum(in_use.to(tl.int32), 0)
    tl.store(traffic, before + tl.where(t == 0, hits, tl.where(t == 1, misses, unique)), mask=t < 3)


@triton.jit
def fetch_kernel(
    missing_groups,
    missing_slots,
    missing_counts,
    addresses,
    addresses_stride,
    cached,
    slots,
    kv_heads,
    groups_per_chunk,
    WORDS: tl.constexpr,
    WORDS_B: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BROUGHT: tl.constexpr,
):
    """Copy missing groups, WORDS int64 each, from the store (host memory read over the bus) to their slots.

    addresses: of each row's chunks; if BROUGHT, of each problem's missing groups, which lie one behind another.
    """
    problem = tl.program_id(0)
    row, head = problem // kv_heads, problem % kv_heads
    count = tl.load(missing_counts + problem)
    w = tl.arange(0, WORDS_B)
    for first in range(tl.program_id(1) * BLOCK, count, PROGRAMS * BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < count
        group = tl.load(missing_groups + problem * slots + at, mask=inside, other=0)
        slot = tl.load(missing_slots + problem * slots + at, mask=inside, other=0)
        if BROUGHT:
            record = tl.load(addresses + problem + tl.zeros_like(at), mask=inside, other=0)
            offset = at.to(tl.int64) * WORDS
            source = record.to(tl.pointer_type(tl.int64))
        else:
            record = tl.load(addresses + row * addresses_stride + group // groups_per_chunk, mask=inside, other=0)
            offset = (head * groups_per_chunk + group % groups_per_chunk).to(tl.int64) * WORDS
            source = tl.multiple_of(record.to(tl.pointer_type(tl.int64)), 16)
        mask = inside[:, None] & (w < WORDS)[None, :]
        words = tl.load(source[:, None] + offset[:, None] + w[None, :], mask=mask, other=0)
        target = (problem.to(tl.int64) * slots + slot) * WORDS
        tl.store(cached + target[:, None] + w[None, :], words, mask=mask)
