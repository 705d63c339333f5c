"""Strict causality, freedom from blocks, and rewinding: properties of one row in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows import SMALL, dense, feed, new_row, random_sequence

from hga.config import HGAConfig

CONFIGS = {
    "one level": SMALL,
    "two levels": SMALL.replace(node_size=16, overselection=2),
    "coded": SMALL.replace(node_size=16, overselection=2, group_size=2, coded=True),
    "per head": SMALL.replace(selection="per_head"),
    "by position": SMALL.replace(ordering="position"),
    "no far field": SMALL.replace(far_field=False, node_size=8, overselection=2),
    "rounded summaries": SMALL.replace(summary_dtype="fp8"),
    "auto prefill": SMALL.replace(prefill="auto", budget_tokens=24),
    "dense below": SMALL.replace(dense_below=100),
    "large groups": SMALL.replace(group_size=8, node_size=8, window_tokens=13, sink_tokens=3, budget_tokens=41),
}

configs = st.sampled_from(sorted(CONFIGS))
lengths = st.integers(2, 330)
block_sizes = st.lists(st.integers(1, 150), min_size=1, max_size=4)
seeds = st.integers(0, 2**31)


@given(name=configs, tokens=lengths, blocks=block_sizes, seed=seeds, share=st.floats(0, 1))
def test_later_tokens_never_change_earlier_outputs(name, tokens, blocks, seed, share):
    first = random_sequence(tokens, seed)
    changed_from = int(share * (tokens - 1)) + 1
    second = random_sequence(tokens, seed)
    other = random_sequence(tokens, seed + 1)
    for field in ("query", "key", "value"):
        getattr(second, field)[..., changed_from:, :] = getattr(other, field)[..., changed_from:, :]
    rows = [new_row(CONFIGS[name])[0] for _ in range(2)]
    outputs = [feed(row, sequence, 0, tokens, blocks) for row, sequence in zip(rows, (first, second), strict=True)]
    torch.testing.assert_close(outputs[0][:, :, :changed_from], outputs[1][:, :, :changed_from], rtol=0, atol=1e-11)


@given(name=configs, tokens=lengths, blocks=block_sizes, seed=seeds)
def test_blocks_do_not_matter(name, tokens, blocks, seed):
    sequence = random_sequence(tokens, seed)
    whole = feed(new_row(CONFIGS[name])[0], sequence, 0, tokens)
    parts = feed(new_row(CONFIGS[name])[0], sequence, 0, tokens, blocks)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_prefill_gives_what_decode_gives(name):
    sequence = random_sequence(300, 7)
    together = feed(new_row(CONFIGS[name])[0], sequence, 0, 300)
    one_by_one = feed(new_row(CONFIGS[name])[0], sequence, 0, 300, [1])
    torch.testing.assert_close(one_by_one, together, rtol=0, atol=1e-11)


@given(name=configs, tokens=lengths, blocks=block_sizes, seed=seeds, share=st.floats(0, 1))
def test_cropping_equals_never_having_fed(name, tokens, blocks, seed, share):
    kept = int(share * tokens)
    sequence, wrong, more = random_sequence(tokens, seed), random_sequence(tokens, seed + 1), 70
    for field in ("query", "key", "value"):
        getattr(wrong, field)[..., :kept, :] = getattr(sequence, field)[..., :kept, :]
    rest = random_sequence(tokens + more, seed + 2)
    cropped, opened = new_row(CONFIGS[name])
    feed(cropped, wrong, 0, tokens, blocks)
    cropped.crop(kept)
    fresh, fresh_opened = new_row(CONFIGS[name])
    if kept:
        feed(fresh, sequence, 0, kept)
    after = [feed(row, rest, kept, tokens + more) for row in (cropped, fresh)]
    torch.testing.assert_close(after[0], after[1], rtol=0, atol=1e-11)
    assert cropped.chunks == fresh.chunks
    if fresh_opened:
        assert opened["store"].held_bytes() == fresh_opened["store"].held_bytes()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_full_budget_equals_dense_and_a_small_one_does_not(name):
    sequence = random_sequence(320, 3)
    changes = {"overselection": 64} if CONFIGS[name].two_level else {}
    full = CONFIGS[name].replace(budget_tokens=512, **changes)
    row, opened = new_row(full.replace(prefill="routed", dense_below=0))
    torch.testing.assert_close(feed(row, sequence, 0, 320), dense(sequence), rtol=0, atol=1e-12)
    assert row.chunks > 4
    assert opened["store"].held_bytes()["ram"] > 0
    small = feed(new_row(CONFIGS[name].replace(prefill="routed", dense_below=0))[0], sequence, 0, 320)
    assert (small - dense(sequence)).abs().max() > 1e-3


def test_exact_prefill_is_dense_and_decode_behind_it_is_routed():
    sequence = random_sequence(320, 5)
    exact = SMALL.replace(prefill="exact")
    row, _ = new_row(exact)
    torch.testing.assert_close(feed(row, sequence, 0, 256, [100]), dense(sequence)[:, :, :256], rtol=0, atol=1e-12)
    assert row.chunks > 4
    decoded = feed(row, sequence, 256, 320, [1])
    routed = feed(new_row(SMALL)[0], sequence, 0, 320)[:, :, 256:]
    torch.testing.assert_close(decoded, routed, rtol=0, atol=1e-11)


def test_nothing_opened_is_the_estimate_from_summaries():
    """budget = sink + window: every archived token takes part through its group's mean, and through it alone."""
    config = SMALL.replace(ordering="position", budget_tokens=16)
    sequence = random_sequence(200, 11)
    out = feed(new_row(config)[0], sequence, 0, 200)[:, :, -1]
    position, size = 199, config.group_size
    window = 4 + -(-(position - config.window_tokens + 1 - 4) // size) * size
    keys = [
        sequence.key[:, :4],
        sequence.key[:, 4:window].unflatten(1, (-1, size)).mean(2),
        sequence.key[:, window:],
    ]
    values = [
        sequence.value[:, :4],
        sequence.value[:, 4:window].unflatten(1, (-1, size)).mean(2),
        sequence.value[:, window:],
    ]
    weight = torch.cat(
        [torch.ones(4), torch.full(((window - 4) // size,), float(size)), torch.ones(200 - window)]
    ).double()
    scores = torch.einsum("hrd,hnd->hrn", sequence.query[:, :, -1], torch.cat(keys, 1)) / 4
    share = torch.softmax(scores + weight.log(), -1)
    torch.testing.assert_close(out, torch.einsum("hrn,hnd->hrd", share, torch.cat(values, 1)), rtol=0, atol=1e-12)


def test_forks_share_chunks_and_go_their_own_ways():
    sequence, other = random_sequence(400, 1), random_sequence(400, 2)
    row, opened = new_row(SMALL)
    feed(row, sequence, 0, 200)
    before = opened["store"].held_bytes()
    beam = row.fork()
    assert opened["store"].held_bytes() == before
    continued = feed(row, sequence, 200, 400, [1])
    feed(beam, other, 200, 400, [1])
    fresh, _ = new_row(SMALL)
    torch.testing.assert_close(continued, feed(fresh, sequence, 0, 400)[:, :, 200:], rtol=0, atol=1e-11)
    row.release()
    beam.release()
    assert opened["store"].held_bytes() == {"ram": 0}


@pytest.mark.parametrize("preset", ["balanced", "fidelity", "lean", "contiguous"])
def test_attended_tokens_never_exceed_the_budget(preset):
    config = HGAConfig.preset(preset, budget_tokens=128, prefill="routed", chunk_size=64)
    sequence = random_sequence(700, 9)
    row, _ = new_row(config)
    feed(row, sequence, 0, 640)
    row._counters.reset()
    feed(row, sequence, 640, 700, [1])
    mean_context = sum(range(641, 701)) / 60
    assert 0 < row._counters.attended / row._counters.queries * mean_context <= 128.5
    assert row._counters.fetched >= row._counters.attended
