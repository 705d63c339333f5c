"""The evaluation: its losses are those of the model, its routed path that of decoding."""

import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny_model import byte_tokenizer, tiny_model
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import hga
from hga.evals import nll
from hga.evals.baseline import Baseline, check_logits, divergence, logits_of, output_layer_inputs
from hga.evals.nll import evaluate_nll, first_tokens, paired_gap, read, score_rule
from hga.evals.rule import open_rule, read_prompt_exactly, resolve_rules

SMALL = {
    "chunk_size": 32,
    "group_size": 4,
    "node_size": 8,
    "overselection": 2,
    "coded": False,
    "sink_tokens": 4,
    "window_tokens": 16,
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (1, 512), generator=torch.Generator().manual_seed(1))


def reference_losses(model, ids):
    """Losses of predicting ids[i + 1] from i in the second half, from one plain forward."""
    with torch.no_grad():
        logits = model(ids).logits[0]
    half = ids.shape[1] // 2
    return torch.nn.functional.cross_entropy(logits[half:-1].float(), ids[0, half + 1 :], reduction="none")


def own_rule(budget: int, **changes) -> dict:
    return {"own": hga.HGAConfig(**(SMALL | changes), budget_tokens=budget, prefill="routed")}


def test_dense_losses_are_the_models(model, ids):
    (score,) = evaluate_nll(model, ids, {"dense": None}, block_tokens=100)
    torch.testing.assert_close(score.losses, reference_losses(model, ids))
    assert score.losses.shape == (255,)
    assert score.nll == pytest.approx(score.losses.mean().item())
    assert (score.gap_nats, score.se_nats, score.attended) == (0.0, 0.0, 1.0)
    assert score.device_bytes == 2 * 2 * 511 * 2 * 8 * 8  # layers, K and V, tokens, heads, width, float64


def test_full_budget_loses_nothing(model, ids):
    dense, routed = evaluate_nll(model, ids, {"dense": None, **own_rule(512)})
    torch.testing.assert_close(routed.losses, dense.losses)
    assert routed.attended == pytest.approx(1.0)


@pytest.mark.parametrize("changes", [{}, {"far_field": False}, {"selection": "per_head"}, {"ordering": "position"}])
def test_equals_decoding_token_by_token(model, ids, changes):
    rule = own_rule(64, **changes)
    (score,) = evaluate_nll(model, ids, rule)
    config, losses = rule["own"], []
    cache = hga.HGACache(config=model.config, hga_config=config)
    with hga.enabled(model, config), torch.no_grad():
        for position in range(511):
            logits = model(ids[:, position : position + 1], past_key_values=cache).logits[0].float()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, position + 1 : position + 2]))
    torch.testing.assert_close(score.losses, torch.stack(losses[256:]), rtol=1e-6, atol=1e-6)
    assert score.attended < 0.3
    assert (score.losses - reference_losses(model, ids)).abs().max() > 1e-3  # routing was really at work


def test_behind_an_exact_prompt_is_decoding_behind_one(model, ids):
    """What `exact_prompt` scores is what hga writes by default: a prompt read densely, then one token at a time."""
    rule = own_rule(64)
    routed, exact = (next(iter(evaluate_nll(model, ids, rule, exact_prompt=exact))) for exact in (False, True))
    config, losses = rule["own"].replace(prefill="exact"), []
    cache = hga.HGACache(config=model.config, hga_config=config)
    with hga.enabled(model, config), torch.no_grad():
        model(ids[:, :256], past_key_values=cache)
        for position in range(256, 511):
            logits = model(ids[:, position : position + 1], past_key_values=cache).logits[0].float()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, position + 1 : position + 2]))
    torch.testing.assert_close(exact.losses, torch.stack(losses), rtol=1e-6, atol=1e-6)
    assert exact.attended == pytest.approx(routed.attended)
    assert (exact.losses - routed.losses).abs().max() > 1e-3
    with pytest.raises(ValueError, match="rule 'quest' is simulated and routes every token"):
        next(evaluate_nll(model, ids, resolve_rules(["quest"], 512), exact_prompt=True))


def test_blocks_do_not_matter(model, ids):
    scores = [next(iter(evaluate_nll(model, ids, own_rule(64), block_tokens=size))) for size in (64, 100, 512)]
    for score in scores[1:]:
        torch.testing.assert_close(score.losses, scores[0].losses, rtol=1e-6, atol=1e-6)
        assert score.attended == pytest.approx(scores[0].attended)


def test_counters_cover_the_scored_positions(model, ids):
    (score,) = evaluate_nll(model, ids, own_rule(64))
    # The budget over the context length, averaged over positions 256 to 510 only.
    most = sum(64 / (position + 1) for position in range(256, 511)) / 255
    assert 0.8 * most <= score.attended <= most


