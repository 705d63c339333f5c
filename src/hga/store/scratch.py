"""The scratch file of a store, and what is on its way into it. Nothing of it outlives the process."""

from __future__ import annotations

import errno
import functools
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hga.store.host import HostBlock
from hga.store.reader import DEADLINE_SECONDS, OpenFile, shared_threads
from hga.store.traffic import Traffic

SCRATCH_VARIABLE = "HGA_SCRATCH"
QUEUED_BYTES = 64 << 20
"""Most that all stores of a process have on their way to files."""

Pwritev = Callable[[int, Sequence[memoryview], int], int]


def scratch_folder() -> str:
    """The folder that HGA_SCRATCH names, else the system's for temporary files."""
    return os.environ.get(SCRATCH_VARIABLE) or tempfile.gettempdir()


def check_disk_room(wanted_bytes: int, purpose: str) -> None:
    """OSError (ENOSPC) if the scratch folder's file system has no room for `wanted_bytes` more for `purpose`."""
    folder = scratch_folder()
    try:
        system = os.statvfs(folder)
    except (OSError, AttributeError):  # whoever opens the file there will say what is wrong
        return
    free_bytes = system.f_bavail * system.f_frsize
    if wanted_bytes > free_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{purpose} needs {wanted_bytes:,} bytes in the scratch folder {folder}, whose disk has {free_bytes:,} "
            f"left. Give a shorter prompt, free the disk, or set {SCRATCH_VARIABLE} to a folder on another one",
        )


def open_scratch() -> OpenFile:
    """A nameless file in the scratch folder. OSError if that cannot be written to."""
    folder = scratch_folder()
    name = f"a scratch file in {folder}"
    try:
        descriptor = _open_nameless(folder)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot make {name}: {error.strerror}; set {SCRATCH_VARIABLE} to a folder on a disk with room",
        ) from error
    file = OpenFile(descriptor, name)
    if _in_memory(folder):
        _warn_in_memory(folder)

    def write(page: memoryview) -> None:
        os.pwritev(descriptor, [page], 0)

    file.try_direct(write)
    os.ftruncate(descriptor, 0)
    return file


