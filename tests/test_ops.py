"""Ordering, summaries, routing and merging on cases whose answer is known."""

import math

import pytest
import torch

from hga.ops.attention import FarField, Part, add_sinks, attend, attend_once, merge
from hga.ops.ordering import content_order
from hga.ops.precision import decode_rows, encode_rows, resolve_summary_dtype, row_bytes
from hga.ops.routing import NEVER, add_masses, bias, choose, count_steps, mark_largest, score, take_rows, unite
from hga.ops.summaries import mean_rows, mixed_rope_means


def test_content_order_puts_alike_tokens_into_one_group():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(8, 12, generator=generator, dtype=torch.float64)
    kind = torch.randperm(32, generator=generator) % 8  # four tokens of each kind, scattered
    keys = centres[kind] + 0.01 * torch.randn(32, 12, generator=generator, dtype=torch.float64)
    order = content_order(keys, torch.zeros(32, 12, dtype=torch.float64), 4)
    assert sorted(order.tolist()) == list(range(32))
    assert all(len(set(kind[group].tolist())) == 1 for group in order.view(8, 4))


def test_a_chunks_order_depends_on_that_chunk_alone():
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 5, 3, 64, 16, generator=generator)
    together = content_order(keys, values, 4)
    assert torch.equal(together[2, 1], content_order(keys[2, 1], values[2, 1], 4))
    assert torch.equal(together[:2], content_order(keys[:2], values[:2], 4))


def test_content_order_of_equal_rows_is_a_permutation():
    order = content_order(torch.ones(16, 4), torch.zeros(16, 4), 2)
    assert sorted(order.tolist()) == list(range(16))


def _rotate(rows: torch.Tensor, positions: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    half = theta.shape[0]
    angle = positions[:, None] * theta
    first, second = rows[..., :half], rows[..., half : 2 * half]
    turned = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
    return torch.cat([*turned, rows[..., 2 * half :]], -1)


def test_mixed_rope_mean_of_slow_pairs_is_the_mean_before_rope_rotated_once():
    generator = torch.Generator().manual_seed(2)
    theta = 10000.0 ** -(torch.arange(0, 8, dtype=torch.float64) / 8)
    before = torch.randn(64, 20, generator=generator, dtype=torch.float64)  # 16 rotary dimensions, 4 without
    positions = torch.arange(100, 164, dtype=torch.float64)
    stored = _rotate(before, positions, theta)
    mixed = mixed_rope_means(stored, 16, theta)
    middle = positions.view(4, 16).mean(1)
    averaged_first = _rotate(before.view(4, 16, 20).mean(1), middle, theta)
    slow = 15 * theta <= 0.5
    assert slow.any()
    assert not slow.all()
    pairs = torch.cat([slow, slow, torch.ones(4, dtype=torch.bool)])
    torch.testing.assert_close(mixed[:, pairs], averaged_first[:, pairs], rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed[:, ~pairs], mean_rows(stored, 16)[:, ~pairs], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "kv", "expected"),
    [
        ("auto", torch.float64, torch.float32),
        ("auto", torch.float32, torch.bfloat16),
        ("auto", torch.bfloat16, torch.float8_e4m3fn),
        ("auto", torch.float16, torch.float8_e4m3fn),
        ("model", torch.float16, torch.float16),
        ("fp8", torch.float64, torch.float8_e4m3fn),
    ],
)
def test_summary_types(name, kv, expected):
    assert resolve_summary_dtype(name, kv) == expected


def test_fp8_rows_keep_their_relative_precision_at_any_magnitude():
    rows = torch.randn(50, 32, generator=torch.Generator().manual_seed(3)) * torch.logspace(-12, 12, 50)[:, None]
    rows[7] = 0
    decoded = decode_rows(encode_rows(rows, torch.float8_e4m3fn), torch.float32)
    peak = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert torch.isfinite(decoded).all()
    assert ((decoded - rows).abs() / peak).max() < 2**-4
    assert row_bytes(32, torch.float8_e4m3fn) == 34


def test_choose_shared_adds_the_masses_of_the_heads():
    # Head 0 puts nearly all on unit 0, head 1 spreads over 1 and 2: together 0 first, then 1.
    scores = torch.tensor([[[[5.0, 0.0, 0.0, -1.0]], [[-5.0, 3.0, 2.5, 0.0]]]])
    assert choose(scores, 2, "shared").tolist() == [[[[True, True, False, False]]]]
    assert choose(scores, 2, "per_head")[0, 1, 0].tolist() == [False, True, True, False]


def test_choose_compares_masses_in_steps():
    """An eighth of an octave apart masses differ, within a step the lower column comes first."""
    mass = torch.tensor([16, 18, 17.9, 32, 33, 11.1], dtype=torch.float64) / 128
    assert count_steps(mass).tolist() == [448, 449, 448, 456, 456, 443]
    assert count_steps(torch.tensor([0.0, 2.0**-59, 2.0**-58])).tolist() == [0, 0, 8]
    assert count_steps(torch.tensor([31.9, 32.0, 1e9, torch.inf])).tolist() == [511] * 4
    for keep, expected in ((1, [3]), (2, [3, 4]), (3, [1, 3, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4])):
        assert choose(mass.log()[None, None, None], keep, "shared")[0, 0, 0].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("top", [0.0, 20.0, 40.0])
def test_choose_ranks_what_is_left_beside_one_that_holds_nearly_all(top):
    scores = torch.randn(1, 1, 1, 4096, generator=torch.Generator().manual_seed(0)) * 3
    scores[..., 7] = top
    exact = mark_largest(add_masses(scores, "shared"), 256)
    assert (choose(scores, 256, "shared") & exact).sum() > 240


