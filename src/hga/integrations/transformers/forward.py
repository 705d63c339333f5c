"""A model's forward with a cache, by whatever name this version of transformers calls it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import DynamicCache


def cache_argument(model: Any) -> str:
    """The name by which a model's forward takes its cache: "cache" from transformers 5.24 on."""
    innermost = inspect.unwrap(model.forward)
    return _argument_of(getattr(innermost, "__func__", innermost))


@functools.cache
def _argument_of(forward: Callable[..., Any]) -> str:
    """Of a class's function: it holds no model, and a signature takes too long to be read at every token."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def forward_with_cache(model: Any, ids: Tensor, cache: DynamicCache, logits_to_keep: int = 1) -> Any:
    """The model's output for tokens (B, T) that follow those of its cache; logits of the last ones, of all for 0."""
    return model(ids, use_cache=True, logits_to_keep=logits_to_keep, **{cache_argument(model): cache})


def split_evenly(first: int, last: int, most: int) -> list[tuple[int, int]]:
    """Cut a prompt's tokens [first, last) into blocks of at most `most`, of one size but for rounding.

    A last block that is much shorter would be read otherwise than the rest (`HGAConfig.prefill`).
    """
    count = last - first
    blocks = -(-count // most)
    return [(first + count * i // blocks, first + count * (i + 1) // blocks) for i in range(blocks)]