def _open_nameless(folder: str) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(folder, flags | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
    descriptor, path = tempfile.mkstemp(prefix="hga-", dir=folder)
    os.unlink(path)
    return descriptor


def _in_memory(folder: str) -> bool:
    """Whether a folder is on tmpfs, whose files are host memory."""
    device = os.stat(folder).st_dev
    mark = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    return any(line.split()[2] == mark and line.split(" - ")[1].split()[0] == "tmpfs" for line in mounts)


@functools.cache
def _warn_in_memory(folder: str) -> None:
    warnings.warn(
        f"the scratch folder {folder} is a tmpfs: what is written there takes host memory. Set {SCRATCH_VARIABLE} to a "
        "folder on a disk",
        RuntimeWarning,
        stacklevel=2,
    )


def reserve(file: OpenFile, old_bytes: int, new_bytes: int) -> None:
    """Make a file `new_bytes` long with room on the disk for all of them, or leave it at `old_bytes`.

    OSError if the disk, or the process's limit on file sizes, has no room.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.descriptor, old_bytes, new_bytes - old_bytes)
        else:
            os.ftruncate(file.descriptor, new_bytes)
    except OSError as error:
        os.ftruncate(file.descriptor, old_bytes)  # a reservation that failed keeps what it got
        raise OSError(
            error.errno,
            f"no room for {new_bytes - old_bytes:,} bytes more in {file.name}, which holds {old_bytes:,}: "
            f"{error.strerror}. Free the disk, or set {SCRATCH_VARIABLE} to a folder on another one",
        ) from error


@dataclass(frozen=True)
class _Block:
    """Consecutive chunks on their way to the file; `rows` is the numpy view (n, bytes) of their memory."""

    ids: list[int]
    memory: HostBlock
    rows: Any
    offset: int


class WriteBehind:
    """Chunks on their way to one file, written in order by a thread that all files share. They can be read meanwhile.

    error: what a write ended with. The chunks of that write and of those behind it stay in memory and readable.
    """

    def __init__(self, file: OpenFile, traffic: Traffic, *, pwritev: Pwritev = os.pwritev) -> None:
        """pwritev: what writes; another one stands for a faulty device."""
        self.file = file
        self.error: OSError | None = None
        self._traffic = traffic
        self._pwritev = pwritev
        self._blocks: dict[int, _Block] = {}  # the newest of each chunk
        self._lock = threading.Lock()  # none is replaced between the writer's look at it and its removal
        self._cancelled = False
        self._threads = shared_threads("hga-write", 1)

    def put(self, ids: list[int], memory: HostBlock, offset: int) -> None:
        """Queue chunks (n rows of equal size) for an offset; wait while the queue is full."""
        rows: Any = memory.bytes.view(len(ids), -1).numpy()
        size_bytes = memory.bytes.numel()
        _ROOM.take(size_bytes, self.file.name)
        self._traffic.queue_write(size_bytes)
        block = _Block(ids, memory, rows, offset)
        with self._lock:
            self._blocks.update(dict.fromkeys(ids, block))
        self._threads.submit(functools.partial(self._write, block))

    def find(self, chunk: int) -> Any:
        """The bytes of a chunk that is not in the file yet, None if it is."""
        block = self._blocks.get(chunk)
        return None if block is None else block.rows[block.ids.index(chunk)]

    def forget(self, chunk: int) -> None:
        """A chunk is not needed any more."""
        self._blocks.pop(chunk, None)

    @property
    def busy(self) -> bool:
        """Whether there are chunks that are not in the file yet."""
        return bool(self._blocks)

    def cancel(self) -> None:
        """Write nothing more."""
        self._cancelled = True
        self._blocks.clear()

    def _write(self, block: _Block) -> None:
        size_bytes = block.memory.bytes.numel()
        try:
            if self.error is None and not self._cancelled:
                self._write_whole(block)
                with self._lock:
                    for chunk in block.ids:
                        if self._blocks.get(chunk) is block:
                            self._blocks.pop(chunk, None)
        except Exception as error:  # whatever it is, other files need the thread
            number, cause = (error.errno, error.strerror) if isinstance(error, OSError) else (errno.EIO, repr(error))
            self.error = OSError(
                number, f"writing {size_bytes:,} bytes at offset {block.offset:,} of {self.file.name}: {cause}"
            )
        finally:
            self._traffic.queue_write(-size_bytes)
            _ROOM.give(size_bytes)

    def _write_whole(self, block: _Block) -> None:
        raw, done = memoryview(block.rows).cast("B"), 0
        while done < len(raw):
            written = self._pwritev(self.file.descriptor, [raw[done:]], block.offset + done)
            if written <= 0:
                raise OSError(errno.EIO, "the device took no byte")
            self._traffic.add_write(written)
            done += written


class _Room:
    """Bytes that may be on their way to files at once."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._used_bytes = limit_bytes, 0
        self._changed = threading.Condition()

    def take(self, size_bytes: int, name: str) -> None:
        """Wait for room; what is larger than all of it waits until it is empty. TimeoutError if nothing moves."""
        with self._changed:
            while self._used_bytes and self._used_bytes + size_bytes > self._limit_bytes:
                if not self._changed.wait(DEADLINE_SECONDS):
                    raise TimeoutError(
                        errno.ETIMEDOUT,
                        f"writing to {name}: nothing moved for {DEADLINE_SECONDS:g} seconds; the device hangs",
                    )
            self._used_bytes += size_bytes

    def give(self, size_bytes: int) -> None:
        """Give room back."""
        with self._changed:
            self._used_bytes -= size_bytes
            self._changed.notify_all()


_ROOM = _Room(QUEUED_BYTES)
