"""Options that several commands share, and the checks that turn them into values."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from hga.cli.output import byte_progress, in_bytes, messages, say
from hga.config import PRESETS, HGAConfig
from hga.models import SMOLLM2, RopeScaling, cached_path, fetch, is_intact

Json = Annotated[bool, typer.Option("--json", help="Print JSON lines on stdout, everything else on stderr.")]
Model = Annotated[
    str,
    typer.Option("--model", metavar="M", help=f"{SMOLLM2.name}, a local folder, or a Hugging Face hub id."),
]
GgufFile = Annotated[
    str | None,
    typer.Option("--gguf-file", metavar="F", help="A GGUF file in the model's folder: load that one."),
]
Preset = Annotated[str, typer.Option("--preset", metavar="P", help=f"How to route: {', '.join(PRESETS)}.")]
Budget = Annotated[
    int | None,
    typer.Option("--budget", metavar="N", help="Exact tokens a query, instead of the preset's own number."),
]
Prefill = Annotated[
    str,
    typer.Option(
        "--prefill",
        metavar="HOW",
        help="How a long prompt is read: auto, exactly; nodes, by whole nodes: sooner from 32K tokens on, at a loss.",
    ),
]
Configs = Annotated[
    list[Path] | None,
    typer.Option("--config", metavar="FILE", help="A JSON config; its file name without .json is the rule."),
]
ExactPrompt = Annotated[
    bool,
    typer.Option(
        "--exact-prompt",
        help="Read densely what is neither scored nor written, as hga reads prompts by default; else all is routed.",
    ),
]
Store = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="S",
        help="Where old K/V live: ram, device, nvme (a scratch file in HGA_SCRATCH), or auto: ram, nvme beyond it.",
    ),
]
RamCache = Annotated[
    float | None,
    typer.Option("--ram-cache-gb", metavar="G", help="Host memory for K/V with --store nvme or auto, in GiB."),
]
Rope = Annotated[
    str | None,
    typer.Option(
        "--rope-scaling",
        metavar="TYPE:FACTOR",
        help="Stretch the model's positions: yarn:4 reads four times its trained length; or linear:FACTOR.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, ...; by default a CUDA device if there is one."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16; by default the checkpoint's (float32 for GGUF)."),
]


def routing(preset: str, budget: int | None, ram_cache_gb: float | None = None, **changes: Any) -> HGAConfig:
    """The preset with its budget and RAM cache replaced if given. ValueError as `HGAConfig.preset`."""
    if ram_cache_gb is not None:
        if not 0 < ram_cache_gb < math.inf:
            raise ValueError(f"--ram-cache-gb {ram_cache_gb} must be above 0")
        changes["ram_cache_bytes"] = max(1, int(ram_cache_gb * 2**30))
    if budget is not None:
        changes["budget_tokens"] = budget
    return HGAConfig.preset(preset, **changes)


def saved_routing(context: Path, config: HGAConfig, options: str) -> HGAConfig:
    """The rule by which a saved context was read, which is the one that goes on, in the store that is asked for.

    ValueError where another rule is asked. options: those that ask for it.
    """
    from hga.cache.saved import read_context

    saved = read_context(context)
    rule = config.replace(store=saved.config.store, ram_cache_bytes=None)
    if rule not in (saved.config, HGAConfig(store=saved.config.store)):
        raise ValueError(
            f"{context} was read by another routing rule (budget_tokens={saved.config.budget_tokens}; see hga context "
            f"info); leave {options} out"
        )
    store = saved.config.store if config.store == "ram" else config.store  # "ram" is asked for by default
    return saved.config.replace(store=store, ram_cache_bytes=config.ram_cache_bytes)


def split_names(text: str) -> list[str]:
    """Names apart from their commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def read_rules(rules: str, config: list[Path] | None) -> tuple[list[str], dict[str, HGAConfig]]:
    """Names of the rules asked for, and the configs among them by name. ValueError for a file that is no config."""
    own = {path.stem: HGAConfig.from_json(read_text(path)) for path in config or []}
    return list(dict.fromkeys([*split_names(rules), *own])), own


def read_text(path: Path) -> str:
    """A file's text. ValueError if it is missing, no file, or not UTF-8."""
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not a text file" if path.is_dir() else f"file {path} does not exist")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first, for example "
            "iconv -f LATIN1 -t UTF-8"
        ) from error


def parse_share(text: str) -> float:
    """Read 1/32 or 0.03125. ValueError for another form."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--budget {text!r} must be a share of the context such as 1/32 or 0.03125") from error


def check_scored(score: str, exact_prompt: bool) -> None:
    """ValueError unless --score is known and leaves a prompt to what wants one."""
    if score not in ("half", "all"):
        raise ValueError(f"--score {score} must be half or all")
    if exact_prompt and score == "all":
        raise ValueError("--score all leaves no prompt before what is scored; leave it or --exact-prompt out")


def load(
    model: str,
    gguf_file: str | None = None,
    rope_scaling: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> tuple[Any, Any]:
    """Load model and tokenizer with a sign of life on stderr. ValueError for a bad option or model."""
    scaling = None if rope_scaling is None else RopeScaling.parse(rope_scaling)
    types = ("float32", "bfloat16", "float16")
    if dtype is not None and dtype not in types:
        raise ValueError(f"--dtype {dtype} must be one of {', '.join(types)}")
    if model == SMOLLM2.name and gguf_file is None:
        fetch_with_progress()
    with messages.status(f"loading {model} ..."):
        import torch

        from hga.models import load_model

        _check_device(device)
        return load_model(
            model,
            gguf_file,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=device,
            rope_scaling=scaling,
        )


def fetch_with_progress() -> Path:
    """Path of the default model's file, fetched with progress on stderr if need be. OSError as `fetch`."""
    if not is_intact():
        say(f"{SMOLLM2.name} ({in_bytes(SMOLLM2.size)}) is fetched once, into {cached_path().parent}")
    with byte_progress() as progress:
        task = progress.add_task("unpacking", total=SMOLLM2.size, visible=False)
        return fetch(report=lambda copied: progress.update(task, completed=copied, visible=True))


def _check_device(device: str | None) -> None:
    import torch

    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here: {cause}") from error