def test_dense_comes_first_and_gaps_are_paired(model, ids):
    scores = list(evaluate_nll(model, ids, {**own_rule(64), "dense": None}))
    assert [score.rule for score in scores] == ["dense", "own"]
    assert (scores[1].gap_nats, scores[1].se_nats) == paired_gap(scores[1].losses, scores[0].losses)
    assert scores[1].gap_nats == pytest.approx(scores[1].nll - scores[0].nll, abs=1e-6)
    assert 0 < scores[1].summary_share < 1
    assert scores[1].store_bytes > 0
    assert "losses" not in scores[1].row()


def test_without_dense_there_is_no_gap(model, ids):
    (score,) = evaluate_nll(model, ids, own_rule(64))
    assert score.gap_nats is None
    assert score.se_nats is None


def test_the_model_is_given_back(model, ids):
    before = model.config._attn_implementation
    list(evaluate_nll(model, ids, own_rule(64)))
    assert model.config._attn_implementation == before
    with hga.enabled(model), pytest.raises(ValueError, match="enabled already"):
        next(iter(evaluate_nll(model, ids, {"dense": None})))


def test_progress_counts_every_token(model, ids):
    seen = {}
    rules = {"dense": None, **own_rule(64)}
    list(evaluate_nll(model, ids, rules, progress=lambda rule, n: seen.update({rule: seen.get(rule, 0) + n})))
    assert seen == {"dense": 511, "own": 511}


def test_read_leaves_the_last_token_to_the_caller(model, ids):
    cache = DynamicCache(config=model.config)
    read(model, ids, cache, score_from=256)
    assert cache.get_seq_length() == 511


def test_paired_gap():
    gap, error = paired_gap(torch.tensor([2.0, 4.0, 6.0, 4.0]), torch.tensor([1.0, 3.0, 3.0, 3.0]))
    assert gap == pytest.approx(1.5)
    assert error == pytest.approx(1.0 / 2.0)


def test_resolve_rules():
    rules = resolve_rules(["balanced", "dense", "window", "paper"], 32768, 1 / 8)
    assert next(iter(rules)) == "dense"
    assert rules["dense"] is None
    for name in ("balanced", "window", "paper"):
        assert rules[name].budget_tokens == 4096
        assert rules[name].dense_positions == 0
    assert not rules["window"].far_field
    assert rules["window"].routed_groups == 1
    assert resolve_rules(["fidelity"], 100)["fidelity"].budget_tokens == 4096
    own = {"own": hga.HGAConfig(prefill="nodes", node_budget_tokens=8192)}
    nodes = resolve_rules(["own"], 8192, 1 / 32, own)["own"]
    assert (nodes.prefill, nodes.budget_tokens, nodes.node_budget_tokens) == ("nodes", 256, 1024)
    assert read_prompt_exactly("own", nodes).prefill == "exact"


def test_resolve_rules_refuses():
    with pytest.raises(ValueError, match="'quesst' is unknown"):
        resolve_rules(["quesst"], 100)
    with pytest.raises(ValueError, match="rule 'paper' on 8192 tokens: budget_tokens=256 must be at least"):
        resolve_rules(["paper"], 8192, 1 / 32)
    for share in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="share of the context"):
            resolve_rules(["balanced"], 100, share)


def test_first_tokens():
    tokenizer = byte_tokenizer()
    text = "To be, or not to be. " * 400
    torch.testing.assert_close(first_tokens(tokenizer, text, 50)[0], torch.tensor(tokenizer(text).input_ids[:50]))
    with pytest.raises(ValueError, match=r"has 21 tokens, fewer than the 22"):
        first_tokens(tokenizer, text[:21], 22)


def test_a_document_without_a_second_half(model):
    with pytest.raises(ValueError, match="too few"):
        next(iter(evaluate_nll(model, torch.zeros(1, 3, dtype=torch.long), {"dense": None})))


class RecentTokens:
    """A peer over dense K/V: everything but the last `budget_tokens` is masked; the shape that a peer must have."""

    def __init__(self, budget_tokens: int) -> None:
        self.budget_tokens = budget_tokens

    @contextmanager
    def opened(self, model):
        before = model.config._attn_implementation
        AttentionInterface.register("recent", self.attend)
        AttentionMaskInterface.register("recent", sdpa_mask)
        model.set_attn_implementation("recent")
        try:
            yield CountedCache(config=model.config)
        finally:
            model.set_attn_implementation(before)

    def attend(self, module, query, key, value, mask, **kwargs):
        last, new = key.shape[2], query.shape[2]
        place = torch.arange(last)
        distance = place[last - new :, None] - place
        allowed = (distance >= 0) & (distance < self.budget_tokens)
        return sdpa_attention_forward(module, query, key, value, allowed[None, None], **kwargs)


class CountedCache(DynamicCache):
    resets = 0

    def reset_counters(self):
        self.resets += 1

    def stats(self):
        return SimpleNamespace(
            attended=0.25 * self.resets, fetched=0.5, device_bytes=7, store_bytes=0, summary_share=0.0
        )


def test_a_peer_is_a_rule_like_any_other(model, ids):
    rules = {"few": RecentTokens(16), "dense": None, "all": RecentTokens(512)}
    dense, few, all_of_it = evaluate_nll(model, ids, rules)
    torch.testing.assert_close(all_of_it.losses, dense.losses)
    assert (few.losses - dense.losses).abs().max() > 1e-3
    assert (few.budget_tokens, few.attended, few.fetched, few.device_bytes) == (16, 0.25, 0.5, 7)


