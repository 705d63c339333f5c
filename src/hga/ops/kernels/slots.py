"""A cache of archive groups beside the model: which slot holds which group, what to evict, what to copy."""

from __future__ import annotations

import triton
import triton.language as tl

from hga.ops.kernels.scores import COUNTS

AGES = tl.constexpr(64)  # older than this many steps counts as equally old


@triton.jit
def _list_groups(
    chosen,
    chosen_stride,
    chosen_counts,
    listed,
    listed_stride,
    selector,
    first,
    BLOCK: tl.constexpr,
    PER_NODE: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Archive groups of a block of chosen columns; -1 for pending ones, which live in `near`, and behind the end."""
    at = first + tl.arange(0, BLOCK)
    count = tl.load(chosen_counts + selector)
    column = tl.load(chosen + selector.to(tl.int64) * chosen_stride + at, mask=at < count, other=-1)
    unit = column - FIRST
    if PER_NODE > 0:
        node = tl.load(listed + selector.to(tl.int64) * listed_stride + unit // PER_NODE, mask=column >= FIRST, other=0)
        unit = node * PER_NODE + unit % PER_NODE
    return tl.where(column >= FIRST, unit, -1)


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
    victims,
    addresses,
    addresses_stride,
    places,
    sources,
    missing_groups,
    missing_slots,
    missing_counts,
    traffic,
    kv_heads,
    keep,
    groups_per_chunk,
    group_bytes,
    SELECTORS: tl.constexpr,
    SLOTS_B: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_NODE: tl.constexpr,
    FIRST: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """A slot for every chosen group: its own where it is cached, else that of the least recently used group.

    places, int32 (selectors, chosen_stride): slot, -1 for pending groups. sources, int64 alike, if DIRECT: address of
    what is missing in the store, 0 for what is not. What is missing is listed for `fetch_kernel`. traffic, int64
    (problems, 3): hits, misses, unique groups, all summed over steps.
    """
    problem = tl.program_id(0)
    row = problem // kv_heads
    step = tl.load(counts + row * COUNTS + 2)
    slot_of += problem.to(tl.int64) * slot_of_stride
    owner += problem * slots
    used_at += problem * slots
    victims += problem * slots
    missing_groups += problem * slots
    missing_slots += problem * slots
    s = tl.arange(0, SLOTS_B)
    misses = 0
    hits = 0
    for head in range(SELECTORS):
        selector = problem * SELECTORS + head
        wanted = 0
        for first in range(0, keep, BLOCK):
            group = _list_groups(
                chosen, chosen_stride, chosen_counts, listed, listed_stride, selector, first, BLOCK, PER_NODE, FIRST
            )
            slot = tl.load(slot_of + group, mask=group >= 0, other=-1)
            tl.store(used_at + slot, tl.zeros((BLOCK,), tl.int32) + step, mask=slot >= 0)
            at = selector.to(tl.int64) * chosen_stride + first + tl.arange(0, BLOCK)
            tl.store(places + at, slot, mask=first + tl.arange(0, BLOCK) < keep)
            if DIRECT:
                missing = (group >= 0) & (slot < 0)
                chunk = addresses + row * addresses_stride + group // groups_per_chunk
                inside = problem % kv_heads * groups_per_chunk + group % groups_per_chunk
                source = tl.load(chunk, mask=missing, other=0) + inside.to(tl.int64) * group_bytes
                tl.store(sources + at, tl.where(missing, source, 0), mask=first + tl.arange(0, BLOCK) < keep)
            wanted += tl.sum(((group >= 0) & (slot < 0)).to(tl.int32), 0)
            hits += tl.sum((slot >= 0).to(tl.int32), 0)
        tl.debug_barrier()
        if wanted > 0:
            age = step - tl.load(used_at + s, mask=s < slots, other=step)
            age = tl.maximum(tl.minimum(age, AGES - 1), 0)
            a = tl.arange(0, AGES)
            from_oldest = tl.cumsum(tl.histogram(age, AGES, mask=s < slots), 0, reverse=True)
            oldest = tl.max(tl.where(from_oldest >= wanted, a, 0), 0)
            older = age > oldest
            same = (age == oldest) & (s < slots)
            left = wanted - tl.sum(older.to(tl.int32), 0)
            evicted = older | (same & (tl.cumsum(same.to(tl.int32), 0) <= left))
            tl.store(victims + tl.cumsum(evicted.to(tl.int32), 0) - 1, s, mask=evicted)
            gone = tl.load(owner + s, mask=evicted, other=-1)
            tl.store(slot_of + gone, tl.zeros((SLOTS_B,), tl.int32) - 1, mask=gone >= 0)
            tl.debug_barrier()
            taken = 0
            for first in range(0, keep, BLOCK):
                group = _list_groups(
                    chosen, chosen_stride, chosen_counts, listed, listed_stride, selector, first, BLOCK, PER_NODE, FIRST
                )
                at = selector.to(tl.int64) * chosen_stride + first + tl.arange(0, BLOCK)
                missing = (group >= 0) & (tl.load(places + at, mask=group >= 0, other=0) < 0)
                rank = taken + tl.cumsum(missing.to(tl.int32), 0) - 1
                slot = tl.load(victims + rank, mask=missing, other=0)
                tl.store(owner + slot, group, mask=missing)
                tl.store(used_at + slot, tl.zeros((BLOCK,), tl.int32) + step, mask=missing)
                tl.store(slot_of + group, slot, mask=missing)
                tl.store(places + at, slot, mask=missing)
                tl.store(missing_groups + misses + rank, group, mask=missing)
                tl.store(missing_slots + misses + rank, slot, mask=missing)
                taken += tl.sum(missing.to(tl.int32), 0)
            misses += wanted
        tl.debug_barrier()
    tl.store(missing_counts + problem, misses)
    in_use = tl.load(used_at + s, mask=s < slots, other=-1) == step
    tl.store(traffic + problem * 3, tl.load(traffic + problem * 3) + hits)
    tl.store(traffic + problem * 3 + 1, tl.load(traffic + problem * 3 + 1) + misses)
    tl.store(traffic + problem * 3 + 2, tl.load(traffic + problem * 3 + 2) + tl.sum(in_use.to(tl.int32), 0))


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
