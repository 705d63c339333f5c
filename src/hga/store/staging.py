"""Page-aligned memory that is borrowed for a read, and lent again: new pages cost a third of what reading them does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hga.store.host import HostBlock, allocate_host

STAGED_BYTES = 8 << 20
"""Read at once into borrowed memory."""

_SPARE: defaultdict[torch.device | None, list[HostBlock]] = defaultdict(list)  # by the GPU that it is page-locked for


@contextmanager
def borrow(size_bytes: int, gpu: torch.device | None = None) -> Iterator[HostBlock]:
    """At least so many bytes, page-locked for `gpu`; nothing may use them when the block ends.

    After an error they are not lent again: a late read may still write to them.
    """
    spare = _SPARE[gpu]
    try:
        block = spare.pop()  # atomic: threads borrow different ones
    except IndexError:
        block = None
    if block is None or block.bytes.numel() < size_bytes:
        block = allocate_host(max(size_bytes, STAGED_BYTES), gpu)
    yield block
    if not spare and block.bytes.numel() == STAGED_BYTES:
        spare.append(block)
