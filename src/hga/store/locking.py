"""Methods of which one runs at a time, whichever thread calls them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Locked(Protocol):
    """What has a lock of its own."""

    @property
    def lock(self) -> Any:
        """An `RLock`: methods that run alone call each other."""


S = TypeVar("S", bound=Locked)


def alone(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Let other threads wait: a prefill fetches beside its routing, and may be interrupted while it does."""

    @functools.wraps(method)
    def locked(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **kwargs)

    return locked
