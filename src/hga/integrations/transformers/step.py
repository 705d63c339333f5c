"""One decode step of a whole model: the host's bookkeeping, then the forward, as a CUDA graph where that works."""

from __future__ import annotations

import copy
import functools
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hga.cache import HGACache

_log = logging.getLogger("hga")
_EAGER_STEPS = 2  # a graph pays from the third step on

_REFUSED = "_hga_capture_failed"

Forward = Callable[..., Any]


class StepGraph:
    """A forward of one token a row, captured. It serves until a buffer of its cache or a weight moves."""

    def __init__(self, model: Any, forward: Forward, argument: str, input_ids: Tensor, position_ids: Tensor) -> None:
        """Inside `cache.begin_token()`: the captured step may run again and again for one token.

        argument: the name by which the forward takes its cache.
        """
        self._weights = list(model.parameters())
        self._pointers = list(map(Tensor.data_ptr, self._weights))
        self._ids, self._positions = input_ids.clone(), position_ids.clone()
        device = input_ids.device
        current, stream = torch.cuda.current_stream(device), _capture_stream(device)
        self._graph = torch.cuda.CUDAGraph()
        # Entered again here, the current stream comes back even where a failed capture leaves its own in place.
        with torch.cuda.device(device), torch.cuda.stream(current):
            _allocate_workspace(device, stream)
            capture = torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local")
            with _garbage_kept(), capture:
                self._out = forward(input_ids=self._ids, position_ids=self._positions)
        self._argument = argument
        setattr(self._out, argument, None)  # a cycle with the cache would keep its memory until it is collected

    def serves(self) -> bool:
        """Whether the weights are where they were captured."""
        return list(map(Tensor.data_ptr, self._weights)) == self._pointers

    def replay(self, cache: HGACache, input_ids: Tensor, position_ids: Tensor) -> Any:
        """The model's output for these tokens (B, 1) at these positions (B, 1)."""
        self._ids.copy_(input_ids)
        self._positions.copy_(position_ids)
        self._graph.replay()
        out = copy.copy(self._out)
        out.logits = self._out.logits.clone()  # the next replay overwrites them
        setattr(out, self._argument, cache)
        return out


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """No garbage collection: a graph or locked memory that is freed asks of the driver what ends a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures, on which next to nothing runs.

    A step that ran there before it was captured left each kernel of the graph 0.42 us behind the last instead of 0.1
    (H200, driver 580; `benchmarks/NOTES.md`), and the steps before it have compiled its kernels.
    """
    return torch.cuda.Stream(device)


def _allocate_workspace(device: torch.device, stream: torch.cuda.Stream) -> None:
    """Have cuBLAS make what it keeps for this thread and stream: in a capture it fails, or takes the graph's memory."""
    with torch.cuda.stream(stream):
        one = torch.ones(16, 16, device=device)
        torch.mm(one, one)


class Stepper:
    """Decodes tokens of one model and cache: eagerly at first, then by a graph, eagerly again if that fails."""

    def __init__(self, model: Any, inner: Forward, argument: str) -> None:
        """inner: the model's own forward, which tells one model from another that uses the same cache.

        argument: the name by which it takes its cache.
        """
        self.inner = inner
        self._argument = argument
        self._model = model
        self._capturable = _can_capture(model)
        self._graph: StepGraph | None = None
        self._outdated: StepGraph | None = None  # kept until there is another: see `_capture`
        self._eager_steps = 0
        self._generation = -1
        self._told = False  # that a step cannot be captured because of its store

    def step(self, forward: Forward, cache: HGACache, input_ids: Tensor, position_ids: Tensor | None) -> Any:
        """Read one token a row (B, 1); returns what `forward(input_ids=..., position_ids=...)` does."""
        rows = input_ids.shape[0]
        if position_ids is None:  # pad tokens count, as in transformers
            position_ids = torch.full((rows, 1), cache.get_seq_length(), device=input_ids.device)
        position_ids = position_ids.expand(rows, 1)
        with cache.begin_token():
            moved, apart = cache.decoding.generation != self._generation, not cache.can_capture_token()
            if moved or apart or (self._graph is not None and not self._graph.serves()):
                self._outdated = None if apart else (self._graph or self._outdated)
                self._graph, self._eager_steps, self._generation = None, 0, cache.decoding.generation
            if apart and not self._told:
                self._told = True
                _log.info("decoding without a CUDA graph: the host brings a part of the archive in each step")
            if self._graph is None and self._capturable and self._eager_steps >= _EAGER_STEPS:
                self._graph = self._capture(forward, cache, input_ids, position_ids)
            if self._graph is not None:
                return self._graph.replay(cache, input_ids, position_ids)
            self._eager_steps += 1
            return forward(input_ids=input_ids, position_ids=position_ids)

    def _capture(self, forward: Forward, cache: HGACache, input_ids: Tensor, position_ids: Tensor) -> StepGraph | None:
        """The step's graph, or None where that fails.

        An outdated one goes only now: were it gone before the eager steps, the kernels of this one would lie 0.42 us
        apart from the second time on, not 0.1 (H200, driver 580). If there is no memory for both, it is tried again
        without it.
        """
        try:
            return StepGraph(self._model, forward, self._argument, input_ids, position_ids)
        except RuntimeError as error:
            cache.abandon_token()  # it may have ended inside a layer; the step is run again, eagerly
            if isinstance(error, torch.OutOfMemoryError) and self._outdated is not None:
                self._eager_steps = 0
                return None
            self._capturable = False
            setattr(self._model, _REFUSED, True)  # a failed capture costs memory: not again for the next cache
            _log.warning(
                "decoding without a CUDA graph: the model's step cannot be captured (%s)", str(error).split("\n")[0]
            )
            return None
        finally:
            self._outdated = None


def _can_capture(model: Any) -> bool:
    """Whether to try to capture a model's step: every weight on one CUDA device, no adapters. Logs why not."""
    if getattr(model, _REFUSED, False):
        return False
    places = {str(parameter.device) for parameter in model.parameters()}
    mapped = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values() if place != ""}
    kinds = {place if place.isalpha() else "cuda" for place in places | mapped}
    reason = None
    if kinds != {"cuda"} or len(places) > 1:
        reason = f"the weights are spread over {', '.join(sorted(places | mapped))}"
    elif getattr(model, "peft_config", None) is not None or getattr(model, "_hf_peft_config_loaded", False):
        reason = "the model has adapters, which may be switched between steps"
    elif _loops_over_experts(model):
        reason = "its experts run in a loop; call model.set_experts_implementation('batched_mm')"
    if reason is not None:
        _log.info("decoding without a CUDA graph: %s", reason)
    return reason is None


def _loops_over_experts(model: Any) -> bool:
    """Whether a step depends on which experts its token chooses. Checkpoints make dense models "eager", too."""
    config = model.config.get_text_config(decoder=True)
    has_experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
    return bool(has_experts) and getattr(model.config, "_experts_implementation", None) == "eager"
