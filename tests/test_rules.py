"""Other systems' rules: cases known by hand, full budgets, strict causality, counts; and our own rule among them."""

import dataclasses
import itertools

import pytest
import torch
from families import ALL, build
from frontier import BASES, Variant, recode
from simulation import simulate
from tiny_model import tiny_model
from transformers import DynamicCache

from hga.config import HGAConfig
from hga.evals.nll import evaluate_nll
from hga.evals.rule import check_rules, open_rule
from hga.evals.rules import routed
from hga.evals.rules.fixed import RandomGroups, SinksAndWindow
from hga.evals.rules.infllm import InfLLMRule
from hga.evals.rules.oracle import OracleTokens
from hga.evals.rules.paper import PaperRule
from hga.evals.rules.quantised import QuantisedRule, quantise
from hga.evals.rules.quest import QuestRule
from hga.evals.rules.retroinfer import RetroInferRule
from hga.evals.rules.routed import RoutedRule
from hga.evals.rules.shadowkv import ShadowKVRule
from hga.evals.rules.tile import cut_tiles
from hga.ops.routing import add_masses, mark_largest

BUDGETED = {
    "paper": (PaperRule, {}),
    "paper, leaking": (PaperRule, {"leaking": True}),
    "quest": (QuestRule, {}),
    "shadowkv": (ShadowKVRule, {}),
    "infllm": (InfLLMRule, {}),
    "retroinfer": (RetroInferRule, {"segment_size": 64}),
    "window": (SinksAndWindow, {}),
    "random": (RandomGroups, {}),
    "oracle": (OracleTokens, {}),
}
WITH_TURNS = ("paper", "quest", "shadowkv", "infllm", "oracle")


def make(name, budget, **changes):
    rule, own = BUDGETED[name]
    return rule(budget_tokens=budget, **own | changes)


def sequence(tokens, heads=2, repeats=3, width=16):
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = (
        torch.randn(n, tokens, width, generator=generator, dtype=torch.float64) for n in (heads * repeats, heads, heads)
    )
    return query * 2, key, value


FREQUENCIES = 10000.0 ** -(torch.arange(0, 16, 2) / 16)


def attend(rule, query, key, value, cuts=(), scale=0.25):
    """Outputs (Hq, T, D) and the exact masks, one a tile, of a sequence fed in blocks."""
    notes, outputs, masks = {}, [], []
    edges = [0, *cuts, query.shape[1]]
    for first, last in itertools.pairwise(edges):
        for tile in cut_tiles(query[:, first:last], key[:, :last], value[:, :last], scale, FREQUENCIES, notes):
            rule.observe(tile)
            attended = rule.attend(tile)
            outputs.append(attended.out)
            masks.append(attended.exact)
    return torch.cat(outputs, 2).flatten(0, 1), masks


def dense(query, key, value, scale=0.25):
    return torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=True
    )[0]


@pytest.mark.parametrize("selection", ["shared", "per_head", "in_turn"])
@pytest.mark.parametrize("name", BUDGETED)
def test_a_full_budget_is_dense(name, selection):
    if selection == "in_turn" and name not in WITH_TURNS:
        selection = "shared"
    given = sequence(333)
    out, masks = attend(make(name, 1000, selection=selection), *given)
    torch.testing.assert_close(out, dense(*given), rtol=0, atol=1e-10)
    assert all(mask.sum() > 0 for mask in masks)


@pytest.mark.parametrize("selection", ["shared", "per_head", "in_turn"])
@pytest.mark.parametrize("name", BUDGETED)
def test_the_budget_holds_and_is_used(name, selection):
    if selection == "in_turn" and name not in WITH_TURNS:
        selection = "shared"
    budget = 160
    rule = make(name, budget, selection=selection)
    _, masks = attend(rule, *sequence(500))
    attended = torch.cat([mask.sum(-1).amax((0, 1)) for mask in masks])
    fetched = torch.cat([mask.any(1).sum(-1).amax(0) for mask in masks])
    assert attended.max() <= budget
    # Units, their grid and the estimated zone leave a part of the budget unused, but not more.
    assert attended[-100:].min() > (budget - 36 - 16 - 33 if name == "retroinfer" else budget - 48)
    if selection == "per_head" and name in WITH_TURNS:
        assert fetched.max() > budget
    if selection != "per_head":
        assert torch.equal(attended, fetched)


