"""Decode steps of whole caches: their bookkeeping ahead, and whatever interrupts them."""

from __future__ import annotations

import copy
import gc
import itertools
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from test_decoding import CONFIG, DEVICE, TINY, raise_memory_error, serve
from torch import Tensor
from transformers import LlamaForCausalLM

import hga
from hga.cache import layer
from hga.cache.decoding import Decoding
from hga.cache.layer import HGALayer
from hga.cache.row import Row
from hga.integrations.transformers import step
from hga.ops.decode import attend_decode
from hga.store import MemoryStore

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "kernels_serve", serve)
    monkeypatch.setattr(step, "_can_capture", lambda model: False)
    if DEVICE == "cpu":  # any memory can be read; and of kernel and reference the latter is the faster one here
        monkeypatch.setattr(MemoryStore, "gpu_readable", True)
        monkeypatch.setattr("hga.ops.kernels.decode.attend_decode", attend_decode)


def make_model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(TINY).to(DEVICE).eval()


def random_ids(rows: int = 1, tokens: int = 150) -> Tensor:
    return torch.randint(1, 64, (rows, tokens), device=DEVICE)


def read_and_decode(model: Any, ids: Tensor, prompt: int, last: int) -> hga.HGACache:
    """A cache of a prompt read at once and of the tokens behind it, up to `last`, decoded one by one."""
    cache = hga.HGACache(model.config, CONFIG)
    model(ids[:, :prompt], past_key_values=cache)
    for token in range(prompt, last):
        model(ids[:, token : token + 1], past_key_values=cache)
    return cache


