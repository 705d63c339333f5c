"""A bounded cache of pieces in host memory: a slot table with batched look-ups, and sampled LRU."""

from __future__ import annotations

from typing import Any

import numpy as np

from hga.store.host import allocate_host

_SAMPLE = 4  # slots looked at for each that is taken
_NOTHING = -1


class PieceCache:
    """Pieces of equal size by number, in a fixed number of slots. What no batch has used for long goes first."""

    def __init__(self, slots: int, piece_bytes: int) -> None:
        """MemoryError if the system refuses the address space. Memory is taken as slots are first used."""
        self.slots = slots
        self.piece_bytes = piece_bytes
        self._block = allocate_host(slots * piece_bytes)
        self.memory: Any = self._block.bytes.view(slots, piece_bytes).numpy()
        self.raw: memoryview = self.memory.data.cast("B")
        self._slot_of: Any = np.empty(0, np.int32)  # by piece
        self._mark: Any = np.empty(0, np.int32)  # by piece, for a look at a batch
        self._piece_of: Any = np.full(slots, _NOTHING, np.int64)
        self._used: Any = np.zeros(slots, np.int64)  # number of the last batch that used a slot
        self._batch = 0
        self._fresh = 0  # slots from here on were never taken
        self._freed: list[int] = []
        self._hand = 0

    def grow(self, pieces: int) -> None:
        """Make numbers below `pieces` known."""
        added = np.full(pieces - len(self._slot_of), _NOTHING, np.int32)
        self._slot_of = np.concatenate([self._slot_of, added])
        self._mark = np.empty(pieces, np.int32)

    def find(self, pieces: Any) -> Any:
        """Slots of pieces, negative where one is not cached."""
        return self._slot_of[pieces]

    def find_distinct(self, pieces: Any) -> tuple[Any, Any]:
        """Distinct ones of pieces, ascending, and which of them each is. Marks are quicker than sorting all."""
        turn, mark = np.arange(len(pieces), dtype=np.int32), self._mark
        mark[pieces] = turn
        distinct = np.sort(pieces[mark[pieces] == turn])  # each once: where it comes last
        mark[distinct] = turn[: len(distinct)]
        return distinct, mark[pieces]

    def begin(self, slots: Any) -> None:
        """Begin a batch that uses these slots: they stay while it lasts."""
        self._batch += 1
        self._used[slots] = self._batch

    def take(self, count: int) -> Any:
        """Slots for that many pieces of the batch; what was in them is forgotten. At most `slots` in a batch."""
        taken = [self._freed.pop() for _ in range(min(count, len(self._freed)))]
        fresh = min(count - len(taken), self.slots - self._fresh)
        taken += range(self._fresh, self._fresh + fresh)
        self._fresh += fresh
        if len(taken) < count:
            victims = self._choose(count - len(taken))
            self._slot_of[self._piece_of[victims]] = _NOTHING
            self._piece_of[victims] = _NOTHING
            return np.concatenate([np.array(taken, np.int64), victims])
        return np.array(taken, np.int64)

    def put(self, pieces: Any, slots: Any) -> None:
        """The slots, taken before, hold these pieces now."""
        self._slot_of[pieces] = slots
        self._piece_of[slots] = pieces
        self._used[slots] = self._batch

    def give_back(self, slots: Any) -> None:
        """Slots that were taken hold nothing after all."""
        self._freed.extend(slots.tolist())

    def forget(self, pieces: Any) -> None:
        """Drop pieces where they are cached."""
        slots = self._slot_of[pieces]
        slots = slots[slots >= 0]
        self._slot_of[self._piece_of[slots]] = _NOTHING
        self._piece_of[slots] = _NOTHING
        self._freed.extend(slots.tolist())

    @property
    def free(self) -> int:
        """Slots that can be taken without forgetting anything."""
        return len(self._freed) + self.slots - self._fresh

    @property
    def held_bytes(self) -> int:
        """Bytes of memory touched, and of the tables."""
        tables = (self._slot_of, self._mark, self._piece_of, self._used)
        return self._fresh * self.piece_bytes + sum(int(table.nbytes) for table in tables)

    def _choose(self, count: int) -> Any:
        """The longest unused of the slots behind the hand; none that the batch uses."""
        sampled = min(self.slots, _SAMPLE * count)
        candidates = (self._hand + np.arange(sampled)) % self.slots
        self._hand = int(self._hand + sampled) % self.slots
        usable = candidates[self._usable(candidates)]
        if len(usable) < count:
            usable = np.flatnonzero(self._usable(np.arange(self.slots)))
        if len(usable) > count:
            usable = usable[np.argpartition(self._used[usable], count - 1)[:count]]
        return np.sort(usable)  # neighbours of a file that come to neighbours are one buffer

    def _usable(self, slots: Any) -> Any:
        return (self._used[slots] < self._batch) & (self._piece_of[slots] != _NOTHING)


def take_rows(pieces: Any, piece: Any, row: Any, out: Any) -> None:
    """Copy rows of pieces (n, bytes), cut into rows as wide as those of `out`, to it."""
    width, row_bytes = pieces.shape[1], out.shape[1]
    per_piece, padding = divmod(width, row_bytes)
    if padding:
        out[:] = pieces[:, : per_piece * row_bytes].reshape(len(pieces), -1, row_bytes)[piece, row]
    else:
        pieces.reshape(-1, row_bytes).take(piece * per_piece + row, 0, out, "clip")
