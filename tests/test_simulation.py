"""The real path against a direct simulation of the same choice (benchmarks/simulation.py)."""

import pytest
import torch
from rows import feed, new_row, random_sequence
from simulation import simulate

from hga.cache import routed, row
from hga.cache.rope import inverse_frequencies
from hga.config import PRESETS, HGAConfig
from hga.store import MemoryStore


def _config(preset: str, chunk: int) -> HGAConfig:
    if preset == "paper":
        return HGAConfig.preset("paper", prefill="routed", budget_tokens=704)
    return HGAConfig.preset(preset, prefill="routed", budget_tokens=128, chunk_size=chunk).of_layer(2, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_random_layer(preset, dtype):
    config = _config(preset, 64)
    if config.two_level and preset != "paper":
        config = config.replace(overselection=2)
    sequence = random_sequence(1500, 4, dtype)
    frequencies = 10000.0 ** -(torch.arange(0, 16, 2) / 16) if preset == "paper" else None
    real = feed(new_row(config, frequencies)[0], sequence, 0, 1500, [199, 64, 1])
    oracle = simulate(config, sequence.query.flatten(0, 1), sequence.key, sequence.value, 0.25, frequencies)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(real.flatten(0, 1), oracle, rtol=0, atol=tolerance)


@pytest.mark.weights
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_recorded_layer(preset, recorded_layer):
    """One layer's routed outputs on Q/K/V recorded from real text: within 1e-4."""
    config, layer = _config(preset, 256), recorded_layer
    if preset != "paper":
        config = config.replace(chunk_size=256 if preset != "contiguous" else 64)
    frequencies = inverse_frequencies(layer.config, layer.layer_idx) if preset == "paper" else None
    real = feed(new_row(config, frequencies)[0], layer.sequence, 0, layer.sequence.tokens, [512])
    oracle = simulate(
        config,
        layer.sequence.query.flatten(0, 1),
        layer.sequence.key,
        layer.sequence.value,
        layer.sequence.key.shape[-1] ** -0.5,
        frequencies,
    )
    different = (real.flatten(0, 1) - oracle).abs().amax(-1) > 1e-4
    # Float32 sums in another order may break a near tie; such a query opens another group and may differ.
    assert different.float().mean() <= 0.001, f"{int(different.sum())} of {different.numel()} outputs differ"


@pytest.mark.parametrize("preset", ["balanced", "fidelity", "lean"])
def test_bounded_memory_does_not_change_the_result(preset, monkeypatch):
    """Few queries and few groups at a time, merged by log-sum-exp: what long contexts run into."""
    for module in (routed, row):
        monkeypatch.setattr(module, "NUMBERS_AT_ONCE", 6000)
    config = _config(preset, 64).replace(**({"overselection": 2} if preset != "contiguous" else {}))
    sequence = random_sequence(900, 8, torch.float64)
    fetched = []
    fetch = MemoryStore.fetch
    monkeypatch.setattr(MemoryStore, "fetch", lambda *given: fetched.append(given[1].shape[1]) or fetch(*given))
    real = feed(new_row(config)[0], sequence, 0, 900, [300])
    oracle = simulate(config, sequence.query.flatten(0, 1), sequence.key, sequence.value, 0.25)
    torch.testing.assert_close(real.flatten(0, 1), oracle, rtol=0, atol=1e-12)
    assert 0 < max(fetched) <= 6000 // (2 * config.group_size * 32)