@torch.no_grad()
def test_bookkeeping_ahead_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step prepared while the last one ran equals one prepared anew, whatever was done to the cache in between."""
    model, ids = make_model(), random_ids(rows=2)
    work_ahead, was_ahead = hga.HGACache._work_ahead, list[bool]()

    def read(anew: bool) -> list[Tensor]:
        monkeypatch.setattr(hga.HGACache, "_work_ahead", (lambda self, *args: None) if anew else work_ahead)
        with hga.enabled(model, CONFIG):
            cache, logits = hga.HGACache(model.config, CONFIG), []

            def feed(cache: hga.HGACache, start: int, stop: int, tokens: int = 1) -> None:
                for at in range(start, stop, tokens):
                    was_ahead.append(cache._is_ahead())
                    logits.append(model(ids[:, at : at + tokens], past_key_values=cache).logits)

            feed(cache, 0, 118, tokens=118)
            feed(cache, 118, 132)  # a chunk closes at 128
            twin = cache.fork()
            feed(twin, 0, 2)
            feed(cache, 132, 134)
            cache.crop(-9)
            feed(cache, 20, 22)
            feed(cache, 22, 28, tokens=3)
            feed(cache, 28, 30)
            cache.reorder_cache(torch.tensor([1, 0]))
            feed(cache, 30, 32)
            cache.reset()
            feed(cache, 0, 118, tokens=118)
            feed(cache, 118, 120)
        return logits

    assert all(map(torch.equal, read(anew=False), read(anew=True)))
    half = len(was_ahead) // 2
    # All but the first step behind a change, and the one before which the chunk closes.
    assert sum(was_ahead[:half]) == 12 + 1 + 2 + 1 + 1 + 1 + 1 + 1
    assert not any(was_ahead[half:])


@torch.no_grad()
def test_a_token_behind_an_interrupted_forward_is_refused() -> None:
    model, ids = make_model(), random_ids()
    with hga.enabled(model, CONFIG):
        for where in (model.model.layers[0].mlp, model.model.layers[1].self_attn):
            cache = read_and_decode(model, ids, 120, 121)
            hook = where.register_forward_pre_hook(lambda *args: raise_memory_error())
            with pytest.raises(MemoryError):
                model(ids[:, 121:124], past_key_values=cache)
            hook.remove()
            for _ in range(2):
                with pytest.raises(RuntimeError, match="interrupted"):
                    model(ids[:, 124:125], past_key_values=cache)


@contextmanager
def interrupted_at(count: int, functions: tuple[Any, ...]) -> Iterator[None]:
    """Ctrl-C before the `count`-th line that runs in one of these functions; where there are fewer, none."""
    codes, left = {function.__code__ for function in functions}, itertools.count(1 - count)

    def trace_line(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and next(left) == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace_line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: trace_line if frame.f_code in codes else None)
    try:
        yield
    finally:
        sys.settrace(before)


@torch.no_grad()
@pytest.mark.parametrize("ahead", [True, False])
def test_an_interrupt_anywhere_in_a_step_gives_no_wrong_token(ahead: bool) -> None:
    """What comes behind it is right, or refused until `reset`."""
    model, ids = make_model(), random_ids(rows=2)
    begin_token = hga.HGACache.begin_token.__wrapped__  # type: ignore[attr-defined]
    functions = (begin_token, hga.HGACache._work_ahead, HGALayer.begin_token, HGALayer.begin_next_token)
    functions += (HGALayer.end_token, HGALayer._count_token, Row.end_token, Row.make_room_for_token, Decoding.publish)
    with hga.enabled(model, CONFIG):
        read = read_and_decode(model, ids, 118, 118)
        outcomes, at = [], 120 if ahead else 118
        for count in itertools.count(1):
            expected, one = read.fork(), read.fork()
            for cache, token in itertools.product((expected, one), range(118, at)):
                model(ids[:, token : token + 1], past_key_values=cache)
            assert one._is_ahead() == ahead
            try:
                with interrupted_at(count, functions):
                    model(ids[:, at : at + 1], past_key_values=one)
            except KeyboardInterrupt:
                pass
            else:
                break
            length = one.get_seq_length()
            outcome = "right"
            for token in range(min(at, length), length + 3):
                logits = model(ids[:, token : token + 1], past_key_values=expected).logits
                if token >= length:
                    try:
                        assert torch.equal(model(ids[:, token : token + 1], past_key_values=one).logits, logits), count
                    except (RuntimeError, ValueError):
                        outcome = "refused"
            outcomes.append(outcome)
    assert len(outcomes) > 30
    assert {"right", "refused"} == set(outcomes)


@torch.no_grad()
def test_another_attention_in_a_step_is_refused_again_and_again() -> None:
    model, ids = make_model(), random_ids()
    with hga.enabled(model, CONFIG):
        cache = read_and_decode(model, ids, 118, 120)
        last = model.model.layers[-1].self_attn
        own, last.config = last.config, copy.deepcopy(last.config)
        last.config._attn_implementation = "sdpa"
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no hga attention read"):
                model(ids[:, 120:121], past_key_values=cache)
        last.config = own
        twin = read_and_decode(model, ids, 118, 120)
        for token in (120, 121):
            here = [model(ids[:, token : token + 1], past_key_values=one).logits for one in (cache, twin)]
            assert torch.equal(*here)


@torch.no_grad()
def test_a_fault_is_told_before_the_next_step_counts() -> None:
    model, ids = make_model(), random_ids()
    with hga.enabled(model, CONFIG):
        cache = read_and_decode(model, ids, 118, 119)
        assert cache._is_ahead()
        cache.decoding.faults(cache.routed[0].device).fill_(1)
        with pytest.raises(ValueError, match="NaN or infinite"):
            model(ids[:, 119:120], past_key_values=cache)
        assert [one.get_seq_length() for one in cache.routed] == [119, 119]


@torch.no_grad()
def test_a_context_that_becomes_whole_within_a_step_is_captured_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers learn between steps that they need not bring groups any more; a capture must not bring any."""
    model, ids = make_model(), random_ids(tokens=220)
    brought: list[bool] = []

    def cannot_capture(model: Any, forward: Any, argument: str, input_ids: Tensor, position_ids: Tensor) -> Any:
        def attend(*args: Any) -> Tensor:
            brought.append(args[-1] is not None)
            return attend_decode(*args)

        with monkeypatch.context() as patched:
            patched.setattr("hga.ops.kernels.decode.attend_decode", attend)
            forward(input_ids=input_ids, position_ids=position_ids)
        first = cache.routed[0]
        first._handshake.awaiting = first  # as a capture that fails inside a layer leaves it
        raise RuntimeError("no graphs here")

    config = CONFIG.replace(prefill="routed", budget_tokens=256)  # the first step asks for all there is
    with hga.enabled(model, config):
        read = hga.HGACache(model.config, config)
        model(ids[:, :206], past_key_values=read)
        saved = read.save(tmp_path / "context.hga", model, ids[0, :206])
        tokens = [ids[:, at : at + 1] for at in range(206, 214)]
        expected = [model(token, past_key_values=read).logits for token in tokens]
        cache = hga.HGACache.load(saved.path, model)
        assert not cache.can_capture_token()
        monkeypatch.setattr(step, "_can_capture", lambda model: True)
        monkeypatch.setattr(step, "StepGraph", cannot_capture)
        for token, logits in zip(tokens, expected, strict=True):
            assert torch.equal(model(token, past_key_values=cache).logits, logits)
    assert cache.can_capture_token()
    assert brought
    assert not any(brought)


