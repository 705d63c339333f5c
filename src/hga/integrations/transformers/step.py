"""One decode step of a whole model: the host's bookkeeping, then the forward, as a CUDA graph where that works."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hga.cache import HGACache

_log = logging.getLogger("hga")
_EAGER_STEPS = 2  # a graph pays from the third step on

Forward = Callable[..., Any]


class StepGraph:
    """A forward of one token a row, captured. It serves until a buffer of its cache moves."""

    def __init__(self, forward: Forward, cache: HGACache, input_ids: Tensor, position_ids: Tensor) -> None:
        """Inside `cache.begin_token()`: the captured step may run again and again for one token."""
        self.generation = cache.decoding.generation
        self._ids, self._positions = input_ids.clone(), position_ids.clone()
        stream = _capture_stream(input_ids.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels and makes the libraries allocate
            forward(input_ids=self._ids, position_ids=self._positions)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._out = forward(input_ids=self._ids, position_ids=self._positions)

    def replay(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        """The model's output for these tokens (B, 1) at these positions (B, 1)."""
        self._ids.copy_(input_ids)
        self._positions.copy_(position_ids)
        self._graph.replay()
        out = copy.copy(self._out)
        out.logits = self._out.logits.clone()  # the next replay overwrites them
        return out


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: libraries keep a workspace for each stream that they see.

    Of high priority, so that the chain of small kernels overtakes what is launched beside it.
    """
    return torch.cuda.Stream(device, priority=-1)


class Stepper:
    """Decodes tokens of one model and cache: eagerly at first, then by a graph, eagerly again if that fails."""

    def __init__(self, capturable: bool) -> None:
        self._capturable = capturable
        self._graph: StepGraph | None = None
        self._eager_steps = 0
        self._generation = -1

    def step(self, forward: Forward, cache: HGACache, input_ids: Tensor, position_ids: Tensor | None) -> Any:
        """Read one token a row (B, 1); returns what `forward(input_ids=..., position_ids=...)` does."""
        with cache.begin_token():
            if position_ids is None:
                position_ids = torch.tensor(cache.positions(), device=input_ids.device)[:, None]
            generation = cache.decoding.generation
            if generation != self._generation:
                self._graph, self._eager_steps, self._generation = None, 0, generation
            if self._graph is None and self._capturable and self._eager_steps >= _EAGER_STEPS:
                self._graph = self._capture(forward, cache, input_ids, position_ids)
            if self._graph is not None:
                return self._graph.replay(input_ids, position_ids)
            self._eager_steps += 1
            return forward(input_ids=input_ids, position_ids=position_ids)

    def _capture(self, forward: Forward, cache: HGACache, input_ids: Tensor, position_ids: Tensor) -> StepGraph | None:
        try:
            return StepGraph(forward, cache, input_ids, position_ids)
        except RuntimeError as error:
            self._capturable = False
            _log.warning(
                "decoding without a CUDA graph: the model's step cannot be captured (%s). Mixtures of experts need "
                "model.set_experts_implementation('batched_mm')",
                str(error).split("\n")[0],
            )
            return None


def can_capture(model: Any) -> bool:
    """Whether a model's step can be captured at all: every weight on one CUDA device. Logs why not."""
    devices = {str(parameter.device) for parameter in model.parameters()}
    devices |= {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values() if place != ""}
    kinds = {device if device.isalpha() else "cuda" for device in devices}
    if kinds != {"cuda"} or len({str(parameter.device) for parameter in model.parameters()}) > 1:
        _log.info("decoding without a CUDA graph: the weights are spread over %s", ", ".join(sorted(devices)))
        return False
    return True