def test_open_rule_gives_the_model_back_after_an_error(model):
    for rule in (None, own_rule(64)["own"], RecentTokens(16)):
        with pytest.raises(KeyError), open_rule(model, rule):
            raise KeyError
        assert model.config._attn_implementation == "sdpa"


# ---- distance from dense ------------------------------------------------------------------------------


def all_logits(model, ids, config=None):
    with torch.no_grad():
        if config is None:
            return model(ids).logits[0]
        with hga.enabled(model, config):
            return model(ids, past_key_values=hga.HGACache(config=model.config, hga_config=config)).logits[0]


def test_divergence_is_that_of_the_whole_logits(model, ids):
    rule = own_rule(64)
    dense, score = evaluate_nll(model, ids, {"dense": None, **rule}, block_tokens=100)
    p, q = (all_logits(model, ids, config)[256:-1].log_softmax(-1) for config in (None, rule["own"]))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert score.kl_mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert score.kl_p99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-4)
    assert score.kl_se == pytest.approx(kl.std().item() / 255**0.5, rel=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert score.top1_agreement == pytest.approx(same)
    assert same < 1
    assert (dense.kl_mean, dense.kl_se, dense.kl_p99, dense.top1_agreement) == (0, 0, 0, 1)


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]).log(), torch.tensor([[0.25, 0.5, 0.25]] * 2).log()
    kl, same = divergence(p + 3, q - 1)
    torch.testing.assert_close(kl[0].item(), 0.25 * math.log(2))
    torch.testing.assert_close(kl[1].item(), 0.9 * math.log(3.6) + 0.05 * math.log(0.1) + 0.05 * math.log(0.2))
    assert same.tolist() == [False, False]


def test_soft_capped_logits_are_recomputed():
    from families import build

    capped, ids = build("gemma2"), torch.arange(40)[None] % 60
    assert capped.config.final_logit_softcapping
    with torch.no_grad(), output_layer_inputs(capped) as inputs:
        logits = capped(ids).logits[0]
    torch.testing.assert_close(logits_of(capped, inputs[0]), logits)
    with pytest.raises(ValueError, match="dense logits cannot be recomputed"):
        check_logits(capped, inputs[0], 2 * logits)


def test_all_positions_can_be_scored_and_buckets_add_up(model, ids, monkeypatch):
    monkeypatch.setattr(nll, "BUCKET_EDGES", (0, 100, 300, 400, 510, 1000))
    rules = {"dense": None, **own_rule(64)}
    (_, half), (dense, score) = (list(evaluate_nll(model, ids, rules, score_from=first)) for first in (None, 0))
    torch.testing.assert_close(score.losses[256:], half.losses)
    assert (half.scored, score.scored) == (255, 511)
    assert [(b.from_tokens, b.scored) for b in score.buckets] == [
        (0, 100),
        (100, 200),
        (300, 100),
        (400, 110),
        (510, 1),
    ]
    assert [(b.from_tokens, b.scored) for b in half.buckets] == [(100, 44), (300, 100), (400, 110), (510, 1)]
    for score_field in ("nll", "gap_nats", "kl_mean"):
        total = sum(getattr(b, score_field) * b.scored for b in score.buckets) / 511
        assert total == pytest.approx(getattr(score, score_field), abs=1e-6)
    second = score.buckets[1]
    assert (second.gap_nats, second.se_nats) == paired_gap(score.losses[100:300], dense.losses[100:300])
    assert score.buckets[-1].se_nats is None
    assert json.dumps(score.row(), allow_nan=False)


def test_device_bytes_are_averaged_over_the_scored_positions(model, ids):
    dense, routed = evaluate_nll(model, ids, {"dense": None, **own_rule(64)}, block_tokens=64)
    token_bytes = dense.device_bytes / 511
    # Blocks of 64, 64, 64 and 63 from position 256 on, each with the mean of its ends.
    expected = token_bytes * (64 * (288 + 352 + 416) + 63 * 479.5) / 255
    assert dense.mean_device_bytes == pytest.approx(expected)
    assert 0 < routed.mean_device_bytes < routed.device_bytes


def test_a_baseline_on_disk_is_the_same(model, ids, tmp_path):
    _, baseline = score_rule(model, ids, "dense", None, None)
    path = tmp_path / "baseline.safetensors"
    baseline.save(path)
    config = own_rule(64)["own"]
    fresh, _ = score_rule(model, ids, "own", config, baseline)
    resumed, _ = score_rule(model, ids, "own", config, Baseline.load(path))
    assert fresh.row() | {"seconds": 0} == resumed.row() | {"seconds": 0}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no dense reading"):
        Baseline.load(path)
    with pytest.raises(ValueError, match="scored 255 tokens, this one 100"):
        score_rule(model, ids, "own", config, baseline, score_from=411)