@pytest.mark.parametrize("name", [*BUDGETED, "quantised", "hga"])
def test_later_tokens_do_not_matter(name):
    """The strict rules: everything behind position 300 replaced, and the same blocks cut elsewhere."""
    if name == "quantised":
        rule = QuantisedRule(bits=2, group_size=32)
    elif name == "hga":
        rule = RoutedRule.of(HGAConfig(budget_tokens=128, chunk_size=64))
    else:
        rule = make(name, 128)
    given = sequence(400)
    out, _ = attend(rule, *given)
    generator = torch.Generator().manual_seed(3)
    changed = []
    for x in given:
        later = torch.randn(x[:, 300:].shape, generator=generator, dtype=x.dtype) * 3
        changed.append(torch.cat([x[:, :300], later], 1))
    other, _ = attend(rule, *changed)
    same = torch.isclose(out[:, :300], other[:, :300], rtol=0, atol=1e-12).all(-1).all(0)
    if name == "paper, leaking":
        assert not same[256:].all()  # the tile of 300
        assert same[:256].all()
        return
    assert same.all()
    blocks, _ = attend(rule, *given, cuts=(37, 64, 200))
    torch.testing.assert_close(blocks, out, rtol=0, atol=1e-12)


def one_head(keys, query, tokens=None, values=None):
    """A sequence of one head whose last query is `query`; keys are those given, then zeros."""
    keys = torch.tensor(keys, dtype=torch.float64)
    tokens = tokens or len(keys)
    key = torch.zeros(1, tokens, keys.shape[1], dtype=torch.float64)
    key[0, : len(keys)] = keys
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if values is not None:
        value = values
    queries = torch.zeros_like(key)
    queries[0, -1] = torch.tensor(query, dtype=torch.float64)
    return queries, key, value


def opened(rule, given):
    """Token ids that the last query attends to."""
    _, masks = attend(rule, *given, scale=1.0)
    return masks[-1][0, 0, -1].nonzero()[:, 0].tolist()


SMALL = {"sink_tokens": 0, "window_tokens": 4}


def test_quest_opens_the_page_with_the_highest_bound():
    # Page 0's bound with (1, 1) is 3 + 3, though no key of it scores more than 3; page 1's is 2 + 2, and it scores 4.
    keys = [(3, 0), (0, 3), (0, 0), (0, 0), (2, 2), (2, 2), (2, 2), (2, 2), (1, 1), (1, 1), (1, 1), (1, 1)]
    given = one_head(keys, (1, 1), 16)
    assert opened(QuestRule(budget_tokens=8, page_size=4, **SMALL), given) == [0, 1, 2, 3, 12, 13, 14, 15]
    assert opened(OracleTokens(budget_tokens=8, **SMALL), given) == [4, 5, 6, 7, 12, 13, 14, 15]
    # A negative query meets the least keys: page 2 has bound -1 - 1, page 0 has 0.
    assert opened(QuestRule(budget_tokens=8, page_size=4, **SMALL), one_head(keys, (-1, -1), 16))[:4] == [0, 1, 2, 3]


