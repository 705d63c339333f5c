"""The file of a saved context: a safetensors file whose data start on a page, and its atomic writing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from hga.store.reader import PAGE_BYTES, OpenFile, Reader
from hga.store.traffic import Traffic

Buffer = bytes | memoryview

LARGEST_HEADER_BYTES = 1 << 20
"""Some hundred bytes a tensor, ten tensors a layer: far more than any model needs. It bounds what is parsed."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I16": torch.int16,
    "U8": torch.uint8,
}
"""safetensors' names of the types that a context holds."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_EXTENT_BYTES = 1 << 20  # read at once: a slow disk moves that much well within the deadline
_PARTIAL = ".hga-partial"
_LENGTH_BYTES = 8
_TRIES = 16


class Spec(NamedTuple):
    """A tensor of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Its bytes. Python's integers: a hostile shape overflows nothing."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class FileLayout:
    """Where everything is. offsets: bytes from the file's start to each tensor."""

    header: bytes
    specs: dict[str, Spec]
    offsets: dict[str, int]
    size_bytes: int


def lay_out(metadata: Mapping[str, str], specs: Sequence[Spec]) -> FileLayout:
    """The only header and the only offsets that a file of these metadata and tensors has."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for spec in specs:
        starts[spec.name], end = end, end + spec.size_bytes
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [starts[spec.name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % PAGE_BYTES)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return FileLayout(
        header=header,
        specs={spec.name: spec for spec in specs},
        offsets={name: len(header) + start for name, start in starts.items()},
        size_bytes=len(header) + end,
    )


def read_header(reader: Reader) -> tuple[bytes, dict[str, str]]:
    """A file's header as it is, and its metadata. ValueError if it is no safetensors header of ours."""
    path, size_bytes = reader.file.name, os.fstat(reader.file.descriptor).st_size
    head = _read_bytes(reader, 0, min(_LENGTH_BYTES, size_bytes))
    length = int.from_bytes(head, "little")
    if len(head) < _LENGTH_BYTES or length > min(size_bytes - _LENGTH_BYTES, LARGEST_HEADER_BYTES):
        raise ValueError(f"{path} is no saved context: its {size_bytes:,} bytes do not begin with a header")
    text = _read_bytes(reader, _LENGTH_BYTES, length)
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{path} is no saved context, or its header is damaged ({error})") from error
    metadata = entries.get("__metadata__") if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} is no saved context: its header holds no metadata, or they are damaged")
    return head + text, metadata


def open_to_read(path: Path) -> Reader:
    """What reads a regular file, under a deadline; closed with its last user. OSError that says what else is there."""
    try:
        # A named pipe would make an ordinary open wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no saved context at {path}") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no saved context: it is {'a folder' if path.is_dir() else 'not a regular file'}")
    return Reader(OpenFile(descriptor, str(path)), Traffic())


def read_into(reader: Reader, target: memoryview, offset: int) -> None:
    """Fill `target` from `offset` on. OSError if the file ends before; after a TimeoutError drop the target."""
    starts = range(0, len(target), _EXTENT_BYTES)
    reader.read([offset + start for start in starts], [[target[start : start + _EXTENT_BYTES]] for start in starts])


def _read_bytes(reader: Reader, offset: int, count: int) -> bytes:
    read = bytearray(count)
    read_into(reader, memoryview(read), offset)
    return bytes(read)


def checksum(*parts: Buffer) -> int:
    """xxh3 of some bytes, as a signed number of 64 bits."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "big", signed=True)


def write_at(descriptor: int, source: memoryview, offset: int) -> None:
    """Write all of `source` at `offset`."""
    done = 0
    while done < len(source):
        done += os.pwrite(descriptor, source[done:], offset + done)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, shared with it."""
    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


@contextmanager
def replacing(path: Path, size_bytes: int) -> Iterator[int]:
    """A descriptor to write `size_bytes` to; they become the file at `path` when the block ends, or never.

    The bytes go to a temporary file in the same folder, of the name `.NAME.RANDOM.hga-partial`, which is reserved
    whole, written, flushed to disk and then renamed. An error removes it; what a killed process has left behind
    is removed by the next save to this path, which knows it by its name and by the lock that only a living writer
    holds. OSError for a symbolic link, a folder or anything else at `path` that is no regular file, for a folder
    that cannot be written, and for a full disk.
    """
    check_place(path)
    try:
        _remove_abandoned(path)
        partial, descriptor = _open_partial(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot save to {path}: its folder cannot be written ({error.strerror})") from error
    try:
        _reserve(descriptor, size_bytes)
        yield descriptor
        os.fsync(descriptor)
        check_place(path)
        os.replace(partial, path)
    except OSError as error:
        _remove(partial)
        if error.strerror is None or str(path) in str(error):
            raise
        raise OSError(
            error.errno,
            f"cannot save to {path}: {error.strerror}. A file of {size_bytes:,} bytes is needed; free some disk "
            "space or choose another folder. Nothing was changed",
        ) from error
    except BaseException:
        _remove(partial)
        raise
    finally:
        os.close(descriptor)
    _flush_folder(path.parent)


def check_place(path: Path) -> None:
    """OSError if nothing can be saved at `path`: a symbolic link, a folder, or in a folder that cannot be written."""
    if path.is_symlink():
        raise OSError(f"cannot save to {path}: it is a symbolic link to {os.readlink(path)}; name the file itself")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot save to {path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise IsADirectoryError(f"cannot save to {path}: it is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise OSError(f"cannot save to {path}: it is not a regular file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot save to {path}: its folder cannot be written; choose another one")


def _open_partial(path: Path) -> tuple[Path, int]:
    """A new, locked temporary file beside `path`."""
    for _ in range(_TRIES):
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        taken = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:
            pass  # a file system without locks: nothing is cleaned up there either
        # Another save may take it for abandoned before it is locked, and remove it now or soon.
        if not taken and _is_same(partial, descriptor):
            return partial, descriptor
        os.close(descriptor)
    raise OSError(errno.EAGAIN, "other saves to this path took its temporary file away, again and again")


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of saves to `path` whose process is gone."""
    for partial in path.parent.glob(f".{_literal(path.name)}.*{_PARTIAL}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its writer lives
                partial.unlink()
            finally:
                os.close(descriptor)


def _literal(name: str) -> str:
    """A file's name as a pattern that matches nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(descriptor))
    except OSError:
        return False


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Find out about a full disk before anything is written."""
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot reserve
            raise


def _remove(partial: Path) -> None:
    with contextlib.suppress(OSError):
        partial.unlink()


def _flush_folder(folder: Path) -> None:
    """Make the rename last: a crash of the machine then finds the new file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name comes twice")
    return entries


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
