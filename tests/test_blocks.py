"""Rows that read blocks by kernels give what rows that read them through PyTorch give, however a prompt is cut."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import rows
import torch

from hga import HGAConfig
from hga.cache import archive, block, row
from hga.cache.finite import FiniteCheck
from hga.cache.routed import Scoring
from hga.cache.row import Counters, Row
from hga.store import MemoryStore

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, REPEATS, WIDTH = 2, 3, 16
CONFIG = rows.SMALL.replace(summary_dtype="auto", dense_below=70)
CONFIGS = {
    "dense, then routed": CONFIG,
    "exact": CONFIG.replace(prefill="exact"),
    "two levels": CONFIG.replace(node_size=8, overselection=2),
    "coded": CONFIG.replace(node_size=16, overselection=2, coded=True),
    "by nodes": CONFIG.replace(node_size=8, overselection=2, prefill="nodes", block_tokens=82),
    "per head": CONFIG.replace(selection="per_head"),
    "coded per head": CONFIG.replace(node_size=16, overselection=2, coded=True, selection="per_head"),
}


@pytest.fixture(autouse=True)
def _without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces to stream; on a CPU the copies are done when they are asked for, and streams have no work."""
    monkeypatch.setattr(archive, "_STAGED_BYTES", 2 * HEADS * 32 * 2 * WIDTH * 4)
    if DEVICE.type == "cpu":
        for name in ("current_stream", "Stream"):
            monkeypatch.setattr(torch.cuda, name, Mock())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


def make_row(config: HGAConfig) -> Row:
    return Row(config, lambda layout: MemoryStore(layout, torch.device("cpu"), "ram"), Counters(), None)


@pytest.mark.parametrize("serve", [True, False], ids=["kernels", "PyTorch"])
def test_auto_is_exact_in_long_blocks(serve: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"dense_below": 0, "block_tokens": 82}  # blocks of 41 are exact
    rows = [make_row(CONFIG.replace(prefill=prefill, **changes)) for prefill in ("auto", "exact")]
    for module in (row, block):
        monkeypatch.setattr(module, "kernels_serve", lambda *args: serve)
    for tokens in (230, 41, 1):
        keys, values = (torch.randn(HEADS, tokens, WIDTH, device=DEVICE) for _ in range(2))
        query = 2 * torch.randn(HEADS, REPEATS, tokens, WIDTH, device=DEVICE)
        for one in rows:
            one.append(keys, values)
        torch.testing.assert_close(*(one.attend(query, Scoring(0.3)) for one in rows), rtol=0, atol=1e-5)
    assert rows[0]._counters.attended == pytest.approx(rows[1]._counters.attended)
    assert rows[0].chunks == rows[1].chunks > 0
    for one in rows:
        one.append(keys.expand(-1, 40, -1), values.expand(-1, 40, -1))
        one.attend(query.expand(-1, -1, 40, -1).contiguous(), Scoring(0.3))
    assert rows[0]._counters.attended < rows[1]._counters.attended  # a shorter block is routed


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_block_in_parts_reads_the_archive_once(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row, "kernels_serve", lambda *args: False)
    monkeypatch.setattr(block, "kernels_serve", lambda *args: False)
    outputs = []
    for numbers in (1 << 22, HEADS * REPEATS * WIDTH * 9):
        torch.manual_seed(0)
        monkeypatch.setattr(block, "NUMBERS_AT_ONCE", numbers)
        one = make_row(CONFIG.replace(prefill="exact", dense_below=0))
        for tokens in (200, 61):
            keys, values = (torch.randn(HEADS, tokens, WIDTH, device=DEVICE) for _ in range(2))
            query = 2 * torch.randn(HEADS, REPEATS, tokens, WIDTH, device=DEVICE)
            one.append(keys, values)
            held = list(one.archive.chunks) if one.chunks else []
            if held:
                monkeypatch.setattr(one.archive.store, "stage", Mock(wraps=one.archive.store.stage))
            output = one.attend(query, Scoring(0.3, softcap))
        assert [ids for call in one.archive.store.stage.call_args_list for ids in call.args[0]] == held != []
        outputs.append(output)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def read(one: Row, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    one.append(keys, values)
    return one.attend(query, Scoring(0.3))


@pytest.mark.parametrize("late", [False, True] if DEVICE.type == "cpu" else [True])
@pytest.mark.parametrize("tokens", [7, 150])
def test_bad_kv_is_refused_and_nothing_of_it_kept(tokens: int, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it is known when all is launched: what is kept until then, also in chunks that close, is finite."""
    monkeypatch.setattr(FiniteCheck, "is_late", late)
    one = make_row(CONFIG.replace(dense_below=0))
    for place in range(2):
        keys, values = (torch.randn(HEADS, tokens, WIDTH, device=DEVICE) for _ in range(2))
        query = torch.randn(HEADS, REPEATS, tokens, WIDTH, device=DEVICE)
        values[1, 5, 3] = torch.inf if place else 1.0
        error = f"positions {tokens} to {2 * tokens - 1} hold NaN or Inf"
        with pytest.raises(ValueError, match=error) if place else nullcontext():
            read(one, query, keys, values)
    assert one.length == (2 * tokens if late else tokens)
    assert all(x[:, : one.near_length].isfinite().all() for x in (one._keys, one._values))
    if one.chunks:
        assert one.archive.store.read(one.archive.chunks)[0].isfinite().all()
        assert one.archive.summaries.node_keys.held().data.isfinite().all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="streams are watched where they are none")
@pytest.mark.parametrize("config", [CONFIG, CONFIG.replace(prefill="exact")], ids=["routed", "exact"])
def test_copies_end_before_their_memory_is_let_go(config: HGAConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends a block: what comes by another stream is waited for."""
    one = make_row(config.replace(dense_below=0))
    tokens = [torch.randn(*shape, 150, WIDTH) for shape in ((HEADS, REPEATS), (HEADS,), (HEADS,))]
    for module in (row, block):
        monkeypatch.setattr(module, "kernels_serve", lambda *args: True)
    read(one, *tokens)
    current = torch.cuda.current_stream()
    waited, failed = current.wait_stream.call_count, Mock(side_effect=MemoryError)
    monkeypatch.setattr("hga.ops.kernels.prefill_routed.attend_prefill_routed", failed)
    monkeypatch.setattr("hga.ops.kernels.prefill.attend_all", failed)
    with pytest.raises(MemoryError):
        read(one, *tokens)
    gc.collect()
    assert current.wait_stream.call_count == waited + 1


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_by_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = make_row(CONFIGS[name]), make_row(CONFIGS[name])
    for tokens in (150, 61, 7, 90):
        keys, values = (torch.randn(HEADS, tokens, WIDTH, device=DEVICE) for _ in range(2))
        query = 2 * torch.randn(HEADS, REPEATS, tokens, WIDTH, device=DEVICE)
        outputs = []
        for one, serve in ((fast, True), (plain, False)):
            for module in (row, block):
                monkeypatch.setattr(module, "kernels_serve", lambda *args, serve=serve: serve)
            one.append(keys, values)
            outputs.append(one.attend(query, Scoring(0.3)))
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    assert fast.chunks == plain.chunks > 0
    assert fast._counters.attended == pytest.approx(plain._counters.attended)
    assert fast._counters.fetched == pytest.approx(plain._counters.fetched)
    assert fast._counters.queries == plain._counters.queries