def test_the_paper_routes_by_means_and_through_chunks():
    # Group 0 holds the best key (4), group 1 the best mean (2); chunk 1 (groups 2, 3) has a better mean than chunk 0.
    keys = [(4, 0), (-4, 0), (2, 0), (2, 0), (1.9, 0), (1.9, 0), (1.8, 0), (1.8, 0), (0, 0), (0, 0), (0, 0), (0, 0)]
    rule = PaperRule(budget_tokens=4, group_size=2, chunk_size=4, overselection=1, sink_tokens=0, window_tokens=2)
    # Slow pairs are turned to the middle, which moves a mean little here: no rotation at all is simplest.
    queries, key, value = one_head(keys, (1, 0), 14)
    tiles = list(cut_tiles(queries, key, value, 1.0, None, {}))
    chosen = rule.attend(tiles[-1]).exact[0, 0, -1].nonzero()[:, 0].tolist()
    assert chosen == [4, 5, 12, 13]
    one_level = dataclasses.replace(rule, overselection=99)
    assert one_level.attend(tiles[-1]).exact[0, 0, -1].nonzero()[:, 0].tolist() == [2, 3, 12, 13]


def test_shadowkv_keeps_outliers_open():
    # Chunk 1's keys point apart, so its landmark says nothing; chunk 0 wins by its landmark.
    keys = [(2, 0)] * 4 + [(9, 0), (-9, 0), (9, 0), (-9, 0.1)] + [(1, 0)] * 4
    rule = ShadowKVRule(budget_tokens=12, chunk_size=4, outlier_share=0.5, **SMALL)
    assert rule.outliers == 1
    assert opened(rule, one_head(keys, (1, 0), 16)) == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]
    without = dataclasses.replace(rule, outlier_share=0.0)
    assert opened(without, one_head(keys, (1, 0), 16)) == [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15]
    assert rule.metadata_share(16, 1024) == pytest.approx(1 / 8 + 4 / 1024)


def test_infllm_scores_a_block_by_what_later_queries_asked_for():
    # Each block has one key along x and one along y. Queries behind block 0 ask along y, those behind block 1 along x.
    keys = [(5, 0), (0, 5), (5, 0), (0, 5)]
    queries, key, value = one_head(keys, (1, 0), 8)
    queries[0, 1:3] = torch.tensor([0.0, 1.0])
    queries[0, 3:5] = torch.tensor([1.0, 0.0])
    rule = InfLLMRule(budget_tokens=4, block_size=2, representatives=1, sink_tokens=0, window_tokens=2)
    notes = {}
    (tile,) = cut_tiles(queries, key, value, 1.0, None, notes)
    rule.observe(tile)
    chosen = rule.attend(tile).exact[0, 0, -1].nonzero()[:, 0].tolist()
    torch.testing.assert_close(notes["representatives"][0, :2], torch.tensor([[0.0, 5.0], [5.0, 0.0]]).double())
    assert chosen == [2, 3, 6, 7]


