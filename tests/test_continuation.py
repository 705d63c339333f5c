"""Long generation under a rule: compared with what transformers generates and with plain forwards."""

import pytest
import rows
import torch
from tiny_model import tiny_model

import hga
from hga.evals.continuation import agree, drift

SMALL = rows.SMALL.replace(summary_dtype="auto", budget_tokens=32)


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (1, 301), generator=torch.Generator().manual_seed(2))


def greedy(model, ids, count):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )[0, ids.shape[1] :].tolist()


def test_dense_writes_what_generate_writes(model, ids):
    dense = agree(model, ids, None, new_tokens=20)
    assert dense.written == greedy(model, ids, 20)
    assert (dense.equal, dense.first_divergence, dense.new_tokens) == (1.0, None, 20)
    assert dense.held["attended"] == 1.0


def test_first_divergence_is_that_of_free_decoding(model, ids):
    dense = agree(model, ids, None, new_tokens=40)
    routed = agree(model, ids, SMALL, dense.written)
    cache, free, token = hga.HGACache(model.config, SMALL), [], ids
    with hga.enabled(model, SMALL), torch.no_grad():
        for _ in range(40):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            free.append(token.item())
    apart = [own != other for own, other in zip(free, dense.written, strict=True)]
    assert routed.first_divergence == apart.index(True)
    assert routed.new_tokens == 40
    assert routed.first_divergence / 40 <= routed.equal < 1
    assert 0 < routed.held["attended"] < 0.15
    whole = SMALL.replace(budget_tokens=400)
    assert agree(model, ids, whole, dense.written).first_divergence is None


def test_drift_is_what_dense_says_of_the_sample(model, ids):
    routed = drift(model, ids, SMALL, new_tokens=50, seed=3, ends={256})
    assert routed.dense_nll - routed.own_nll == pytest.approx(routed.drift_nats, abs=1e-5)
    assert routed.drift_nats > 0.01
    assert routed.drift_se > 0
    # 50 tokens in quarters of 13, 13, 12 and 12
    weights = [13, 13, 12, 12]
    for quarters, mean in (
        (routed.drift_quarters, routed.drift_nats),
        (routed.dense_nll_quarters, routed.dense_nll),
    ):
        assert sum(w * q for w, q in zip(weights, quarters, strict=True)) / 50 == pytest.approx(mean, abs=1e-5)


def test_a_sample_of_dense_does_not_drift(model, ids):
    dense = drift(model, ids, None, new_tokens=24, seed=3)
    assert dense.drift_nats == pytest.approx(0, abs=1e-6)
    again, other = (drift(model, ids, None, new_tokens=24, seed=seed) for seed in (3, 4))
    assert again.dense_nll == dense.dense_nll != other.dense_nll


def test_ends_are_never_drawn(model, ids):
    """With all tokens but two banned, what is drawn costs what these two cost."""
    few = drift(model, ids, None, new_tokens=16, ends=set(range(255)))
    free = drift(model, ids, None, new_tokens=16)
    assert few.own_nll > free.own_nll + 0.5


def test_too_few_tokens_to_sample(model, ids):
    with pytest.raises(ValueError, match="7 sampled tokens"):
        drift(model, ids, None, new_tokens=7)
