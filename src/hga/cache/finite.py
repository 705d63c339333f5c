"""Whether new K/V are finite numbers: asked on their device at once, answered when the device has come to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class FiniteCheck:
    """The question for the keys and values (Hkv, T, D) of positions from `first` on."""

    def __init__(self, keys: Tensor, values: Tensor, first: int) -> None:
        self._positions = (first, first + keys.shape[1] - 1)
        # One NaN or Inf makes the sum so; in float64 finite numbers of a narrower type cannot.
        self._sum = keys.sum(dtype=torch.float64) + values.sum(dtype=torch.float64)
        self._answer = self._sum.to("cpu", non_blocking=keys.is_cuda)
        self._come = torch.cuda.current_stream(keys.device).record_event() if keys.is_cuda else None

    @property
    def is_late(self) -> bool:
        """Whether the answer is to come."""
        return self._come is not None

    def clear(self, numbers: Tensor) -> Tensor:
        """The numbers, all zero if one of K/V is not finite: what may be kept before that is known."""
        return numbers.where(self._sum.isfinite(), 0)

    def wait(self) -> None:
        """ValueError if a number is NaN or infinite."""
        if self._come is not None:
            self._come.synchronize()
        if not math.isfinite(self._answer):
            raise ValueError(
                f"keys or values of positions {self._positions[0]} to {self._positions[1]} hold NaN or Inf; a summary "
                "would spread them over a whole chunk. Check the model's dtype (float16 overflows) and its inputs"
            )