def test_retroinfer_clusters_by_direction_and_estimates_identical_keys_exactly():
    # Two kinds of keys take turns; clusters of 4 by direction are pure, so that their estimation is exact.
    kinds = torch.tensor([[3.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    keys = kinds[torch.arange(8) % 2]
    values = torch.zeros(1, 13, 2, dtype=torch.float64)
    values[0, :8] = keys * 2
    given = one_head(keys.tolist(), (1, 0), 13, values)
    rule = RetroInferRule(budget_tokens=8, cluster_size=4, segment_size=8, estimated_share=1.0, **SMALL)
    query, key, value = given
    (tile,) = cut_tiles(query[:, -1:], key, value, 1.0, None, {})
    attended = rule.attend(tile)
    assert attended.exact[0, 0, -1].nonzero()[:, 0].tolist() == [12]
    torch.testing.assert_close(attended.out[0, :, -1], dense(*given, scale=1.0)[:, -1], rtol=0, atol=1e-12)
    assert attended.estimated[0, 0, -1] == 3  # the last one: tokens 8 to 11, by position
    half = dataclasses.replace(rule, estimated_share=0.0).attend(dataclasses.replace(tile, notes={}))
    assert half.exact[0, 0, -1].nonzero()[:, 0].tolist() == [0, 2, 4, 6, 12]
    assert half.estimated[0, 0, -1] == 0


def test_fixed_rules_by_hand():
    given = one_head([(1, 0)], (1, 0), 40)
    rule = SinksAndWindow(budget_tokens=10, sink_tokens=3, window_tokens=2)
    assert opened(rule, given) == [0, 1, 2, *range(33, 40)]
    drawn = RandomGroups(budget_tokens=20, group_size=4, **SMALL)
    assert opened(drawn, given) == opened(drawn, given)
    assert len(opened(drawn, given)) == 20
    _, masks = attend(drawn, *sequence(200))
    assert not torch.equal(masks[-1][0], masks[-1][1])  # KV heads draw for themselves


def test_oracle_recalls_more_than_any_rule_of_its_budget():
    given = sequence(400)
    *_, tile = cut_tiles(*given, 0.25, FREQUENCIES, {})
    mass = torch.softmax(tile.logits, -1)
    best = make("oracle", 128, selection="per_head").attend(tile).exact
    recalled = (mass * best).sum(-1)
    for name in BUDGETED:
        rule = make(name, 128, selection="per_head")
        last = attend(rule, *given)[1][-1]
        assert ((mass * last).sum(-1) <= recalled + 1e-12).all(), name


def test_heads_take_turns():
    rule = QuestRule(budget_tokens=80, selection="in_turn")
    # Heads rank units 0 1 2 3 and 1 3 0 2: in turn they name 0, 1, (1), 3, 2.
    scores = torch.tensor([[[[4.0, 3.0, 2.0, 1.0]], [[2.0, 4.0, 1.0, 3.0]]]])
    marks = [rule.choose(scores, keep)[0, 0, 0].int().tolist() for keep in (1, 2, 3, 4)]
    assert marks == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]]


def test_quantised_by_hand():
    rows = torch.tensor([0.0, 1.4, 1.6, 3.0])
    torch.testing.assert_close(quantise(rows, 2, 0), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    torch.testing.assert_close(quantise(rows, 8, 0), rows, rtol=0, atol=3 / 255 / 2 + 1e-6)
    flat = torch.full((4,), 2.5)
    torch.testing.assert_close(quantise(flat, 2, 0), flat)
    rule = QuantisedRule(bits=2)
    assert rule.metadata_share(128, 1000) == pytest.approx(2.5 / 16)
    assert rule.metadata_share(32, 1000) == pytest.approx((2 + (0.5 + 1.0) / 2) / 16)
    assert (rule.sink_tokens, rule.window_tokens) == (16, 64)


def test_quantised_loses_less_with_more_bits_and_keeps_the_window():
    given = sequence(300)
    errors = [(attend(QuantisedRule(bits=bits), *given)[0] - dense(*given)).norm().item() for bits in (2, 4, 8)]
    assert errors[0] > 3 * errors[1] > 30 * errors[2] > 0
    short = sequence(140)  # 16 + 64 + 60: no group of 64 has left the window
    torch.testing.assert_close(attend(QuantisedRule(bits=2), *short)[0], dense(*short), rtol=0, atol=1e-12)


@pytest.mark.parametrize("preset", ["balanced", "fidelity", "lean", "contiguous", "paper"])
def test_our_rule_is_the_simulation(preset):
    changes = {"budget_tokens": 704} if preset == "paper" else {"budget_tokens": 128, "chunk_size": 64}
    if preset not in ("paper", "contiguous"):
        changes["overselection"] = 2
    config = HGAConfig.preset(preset, prefill="routed", summary_dtype="fp8", **changes)
    given = sequence(1100, 2, 2)
    out, _ = attend(RoutedRule.of(config), *given, cuts=(199,))
    oracle = simulate(config, *given, 0.25, FREQUENCIES if preset == "paper" else None)
    torch.testing.assert_close(out, oracle, rtol=0, atol=1e-12)


VARIANTS = {
    **{name: fields for name, fields in BASES.items() if name in ("g4", "n16", "b2", "k2", "t2", "t1")},
    "head": {"vote": "head"},
    "turns": {"vote": "turns", "value_code": "w3"},
    "pool": {"vote": "max", "pool": "layer", "gain": "both", "key_code": "h3t"},
    "top p": {"vote": "global", "top_p": 0.6},
}


def variant(name, budget):
    fields = {"chunk_size": 64} | VARIANTS[name] | {"budget_tokens": budget}
    return Variant(**fields | ({"overselection": 2} if "overselection" in fields else {}))


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_strictly_causal_and_keep_the_budget(name):
    given = sequence(333)
    out, masks = attend(variant(name, 96), *given)
    other, _ = attend(variant(name, 96), *(torch.cat([x[:, :250], -x[:, 250:] * 2], 1) for x in given))
    torch.testing.assert_close(other[:, :250], out[:, :250], rtol=0, atol=1e-12)
    attended = torch.cat([mask.sum(-1).double().mean(0).amax(0) for mask in masks])  # heads may share in a pool
    assert 60 < attended.max() <= 96
    assert (out - dense(*given)).norm() > 0.1
    if name != "top p":
        full, _ = attend(variant(name, 1000), *given)
        torch.testing.assert_close(full, dense(*given), rtol=0, atol=1e-10)


def test_variants_start_from_rules_of_hga(monkeypatch):
    """But for masses in whole steps, which variants of other choices have none of."""
    monkeypatch.setattr(routed, "choose", lambda scores, keep, kind: mark_largest(add_masses(scores, kind), keep))
    given = sequence(700)
    plain = HGAConfig(sink_tokens=16, window_tokens=64, budget_tokens=128, coded=False)
    for base, changes in (
        ("g4", {"group_size": 4, "node_size": 4, "overselection": "all"}),
        ("n32", {"group_size": 8, "node_size": 32, "overselection": 4}),
    ):
        config = plain.replace(**changes)
        expected, _ = attend(RoutedRule.of(config), *given)
        fields = BASES[base] | {"budget_tokens": 128} | ({} if base == "g4" else {"overselection": 4})
        out, _ = attend(Variant(**fields), *given)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        assert Variant(**fields).metadata_share(64, 0) >= RoutedRule.of(config).metadata_share(64, 0)


@pytest.mark.parametrize("code", ["h", "n", "w"])
def test_coded_summaries_lose_less_with_more_bits(code):
    rows = sequence(512, 2, 1, 64)[1].view(2, 2, 256, 64) * torch.linspace(0.1, 3, 64) + 5
    rows = rows.unflatten(2, (-1, 4)).mean(3)
    errors = [
        (recode(rows, f"{code}{bits}", 4) - rows).norm() / (rows - rows.mean(2, True)).norm() for bits in (1, 2, 4)
    ]
    # A normal variable's least error is 0.60, 0.34 and 0.107 of its spread.
    assert errors[0] == pytest.approx(0.60, abs=0.08)
    assert errors[1] == pytest.approx(0.34, abs=0.04)
    assert errors[2] == pytest.approx(0.107, abs=0.03)
    alike = rows.unflatten(2, (-1, 4)).mean(3).repeat_interleave(4, 2) + 0.1 * rows
    plain, tree = ((recode(alike, f"{code}2{tree}", 4) - alike).norm() for tree in ("", "t"))
    assert tree < plain / 1.5


def test_metadata_bytes():
    shares = {name: make(name, 256).metadata_share(64, 8192) for name in BUDGETED}
    assert shares["quest"] == 1 / 16
    assert shares["paper"] == (1 / 16 + 1 / 64) / 2
    assert shares["infllm"] == 1 / 32
    assert shares["retroinfer"] == pytest.approx(1 / 16 + 2 / 16 / 256)
    assert shares["oracle"] == 0.5
    whole = HGAConfig(group_size=4, node_size=4, overselection="all", coded=False)
    assert RoutedRule.of(whole).metadata_share(64, 8192) == pytest.approx(2 * 66 / 4 / 256)
    coded = (130 + 66) / 32 + (32 + 1) / 4 + 128 / 256
    assert RoutedRule.of(HGAConfig.preset("lean")).metadata_share(128, 8192) == pytest.approx(coded / 512)


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (1, 400), generator=torch.Generator().manual_seed(1))


def test_through_a_model(model, ids):
    rules = {
        "dense": None,
        "full": make("quest", 512),
        "small": make("quest", 128, selection="per_head"),
        "bits": QuantisedRule(bits=8),
    }
    dense, full, small, bits = evaluate_nll(model, ids, rules, block_tokens=100)
    torch.testing.assert_close(full.losses, dense.losses)
    assert full.attended == pytest.approx(1.0)
    most = sum(128 / (position + 1) for position in range(200, 399)) / 199
    assert 0.8 * most < small.attended <= most < small.fetched
    assert small.summary_share == 1 / 16
    stored = 2 * 2 * 2 * 8 * 8 * 399  # layers, K and V, heads, width, float64, tokens
    assert small.store_bytes == stored
    assert small.device_bytes == stored // 16 + 128 * stored // 399
    assert (bits.attended, bits.budget_tokens, bits.store_bytes) == (1.0, None, 0)
    assert abs(bits.gap_nats) < 0.01 < abs(small.gap_nats)
    (blocks,) = evaluate_nll(model, ids, {"small": rules["small"]}, block_tokens=64)
    torch.testing.assert_close(blocks.losses, small.losses, rtol=1e-6, atol=1e-6)
    assert model.config._attn_implementation == "sdpa"


def test_the_model_is_given_back_after_an_error(model, ids):
    rule = make("quest", 128)
    with pytest.raises(ValueError, match="a batch or padding"), open_rule(model, rule) as cache:
        model(ids.expand(2, -1), past_key_values=cache)
    assert model.config._attn_implementation == "sdpa"
    with open_rule(model, rule) as cache, pytest.raises(ValueError, match="no query was counted"):
        cache.stats()


def test_refusals():
    with pytest.raises(ValueError, match="budget_tokens=79 must be at least 80"):
        QuestRule(budget_tokens=79)
    with pytest.raises(ValueError, match="selection='both'"):
        QuestRule(budget_tokens=80, selection="both")
    with pytest.raises(ValueError, match="block_size=128 must be at most window_tokens=64"):
        InfLLMRule(budget_tokens=256, block_size=128)
    with pytest.raises(ValueError, match="clusters differ"):
        RetroInferRule(budget_tokens=256, selection="in_turn")
    with pytest.raises(ValueError, match="cluster_size=10 must divide"):
        RetroInferRule(budget_tokens=256, cluster_size=10)
    with pytest.raises(ValueError, match="bits=3"):
        QuantisedRule(bits=3)
    for name in ("gemma2", "gpt_oss"):
        model = build(name)
        with pytest.raises(ValueError, match="soft-capped scores or learned sinks"):
            check_rules(model, [None, make("quest", 128)])
        with pytest.raises(ValueError, match="learned sinks"), open_rule(model, make("quest", 128)):
            pass
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "gemma3_text", "qwen3_next", "qwen2-sliding"])
def test_families(name):
    """Sliding and linear layers stay the model's own; a full budget is dense, a small one is not."""
    model = build(name)
    ids = torch.randint(1, 101, (1, 300), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        expected = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(180, 1)], 1)
        for budget, same in ((400, True), (90, False)):
            with open_rule(model, make("paper", budget)) as cache:
                halves = [model(part, past_key_values=cache).logits for part in ids.split(180, 1)]
                assert sorted(cache.notes) == list(ALL[name].routed)
                assert cache.stats().fetched == pytest.approx(1.0 if same else cache.stats().attended)
            assert torch.allclose(torch.cat(halves, 1), expected, rtol=0, atol=1e-8) == same
