"""Saved contexts under faults that really happen: damaged files, full disks, killed processes, other models."""

import errno
import fcntl
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from asking import answer, new_cache, read
from rows import SMALL

import hga
from hga.cache import HGACache
from hga.cache.saved import SavedContext, read_context, verify_context
from hga.cache.saved.context import seal
from hga.cache.saved.file import lay_out, raw_bytes, replacing
from hga.store.reader import Reader

DOCUMENT = families.prompt(300)
PROMPT = torch.cat([DOCUMENT, families.prompt(20, seed=1)], 1)


@pytest.fixture
def model() -> Iterator[Any]:
    with hga.enabled(families.shared("llama"), SMALL) as enabled:
        yield enabled


@pytest.fixture
def path(model: Any, tmp_path: Path) -> Path:
    return save(model, tmp_path / "a.hga")


def save(model: Any, path: Path, tokens: int = 300) -> Path:
    cache = new_cache(model)
    read(model, families.prompt(tokens), cache)
    cache.save(path, model, families.prompt(tokens))
    return path


def no_report(done_bytes: int, all_bytes: int) -> None:
    pass


def flip(path: Path, offset: int, bit: int = 3) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def rewrite(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    """Give a file other metadata, with a header and a seal that are right for them."""
    saved = read_context(path)
    raw = path.read_bytes()
    old = saved.file
    metadata = json.loads(old.header[8:])["__metadata__"]
    change(metadata)
    new = lay_out(metadata, list(old.specs.values()))
    data = raw[len(old.header) :]
    path.write_bytes(new.header + data)
    start = new.offsets["checksums"]
    table = torch.frombuffer(
        bytearray(path.read_bytes()[start : start + 8 * old.specs["checksums"].shape[0]]), dtype=torch.int64
    )
    table[0] = seal(SavedContext(path, 0, "", SMALL, {}, "", (), new), table)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(raw_bytes(table))


# ---- damage ------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_found(model: Any, path: Path) -> None:
    saved = read_context(path)
    header = len(saved.file.header.rstrip())
    lengths = {name: spec.size_bytes for name, spec in saved.file.specs.items() if spec.size_bytes}
    offsets = [0, 5, 7, 8, 9, *range(10, header, 97), header, len(saved.file.header) - 1]  # length, JSON, spaces
    for name, size in lengths.items():
        if not name.endswith((".records", ".padding")):
            offsets += [saved.file.offsets[name] + place for place in (0, size // 2, size - 1)]
    for offset in offsets:
        flip(path, offset)
        with pytest.raises((ValueError, OSError), match=str(path)):
            HGACache.load(path, model)
        with pytest.raises((ValueError, OSError), match=str(path)):
            verify_context(path, no_report)
        flip(path, offset)
    verify_context(path, no_report)


@pytest.mark.parametrize("store", [None, "ram", "device", "nvme", "auto"])
def test_a_damaged_record_makes_no_token(model: Any, path: Path, store: str | None) -> None:
    saved = read_context(path)
    expected = answer(model, PROMPT, HGACache.load(path, model))
    size = saved.file.specs["layers.1.records"].size_bytes
    flip(path, saved.file.offsets["layers.1.records"] + size - 1)  # the last chunk's last head
    where = r"layer 1: the record of chunk 6, KV head 1 is damaged"
    with pytest.raises(ValueError, match=where):
        verify_context(path, no_report)
    if store in ("ram", "device"):
        with pytest.raises(ValueError, match=where):
            HGACache.load(path, model, store=store)
        return
    if store is not None:
        hga.enable(model, SMALL.replace(store=store))
    loaded = HGACache.load(path, model, store=store)
    untouched = loaded.fork()
    with pytest.raises(ValueError, match=where):
        answer(model, PROMPT, loaded)
    with pytest.raises(RuntimeError, match=r"interrupted.*cache.reset"):
        answer(model, PROMPT, loaded)
    with pytest.raises(ValueError, match=where):  # asked again, the record is still not there
        answer(model, PROMPT, untouched)
    loaded.reset()
    assert torch.equal(answer(model, PROMPT, loaded)[:, 0], expected[:, 0])
    flip(path, saved.file.offsets["layers.1.records"] + size - 1)
    assert torch.equal(answer(model, PROMPT, HGACache.load(path, model, store=store)), expected)


def test_a_record_that_was_read_is_not_asked_for_again(model: Any, path: Path) -> None:
    saved = read_context(path)
    loaded = HGACache.load(path, model)
    expected = answer(model, PROMPT, loaded.fork())
    for layer in loaded.layers:
        layer._stores[0].fill(list(range(7)))
    flip(path, saved.file.offsets["layers.1.records"])
    assert torch.equal(answer(model, PROMPT, loaded), expected)


def test_a_file_that_was_cut_off(model: Any, path: Path) -> None:
    whole = path.read_bytes()
    saved = read_context(path)
    for size in (0, 1, 7, 8, 100, 4095, 4096, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises((ValueError, OSError), match=f"{path}.*(no saved context|cut off)"):
            HGACache.load(path, model)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=r"and should have .* cut off or damaged"):
        HGACache.load(path, model)
    path.write_bytes(whole)
    loaded = HGACache.load(path, model)
    os.truncate(path, saved.file.offsets["layers.0.records"])  # under a cache that reads it
    with pytest.raises(OSError, match="it was cut off"):
        answer(model, PROMPT, loaded)


class Hanging:
    """A disk that stops in the middle: reads from an offset on take `seconds`, those before it none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 1.0) -> None:
        self.beyond: int | None = None
        self._seconds = seconds
        slow = functools.partial(Reader, preadv=self.read, deadline_seconds=0.3)
        monkeypatch.setattr("hga.cache.saved.file.Reader", slow)

    def read(self, descriptor: int, buffers: Any, offset: int) -> int:
        if self.beyond is not None and offset >= self.beyond:
            time.sleep(self._seconds)
        return os.preadv(descriptor, buffers, offset)


def test_a_disk_that_hangs_while_a_context_is_loaded(model: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = read_context(path)
    disk = Hanging(monkeypatch)
    places = {"header": 0, "table": saved.file.offsets["checksums"], "ids": saved.file.offsets["token_ids"]}
    for place in places.values():
        disk.beyond = place
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=f"reading from {path}: nothing came for 0.3 seconds"):
            HGACache.load(path, model)
        assert time.monotonic() - started < 5
    disk.beyond = saved.file.offsets["layers.0.records"]
    with pytest.raises(TimeoutError, match="the device hangs"):
        verify_context(path, no_report)
    with pytest.raises(TimeoutError, match="the device hangs"):
        HGACache.load(path, model, store="ram")
    disk.beyond = None
    assert HGACache.load(path, model).get_seq_length() == 300


def test_a_disk_that_hangs_at_the_first_question(model: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answer(model, PROMPT, HGACache.load(path, model))
    disk = Hanging(monkeypatch)
    loaded = HGACache.load(path, model)
    fork = loaded.fork()
    disk.beyond = 0
    with pytest.raises(TimeoutError, match=f"reading from {path}: nothing came for 0.3 seconds"):
        answer(model, PROMPT, loaded)
    with pytest.raises(RuntimeError, match="interrupted"):
        answer(model, PROMPT, loaded)
    disk.beyond = None
    assert torch.equal(answer(model, PROMPT, fork), expected)
    time.sleep(1.2)  # the late reads arrive
    assert torch.equal(answer(model, PROMPT, HGACache.load(path, model)), expected)


def test_two_records_that_changed_places(model: Any, path: Path) -> None:
    saved = read_context(path)
    start, size = saved.file.offsets["layers.0.records"], saved.layers[0].records.chunk_bytes
    raw = bytearray(path.read_bytes())
    raw[start : start + size], raw[start + size : start + 2 * size] = (
        raw[start + size : start + 2 * size],
        raw[start : start + size],
    )
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="chunk 0, KV head 0 is damaged"):
        HGACache.load(path, model, store="ram")


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100_000, b"\xff" * 5000, b"GGUF" + b"\1" * 9000, (1 << 62).to_bytes(8, "little") + b"{}" * 4000],
)
def test_files_of_other_kinds(model: Any, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "b.hga"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is no saved context"):
        HGACache.load(path, model)


def test_another_safetensors_file(model: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, tmp_path / "b.hga")
    with pytest.raises(ValueError, match="its header holds no metadata"):
        HGACache.load(tmp_path / "b.hga", model)
    save_file({"a": torch.zeros(3)}, tmp_path / "b.hga", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="a safetensors file, but no saved context of hga"):
        HGACache.load(tmp_path / "b.hga", model)


# ---- files of others ---------------------------------------------------------------------------------------


def test_a_newer_format(model: Any, path: Path) -> None:
    rewrite(path, lambda metadata: metadata.update(format_version="4"))
    with pytest.raises(ValueError, match=r"format version 4, this hga reads 3; it needs a newer hga"):
        HGACache.load(path, model)
    with pytest.raises(ValueError, match="it needs a newer hga"):
        read_context(path)


def test_an_older_format(model: Any, path: Path) -> None:
    rewrite(path, lambda metadata: metadata.update(format_version="2"))
    with pytest.raises(
        ValueError, match=r"format version '2', this hga reads 3; an older hga wrote it: read the document again"
    ):
        HGACache.load(path, model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3", "saved for another model: .*, this one has"),
        ("llama-linear", "saved for another model: rope_parameters=.*default.*, this one has .*linear"),
        ("llama-yarn", "saved for another model: rope_parameters="),
    ],
)
def test_another_model_or_rope(path: Path, name: str, message: str) -> None:
    with hga.enabled(families.shared(name), SMALL) as other, pytest.raises(ValueError, match=message):
        HGACache.load(path, other)


def test_another_type(path: Path) -> None:
    other = families.build("llama").float()
    with hga.enabled(other, SMALL), pytest.raises(ValueError, match="dtype=float64, this one has float32"):
        HGACache.load(path, other)


def test_other_weights(path: Path) -> None:
    other = families.build("llama")
    with torch.no_grad():
        other.lm_head.weight.add_(1e-3)
    with hga.enabled(other, SMALL), pytest.raises(ValueError, match="other weights of the same architecture"):
        HGACache.load(path, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 64}, "not the 300 tokens"),
        ({"group_size": 2, "node_size": 2, "overselection": "all"}, "does not follow from its metadata|should have"),
        ({"sink_tokens": 40, "budget_tokens": 64}, "not the 300 tokens|does not follow"),
        ({"ordering": "position"}, "does not follow from its metadata|should have"),
        ({"summary_dtype": "fp8"}, "does not follow from its metadata|should have"),
        ({"chunks": 3}, "unknown HGAConfig fields"),
    ],
)
def test_another_layout(model: Any, path: Path, changes: dict[str, Any], message: str) -> None:
    def change(metadata: dict[str, str]) -> None:
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | changes, sort_keys=True)

    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        HGACache.load(path, model)


@pytest.mark.parametrize("near", [[0, 76, 8], [2, 76, 0], [2, -76, 8], [2, 76], [2, 76, 1e300], [2, "76", 8]])
def test_a_layer_that_cannot_be(model: Any, path: Path, near: list[Any]) -> None:
    def change(metadata: dict[str, str]) -> None:
        layers = json.loads(metadata["layers"])
        layers[0]["near"] = near
        metadata["layers"] = json.dumps(layers)

    rewrite(path, change)
    with pytest.raises(ValueError, match="damaged: its metadata cannot be read"):
        HGACache.load(path, model)


def test_a_model_enabled_with_another_rule(path: Path) -> None:
    other = SMALL.replace(budget_tokens=64)
    with hga.enabled(families.shared("llama"), other) as enabled:
        loaded = HGACache.load(path, enabled)
        with pytest.raises(ValueError, match=r"call hga.enable\(model, cache.hga_config\)"):
            answer(enabled, PROMPT, loaded)


# ---- places ------------------------------------------------------------------------------------------------


def test_places_that_are_no_file(model: Any, path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    link, folder, pipe = tmp_path / "link", tmp_path / "folder", tmp_path / "pipe"
    link.symlink_to(path)
    folder.mkdir()
    os.mkfifo(pipe)
    for place, message in (
        (link, "is a symbolic link to .*; name the file itself"),
        (folder, "is a folder; name a file in it"),
        (pipe, "not a regular file"),
        (tmp_path / "nowhere" / "a.hga", "nowhere does not exist; create it first"),
        (path / "a.hga", "does not exist; create it first"),
    ):
        with pytest.raises(OSError, match=message):
            save(model, place)
    assert HGACache.load(link, model).get_seq_length() == 300  # reading through a link is harmless
    for place, message in ((folder, "it is a folder"), (pipe, "not a regular file"), (path / "a", "cannot be read")):
        with pytest.raises(OSError, match=message):
            HGACache.load(place, model)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.hga", "folder", "link", "pipe"]


_SAVE = """
import os, sys, families, hga, torch
from asking import new_cache, read
from rows import SMALL
def save(path, tokens=300, **options):
    with hga.enabled(families.shared("llama"), SMALL) as model:
        cache = new_cache(model)
        read(model, families.prompt(tokens), cache)
        cache.save(path, model, families.prompt(tokens), **options)
path = sys.argv[1]
"""


def start(script: str, path: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    command = [sys.executable, "-c", _SAVE + script, str(path), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    # Root may write anywhere: then the process becomes somebody else, once it is there and everything is imported.
    script = """
import hga.cache.saved
os.chdir(os.path.dirname(path))
with hga.enabled(families.shared("llama"), SMALL) as model:
    cache = new_cache(model)
    read(model, families.prompt(20), cache)
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        cache.save("a.hga", model, families.prompt(20))
    except PermissionError as error:
        print("refused:", error)
"""
    out, err = start(script, folder / "a.hga").communicate(timeout=120)
    assert "refused: cannot save to" in out, err
    assert "its folder cannot be written; choose another one" in out
    assert os.listdir(folder) == []


# ---- a full disk -------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root; the limit of a file's size stands for it")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(model: Any, small_disk: Path) -> None:
    path = save(model, small_disk / "a.hga", tokens=20)
    before = path.read_bytes()
    (small_disk / "rest").write_bytes(b"x" * 100_000)
    with pytest.raises(
        OSError, match=r"cannot save to .*: No space left on device. A file of .* bytes is needed"
    ) as full:
        save(model, path, tokens=900)
    assert full.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert sorted(os.listdir(small_disk)) == ["a.hga", "rest"]
    os.unlink(small_disk / "rest")
    save(model, path, tokens=100)
    assert read_context(path).tokens == 100


def test_a_disk_that_fills_while_it_is_written(model: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(model, small_disk / "a.hga", tokens=20)
    monkeypatch.setattr("hga.cache.saved.file._reserve", lambda descriptor, size: None)  # a file system that cannot
    with pytest.raises(OSError, match="No space left on device"):
        save(model, path, tokens=900)
    assert read_context(path).tokens == 20
    assert os.listdir(small_disk) == ["a.hga"]


def test_a_limit_on_files(model: Any, path: Path) -> None:
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(OSError, match=r"cannot save to .*: File too large"):
            save(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["a.hga"]


# ---- processes ---------------------------------------------------------------------------------------------


def test_sigkill_in_the_middle_of_a_save(model: Any, path: Path) -> None:
    before = path.read_bytes()
    script = """
def wait(done, whole):
    print("writing", flush=True)
    sys.stdin.read()
save(path, 600, report=wait)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    command = [sys.executable, "-c", _SAVE + script, str(path)]
    killed = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert killed.stdout.readline() == "writing\n"
        (partial,) = path.parent.glob(".a.hga.*.hga-partial")
        save(model, path, tokens=200)  # another save to the same path leaves a living writer's file alone
        assert partial.exists()
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=60)
    assert partial.exists()
    assert read_context(path).tokens == 200
    with pytest.raises(ValueError, match="no saved context"):  # half a file is never taken for one
        HGACache.load(partial, model)
    save(model, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["a.hga"]


def test_leftovers_of_others_are_left_alone(model: Any, path: Path) -> None:
    names = [".b.hga.12345678.hga-partial", ".a.hga.tmp", "a.hga.hga-partial"]
    for name in names:
        (path.parent / name).write_bytes(b"something")
    save(model, path)
    assert sorted(os.listdir(path.parent)) == sorted(["a.hga", *names])


def test_two_processes_save_to_one_path(model: Any, path: Path) -> None:
    script = """
for turn in range(6):
    save(path, int(sys.argv[2]))
"""
    runs = [start(script, path, tokens) for tokens in ("300", "500")]
    seen = set()
    try:
        deadline = time.monotonic() + 120
        while any(run.poll() is None for run in runs):
            assert time.monotonic() < deadline
            seen.add(verify_context(path, no_report).tokens)
    finally:
        for run in runs:
            run.kill()
            _, err = run.communicate()
            assert run.returncode == 0, err
    assert seen <= {300, 500}
    last = verify_context(path, no_report).tokens
    assert HGACache.load(path, model, store="ram").get_seq_length() == last
    assert os.listdir(path.parent) == ["a.hga"]


def test_a_writer_whose_file_was_taken_away_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, taken = tmp_path / "a.hga", []

    def lock(descriptor: int, operation: int) -> None:
        if not taken:  # between its creation and its lock another process took it for abandoned
            (partial,) = tmp_path.glob(".a.hga.*.hga-partial")
            partial.unlink()
            taken.append(partial)
        real_lock(descriptor, operation)

    real_lock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lock)
    with replacing(path, 5) as descriptor:
        os.write(descriptor, b"whole")
    assert taken
    assert path.read_bytes() == b"whole"


def test_a_writer_whose_file_is_about_to_be_taken_away_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, taken = tmp_path / "a.hga", []

    def lock(descriptor: int, operation: int) -> None:
        if not taken:  # another process holds the lock already, and removes the file later
            taken.extend(tmp_path.glob(".a.hga.*.hga-partial"))
            raise BlockingIOError
        real_lock(descriptor, operation)

    real_lock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lock)
    with replacing(path, 5) as descriptor:
        taken[0].unlink()
        os.write(descriptor, b"whole")
    assert path.read_bytes() == b"whole"


def test_an_interrupted_save_leaves_nothing(model: Any, path: Path) -> None:
    before = path.read_bytes()

    def interrupt(done_bytes: int, all_bytes: int) -> None:
        raise KeyboardInterrupt

    cache = new_cache(model)
    read(model, DOCUMENT, cache)
    with pytest.raises(KeyboardInterrupt):
        cache.save(path, model, DOCUMENT, report=interrupt)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["a.hga"]
    assert answer(model, PROMPT, cache).shape[0] == 40