def test_choose_never_marks_what_is_not_allowed_and_all_that_fits():
    scores = torch.tensor([[[[1.0, NEVER, -900.0, 2.0], [NEVER] * 4]]])
    assert choose(scores, 4, "shared")[0, 0].tolist() == [[True, False, True, True], [False] * 4]
    assert choose(scores, 3, "shared")[0, 0].tolist() == [[True, False, True, True], [False] * 4]
    assert not choose(scores, 0, "shared").any()


@pytest.mark.parametrize("selection", ["shared", "per_head"])
def test_choose_for_heads_beside_one_that_is_nan(selection):
    scores = torch.randn(1, 3, 2, 40, generator=torch.Generator().manual_seed(0))
    scores[0, 1, 0] = torch.nan
    chosen = choose(scores, 7, selection)
    healthy = chosen if selection == "shared" else chosen[:, ::2]
    assert (healthy.sum(-1) == 7).all()
    assert (chosen.sum(-1) <= 7).all()


def test_unite_reads_each_unit_once():
    chosen = torch.zeros(2, 1, 3, 6, dtype=torch.bool)
    chosen[0, 0, 0, [1, 4]] = chosen[0, 0, 1, [4, 5]] = chosen[1, 0, 2, [0]] = True
    ids, member = unite(chosen)
    assert ids[0].tolist() == [1, 4, 5]
    assert 0 in ids[1].tolist()
    assert ids[1].tolist() == sorted(set(ids[1].tolist()))
    rebuilt = torch.zeros_like(chosen).scatter(-1, ids[:, None, None].expand(2, 1, 3, 3), member)
    assert torch.equal(rebuilt, chosen)


def test_unite_of_equal_unions_and_of_nothing():
    chosen = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    assert [x.shape for x in unite(chosen)] == [(2, 0), (2, 1, 1, 0)]
    assert [x.shape for x in unite(chosen[..., :0])] == [(2, 0), (2, 1, 1, 0)]
    chosen[0, 0, 0, [4, 1]] = chosen[1, 0, 0, [0, 5]] = True
    ids, member = unite(chosen)
    assert ids.tolist() == [[1, 4], [0, 5]]
    assert member.all()


def test_bias_keeps_the_precision_of_its_value():
    added = bias(torch.tensor([[True, False]]), torch.float64, math.log(3))
    assert added.tolist() == [[NEVER, math.log(3)]]


def test_take_rows_and_score_and_softcap():
    rows = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(take_rows(rows, torch.tensor([[3, 0], [1, 1]])), torch.stack([rows[0, [3, 0]], rows[1, [1, 1]]]))
    query = torch.ones(2, 1, 1, 3)
    assert score(query, rows)[0, 0, 0].tolist() == [3.0, 12.0, 21.0, 30.0]
    capped = score(query, rows, softcap=5.0)[0, 0, 0, 3].item()
    assert capped == pytest.approx(5 * math.tanh(6))


def test_parts_merge_to_one_softmax_and_empty_parts_are_harmless():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 3, 5, 40, generator=generator, dtype=torch.float64) * 5
    values = torch.randn(2, 40, 8, generator=generator, dtype=torch.float64)
    logits[..., 10:20] = NEVER
    whole = torch.softmax(logits, -1) @ values[:, None]
    split = [Part(logits[..., a:b], values[:, a:b]) for a, b in ((0, 10), (10, 20), (20, 40))]
    torch.testing.assert_close(attend(split).value, whole, rtol=0, atol=1e-12)
    one, other = attend(split[:2]), attend(split[2:])
    torch.testing.assert_close(merge(one, other).value, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(merge(one, other).logsumexp[..., 0], torch.logsumexp(logits, -1), rtol=0, atol=1e-12)


def test_groups_of_a_node_share_its_value():
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(2, 3, 5, 12, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 4, 8, generator=generator, dtype=torch.float64)
    whole = attend_once([Part(logits, values.repeat_interleave(3, 1))])
    torch.testing.assert_close(attend_once([Part(logits, values, 3)]), whole, rtol=0, atol=1e-12)
    # Two nodes by their groups, two by themselves.
    nodes = torch.tensor([[1, 3], [0, 2]])
    node_logits = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    scored = torch.zeros(2, 4, dtype=torch.bool).scatter(1, nodes, True)[:, None, None]
    node_logits.masked_fill_(scored, NEVER)
    joined = torch.cat([logits[..., :6], node_logits], -1)
    weighed = torch.cat([take_rows(values, nodes).repeat_interleave(3, 1), values], 1)
    empty = Part(logits[..., :0], values[:, :0])
    far = FarField(node_logits, logits[..., :6].unflatten(-1, (2, 3)), nodes, values)
    torch.testing.assert_close(
        attend_once([empty], far), torch.softmax(joined, -1) @ weighed[:, None], rtol=0, atol=1e-12
    )


def test_learned_sinks_enter_the_sum_once():
    logits = torch.randn(2, 3, 4, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    values = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    sinks = torch.tensor([[0.5, 2.0, -1.0], [30.0, 0.0, 1.0]], dtype=torch.float64)
    joined = torch.cat([logits, sinks[:, :, None, None].expand(2, 3, 4, 1)], -1)
    expected = torch.softmax(joined, -1)[..., :-1] @ values[:, None]
    torch.testing.assert_close(add_sinks(attend([Part(logits, values)]), sinks), expected, rtol=0, atol=1e-12)
