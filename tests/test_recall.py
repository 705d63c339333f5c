"""Recall: what a rule attends of dense attention's mass, per layer and head, against the model's own weights."""

import json
import re

import pytest
import torch
from tiny_model import byte_tokenizer, save_tiny_model, tiny_model
from typer.testing import CliRunner

import hga
from hga.cli import app
from hga.evals.recall import measure_recall
from hga.evals.rules.fixed import SinksAndWindow
from hga.evals.rules.oracle import OracleTokens
from hga.evals.rules.peers import PEERS

TOKENS = 500


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def eager_weights(ids):
    model = tiny_model(dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        return torch.cat(model(ids, output_attentions=True).attentions)  # (layers, heads, N, N)


def test_recall_of_a_window_by_hand(model, ids):
    rule = SinksAndWindow(budget_tokens=100, sink_tokens=16)
    (found,) = measure_recall(model, ids, {"window": rule}, queries=TOKENS)
    weights, token = eager_weights(ids), torch.arange(TOKENS)
    seen = (token < 16) | (token > token[:, None] - 84)
    # Whole tiles from the one that holds the middle on: positions 192 to 499.
    mass = (weights * seen).sum(-1)[..., 192:].mean(-1)
    torch.testing.assert_close(found.recalled, mass, rtol=0, atol=1e-6)
    shares = (torch.minimum(token + 1, torch.tensor(100)) / (token + 1))[192:]
    assert found.attended == pytest.approx(shares.mean().item())
    assert found.attended == pytest.approx(found.fetched)
    assert found.layers == [0, 1]
    assert found.output_error.shape == (2, 4)


def test_a_full_budget_recalls_everything(model, ids):
    config = hga.HGAConfig(budget_tokens=512, prefill="routed")
    ours, oracle = measure_recall(
        model, ids, {"ours": config, "dense": None, "oracle": OracleTokens(budget_tokens=512)}
    )
    for found in (ours, oracle):
        torch.testing.assert_close(found.recalled, torch.ones(2, 4, dtype=torch.float64))
        assert found.output_error.max() < 1e-6
        assert found.layer_error.max() < 1e-6


def test_every_named_rule_is_measured_and_none_recalls_more_than_the_oracle(model, ids):
    rules = {name: make(128) for name, make in PEERS.items()} | {
        "balanced": hga.HGAConfig(budget_tokens=128, chunk_size=64, prefill="routed")
    }
    found = {one.rule: one for one in measure_recall(model, ids, rules, queries=100)}
    assert set(found) == set(rules)
    best = found["oracle-per-head"].recalled
    for name, one in found.items():
        if name.startswith("kv-"):
            torch.testing.assert_close(one.recalled, torch.ones_like(best))
            assert 0 < one.output_error.mean() < 1
        else:
            assert (one.recalled <= best + 1e-9).all(), name
            assert one.output_error.mean() > 1e-3, name
    errors = [found[f"kv-{bits}bit"].output_error.mean() for bits in (2, 4, 8)]
    assert errors[0] > errors[1] > errors[2]


def test_mixed_layers_are_measured_by_their_own_rule(ids):
    model = tiny_model(dtype=torch.float64, num_key_value_heads=1)
    config = hga.HGAConfig(budget_tokens=128, chunk_size=64, prefill="routed")
    names = ("shared", "per_head", "mixed")
    rules = {name: config.replace(selection=name) for name in names}
    shared, apart, mixed = measure_recall(model, ids, rules, queries=100)
    late = 1  # R = 4: half of two layers
    assert torch.equal(mixed.recalled[:late], shared.recalled[:late])
    assert torch.equal(mixed.recalled[late:], apart.recalled[late:])
    assert not torch.equal(shared.recalled[late:], apart.recalled[late:])


def test_whole_nodes_are_measured_as_such(model, ids):
    config = hga.HGAConfig(budget_tokens=128, chunk_size=64, prefill="nodes", node_budget_tokens=200)
    by_nodes, same, by_groups = measure_recall(
        model,
        ids,
        {"nodes": config, "same": config.by_nodes(), "groups": hga.HGAConfig.preset("balanced")},
        queries=100,
    )
    assert torch.equal(by_nodes.recalled, same.recalled)
    assert not torch.equal(by_nodes.recalled, by_groups.recalled)


def test_queries_are_whole_tiles_and_the_model_is_given_back(model, ids):
    before = model.config._attn_implementation
    (some,) = measure_recall(model, ids, {"window": SinksAndWindow(budget_tokens=100)}, queries=1)
    (all_,) = measure_recall(model, ids, {"window": SinksAndWindow(budget_tokens=100)}, queries=9999)
    assert not torch.equal(some.recalled, all_.recalled)
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="at least 4 tokens and 1 query"):
        measure_recall(model, ids[:, :3], {})
    with pytest.raises(ValueError, match="0 queries"):
        measure_recall(model, ids, {}, queries=0)


def test_rows(model, ids):
    (found,) = measure_recall(model, ids, {"window": SinksAndWindow(budget_tokens=100)})
    rows = list(found.rows())
    assert len(rows) == 8
    assert rows[5] == {
        "kind": "recall",
        "tokens": TOKENS,
        "rule": "window",
        "layer": 1,
        "head": 1,
        "recalled": found.recalled[1, 1].item(),
        "output_error": found.output_error[1, 1].item(),
    }


def test_command(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    document = tmp_path / "text.txt"
    document.write_text("It was the best of times, it was the worst of times. " * 30, encoding="utf-8")
    assert len(byte_tokenizer()(document.read_text()).input_ids) > 1024
    arguments = ["eval", "recall", "--document", str(document), "--model", str(folder), "--tokens", "1024"]
    arguments += ["--budget", "1/8", "--queries", "64"]
    result = CliRunner().invoke(app, [*arguments, "--rules", "balanced,quest", "--json"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 2 * 2 * 4
    assert set(rows[0]) == {"kind", "model", "document", "tokens", "rule", "layer", "head", "recalled", "output_error"}
    assert {row["rule"] for row in rows} == {"balanced", "quest"}
    assert all(0 < row["recalled"] <= 1 for row in rows)
    shown = CliRunner().invoke(app, [*arguments, "--rules", "dense,contiguous"])
    assert shown.exit_code == 0, shown.output
    assert "contiguous" in shown.stdout
    for changed, message in (
        (["--rules", "quesst"], "'quesst' is unknown"),
        (["--budget", "1/32"], "budget_tokens=32 must be at least 80"),
        (["--tokens", "99999"], "99,999 positions|fewer than the 99999|99999"),
        (["--queries", "0"], "0 queries"),
    ):
        refused = CliRunner().invoke(app, [*arguments, "--rules", "quest", *changed])
        assert refused.exit_code != 0
        assert re.search(message, str(refused.exception) + refused.output), refused.output
    none = CliRunner().invoke(app, [*arguments, "--rules", "dense"])
    assert none.exit_code != 0
    assert "names no rule" in str(none.exception) + none.output