@pytest.mark.parametrize("room_for_two", [True, False])
@torch.no_grad()
def test_an_outdated_graph_goes_when_there_is_another(room_for_two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone before, it would leave the next one slower (NOTES); never replayed again, and not kept any longer."""
    made: list[weakref.ref[Graph]] = []
    alive_beside: list[int] = []

    class Graph:
        def __init__(self, model: Any, forward: Any, argument: str, input_ids: Tensor, position_ids: Tensor) -> None:
            alive_beside.append(sum(other() is not None for other in made))
            if alive_beside[-1] and not room_for_two:
                raise torch.OutOfMemoryError("CUDA out of memory")
            made.append(weakref.ref(self))
            self._forward = forward

        def serves(self) -> bool:
            return True

        def replay(self, cache: hga.HGACache, input_ids: Tensor, position_ids: Tensor) -> Any:
            assert made[-1]() is self
            return self._forward(input_ids=input_ids, position_ids=position_ids)

    monkeypatch.setattr(step, "_can_capture", lambda model: True)
    monkeypatch.setattr(step, "StepGraph", Graph)
    model, ids = make_model(), random_ids()
    with hga.enabled(model, CONFIG):
        cache = read_and_decode(model, ids, 118, 122)
        assert alive_beside == [0]
        cache.decoding.generation += 1  # as when a buffer moves
        for at in range(122, 128):
            model(ids[:, at : at + 1], past_key_values=cache)
        assert cache.stepper._graph is made[-1]()
    assert alive_beside == ([0, 1] if room_for_two else [0, 1, 0])
    assert [graph() is not None for graph in made] == [False, True]


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_collected_in_a_capture(collects: bool, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only there, and the caller's own choice comes back; what a collection does to one is shown in test_gpu.py.

    The step runs in the capture alone: one that ran on its stream before makes the graph slower (NOTES).
    """
    for name in ("current_stream", "Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **kwargs: nullcontext())
    collected = list[bool]()

    def forward(**inputs: Tensor) -> SimpleNamespace:
        collected.append(gc.isenabled())
        if fails:
            raise RuntimeError("not permitted when stream is capturing")
        return SimpleNamespace(logits=None)

    ids = torch.zeros(1, 1, dtype=torch.long)
    (gc.enable if collects else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="capturing") if fails else nullcontext():
            step.StepGraph(torch.nn.Linear(2, 2), forward, "past_key_values", ids, ids)
        assert gc.isenabled() == collects
    finally:
        gc.enable()
    assert collected == [False]
