"""Host memory: how much is left, and page-locked blocks of it that a GPU copies from and reads by address."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

GIB = 1 << 30
RESERVE_BYTES = GIB
"""Left to the rest of the machine: activations on a CPU, page tables, other programs."""

_PIECE_BYTES = 64 * GIB  # one registration: larger ones fail on some drivers
_PORTABLE_AND_MAPPED = 1 | 2  # cudaHostRegister's flags: pinned for every GPU, readable by kernels
_CAN_USE_HOST_POINTER = 91  # CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
_NO_LIMIT = 1 << 60  # v1 writes the largest number of pages that it can count
_SYSTEM = Path("/")

# ---- how much is left ----------------------------------------------------------------------------------


def available_host_bytes() -> int | None:
    """Bytes that this process can still take from host memory; None where nothing tells.

    The smaller of what the machine has left (Linux's MemAvailable, which counts the page cache that can be
    dropped) and what each control group of this process has left (v1 and v2, up to the root: limit less usage,
    without inactive page cache). A machine whose memory grows as it is used sets no bound of its own, since its
    MemAvailable says what is there now and not what can be had; its control groups still do.
    """
    bounds = [_machine_bytes(), *_control_group_bytes()]
    return min((bound for bound in bounds if bound is not None), default=None)


class HostRoomError(MemoryError):
    """A wish for host memory that is not there. missing_bytes: how much would have to be freed first."""

    def __init__(self, message: str, missing_bytes: int) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


def check_host_room(wanted_bytes: int, purpose: str, reserve_bytes: int = RESERVE_BYTES) -> None:
    """HostRoomError if `wanted_bytes` more for `purpose` would leave the host less than `reserve_bytes`."""
    _unpin_what_was_left()
    available = available_host_bytes()
    if available is not None and wanted_bytes > available - reserve_bytes:
        raise HostRoomError(
            f"{purpose} needs {_in_bytes(wanted_bytes)} of host memory; {_in_bytes(available)} are available, of "
            f"which {_in_bytes(reserve_bytes)} stay in reserve. Give a shorter prompt or fewer rows, free host "
            "memory, or raise the control group's limit",
            wanted_bytes - (available - reserve_bytes),
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; PyTorch raises a plain RuntimeError for that on a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def return_freed_memory() -> None:
    """Give what was freed back to the system, where the C library can; takes some milliseconds a GiB.

    glibc keeps freed blocks that lie between others. Forwards over prompts of ever new lengths leave ever new gaps.
    """
    trim = _trimmer()
    if trim is not None:
        trim(0)


@functools.cache
def _trimmer() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None


def _machine_bytes() -> int | None:
    """MemAvailable, plus what the kernel has not brought up yet; None if that is unknown or without a fixed end."""
    memory = _read_fields("proc/meminfo", r"^(\w+):\s+(\d+) kB", 1024)
    total = memory.get("MemTotal", 0)
    if "MemAvailable" not in memory or total > _PHYSICAL_AT_IMPORT or _hot_plugs():
        return None
    dormant = _PHYSICAL_AT_IMPORT - total
    # A kernel keeps a few percent for itself; a tenth missing is memory that a balloon or a lazy start holds back.
    return memory["MemAvailable"] + (dormant if dormant > _PHYSICAL_AT_IMPORT // 10 else 0)


def _hot_plugs() -> bool:
    """Whether a virtual machine may be given more memory while it runs."""
    return any((_SYSTEM / "sys/bus/virtio/drivers/virtio_mem").glob("virtio*"))


def _physical_bytes() -> int:
    """Physical memory that the kernel knows of, whether or not it has handed it out."""
    pages = re.findall(r"^\s+present\s+(\d+)", _read("proc/zoneinfo"), re.MULTILINE)
    total = _read_fields("proc/meminfo", r"^(MemTotal):\s+(\d+) kB", 1024).get("MemTotal", 0)
    return max(total, sum(map(int, pages)) * mmap.PAGESIZE)


def _control_group_bytes() -> list[int]:
    """What each limited control group of this process has left, its own and those above it."""
    left = []
    for line in _read("proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, limit, usage, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # In a container the path may be the host's and not exist here: the mount's root is then its own group.
        for folder in (group.strip("/"), *map(str, Path(group.strip("/")).parents)):
            here = f"{root}/{folder}"
            allowed = _read(f"{here}/{limit}").strip()
            if allowed.isdigit() and int(allowed) < _NO_LIMIT:  # v2 says "max" for none
                used = int(_read(f"{here}/{usage}").strip() or 0)
                droppable = _read_fields(f"{here}/memory.stat", r"^(\w+) (\d+)").get(cache, 0)
                left.append(max(0, int(allowed) - used + droppable))
    return left


def _read(path: str) -> str:
    try:
        return (_SYSTEM / path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _read_fields(path: str, pattern: str, unit: int = 1) -> dict[str, int]:
    return {name: int(number) * unit for name, number in re.findall(pattern, _read(path), re.MULTILINE)}


def _in_bytes(count: int) -> str:
    return f"{count:,} bytes ({count / GIB:.2f} GiB)" if count >= GIB // 10 else f"{count:,} bytes"


_PHYSICAL_AT_IMPORT = _physical_bytes()

# ---- page-locked blocks --------------------------------------------------------------------------------

# Python's default is shared memory, which gets no huge pages; Windows has no such choice.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


@dataclass(frozen=True)
class HostBlock:
    """Bytes of host memory, uint8 (n,), given back when the last tensor that views them is gone.

    pinned: whether they are page-locked: a GPU then copies from them at full speed. gpu_readable: whether its
    kernels may also read them by address, which few platforms forbid.
    """

    bytes: Tensor
    pinned: bool
    gpu_readable: bool


def allocate_host(size_bytes: int, gpu: torch.device | None = None) -> HostBlock:
    """A block of exactly `size_bytes`, page-locked for `gpu` if one is named.

    If the driver refuses to lock it, the block is pageable and one warning a process says so. MemoryError if the
    system refuses the bytes themselves.
    """
    try:
        mapping = _Mapping(-1, size_bytes, **_PRIVATE)
    except (OSError, ValueError, OverflowError) as error:
        raise MemoryError(
            f"the system refused {_in_bytes(size_bytes)} of host memory ({error}); free host memory, or raise the "
            "process's limit (ulimit -v)"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)  # pages come 5 times faster, and gathers miss the TLB less
    block = torch.frombuffer(mapping, dtype=torch.uint8)
    if gpu is None:
        return HostBlock(block, pinned=False, gpu_readable=False)
    if hasattr(mmap, "MADV_DONTFORK"):
        mapping.madvise(mmap.MADV_DONTFORK)  # a fork would copy pinned pages at once, or fail to
    pinned = mapping.pin(block.data_ptr(), gpu)
    return HostBlock(block, pinned, gpu_readable=pinned and _reads_by_address(gpu))


class _Mapping(mmap.mmap):
    """Anonymous memory that is unpinned before it is unmapped. The tensors made from it keep it alive."""

    _pinned: tuple[int, ...] = ()
    _gpu: torch.device | None = None

    def pin(self, address: int, gpu: torch.device) -> bool:
        """Page-lock all bytes, or none with a warning; returns whether it was done."""
        size, self._gpu = len(self), gpu
        for start in range(0, size, _PIECE_BYTES):
            refusal = _register(address + start, min(_PIECE_BYTES, size - start), gpu)
            if refusal is not None:
                self.unpin()
                _warn_unpinned(refusal)
                return False
            self._pinned = (*self._pinned, address + start)
        return True

    def unpin(self) -> bool:
        """Unlock what is locked; returns whether nothing is any more."""
        if self._pinned and self._gpu is not None:
            self._pinned = _unregister(self._pinned, self._gpu)
        return not self._pinned

    def __del__(self) -> None:
        if not sys.is_finalizing() and not self.unpin():  # an ending process gives everything back by itself
            _LOCKED_STILL.append(self)  # unmapped while it is locked, its addresses could never be locked again


_LOCKED_STILL: deque[_Mapping] = deque()


def _unpin_what_was_left() -> None:
    for _ in range(len(_LOCKED_STILL)):
        try:
            mapping = _LOCKED_STILL.popleft()
        except IndexError:  # another thread was faster
            return
        if not mapping.unpin():
            _LOCKED_STILL.append(mapping)


def _register(address: int, size_bytes: int, gpu: torch.device) -> str | None:
    """Page-lock memory; returns None, or why the driver refused."""
    with torch.cuda.device(gpu):
        runtime = torch.cuda.cudart()
        result = runtime.cudaHostRegister(address, size_bytes, _PORTABLE_AND_MAPPED)
        if result == runtime.cudaError.success:
            return None
        _take_back_error(gpu)
        return str(runtime.cudaGetErrorString(result))


def _unregister(addresses: tuple[int, ...], gpu: torch.device) -> tuple[int, ...]:
    """Unlock memory once nothing on the GPU copies from it or reads it any more; returns what is locked still."""
    try:
        if torch.cuda.is_current_stream_capturing():  # to wait for the GPU would end the capture
            return addresses
        torch.cuda.synchronize(gpu)
    except RuntimeError:  # another thread captures, or the GPU has failed
        return addresses
    runtime = torch.cuda.cudart()
    left = tuple(one for one in addresses if runtime.cudaHostUnregister(one) != runtime.cudaError.success)
    if left:
        _take_back_error(gpu)
    return left


def _take_back_error(gpu: torch.device) -> None:
    """CUDA repeats an error to whoever asks next: ask here, so that no innocent kernel launch gets it."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=gpu)


@functools.cache
def _reads_by_address(gpu: torch.device) -> bool:
    """Whether kernels may use the host's own addresses of locked memory; asked of the driver, torch does not say."""
    can = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    index = torch.cuda.current_device() if gpu.index is None else gpu.index
    refused = driver.cuDeviceGetAttribute(ctypes.byref(can), _CAN_USE_HOST_POINTER, index)
    return not refused and bool(can.value)


@functools.cache
def _warn_unpinned(refusal: str) -> None:
    warnings.warn(
        f"the driver refused to page-lock host memory ({refusal}): the archive stays in pageable memory, from which "
        "a GPU reads about 7 times slower, and kernels cannot read it by address. Raise the limit on locked memory "
        "(ulimit -l; docker run --ulimit memlock=-1), or free host memory",
        RuntimeWarning,
        stacklevel=2,
    )
