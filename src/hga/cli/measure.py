"""How `hga eval run` and its parts work: options become settings, missing rows are made and shown."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hga.cli.options import check_scored, load, parse_share, read_rules, read_text, split_names
from hga.cli.output import console, emit, in_bytes, say, table, token_progress
from hga.evals.summary import label, task_scores
from hga.models import check_positions

if TYPE_CHECKING:
    from hga.evals.results import Results, Row
    from hga.evals.suite import Settings


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `hga eval run`, and of its parts."""

    suite: str
    document: list[Path]
    tokens: str
    rules: str
    budget: str | None
    config: list[Path] | None
    model: str
    gguf_file: str | None
    rope_scaling: str | None
    device: str | None
    dtype: str | None
    out: Path | None
    minutes: float | None
    json: bool
    seed: int
    exact_prompt: bool = False
    score: str = "half"
    tasks: str = "all"
    examples: int = 8
    new_tokens: int = 256
    sample_tokens: int = 0


def measure(options: Options) -> None:
    """Make the rows that are missing; show them as they come, and what they come to."""
    texts = _texts(options.document)
    settings = _settings(options, texts)
    if options.minutes is not None and options.minutes <= 0:
        raise ValueError(f"--minutes {options.minutes} must be above 0")
    from hga.evals.results import open_results
    from hga.evals.suite import Suite, Unit, is_source, plan, run

    sources = {name for name, text in texts.items() if is_source(text)}
    if "tasks" in settings.parts and "code" in settings.tasks and len(sources) < len(texts):
        if not sources and options.tasks != "all":
            raise ValueError(f"task 'code' needs a source file; none of {', '.join(texts)} is one")
        say(f"no task 'code' on {', '.join(name for name in texts if name not in sources)}: no source code")
    units = plan(settings, sources)
    with open_results(options.out, settings.json()) as results:
        made = {Unit.of(row) for row in results.rows}
        missing = [unit for unit in units if unit not in made]
        if len(missing) < len(units):
            say(f"{len(units) - len(missing)} of {len(units)} rows are there already")
        left = 0
        if missing:
            loaded, tokenizer = load(
                options.model, options.gguf_file, options.rope_scaling, options.device, options.dtype
            )
            check_positions(loaded.config, max(settings.tokens))
            suite = Suite(loaded, tokenizer, settings, texts, results)
            results.append(_environment(loaded))
            with token_progress() as progress:
                done, bar = 0, progress.add_task("", total=sum(unit.read_tokens for unit in missing))

                def show(row: Row) -> None:
                    nonlocal done
                    done += Unit.of(row).read_tokens
                    progress.update(bar, completed=done, description=f"{len(results.rows)} rows")
                    emit(row) if options.json else say(_line(row))

                seconds = None if options.minutes is None else 60 * options.minutes
                left = run(suite, missing, seconds=seconds, at_row=show, progress=lambda n: progress.advance(bar, n))
        if not options.json:
            _show_tasks(results)
        if left:
            say(
                f"{options.minutes:g} minutes are over, {left} of {len(units)} rows are left"
                + ("" if options.out is None else "; the same command goes on")
            )
        if options.out is not None and not options.json:
            say(f"rows are in {options.out}; hga eval report {options.out} draws them")


def _texts(documents: list[Path]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for path in documents:
        if path.name in texts:
            raise ValueError(f"two documents are called {path.name}; rows name them by it, so rename one")
        texts[path.name] = read_text(path)
    return texts


def _settings(options: Options, texts: Mapping[str, str]) -> Settings:
    """Options as settings. ValueError for an unknown part, rule or task, or a number out of range."""
    from hga.evals.exam import check_tasks
    from hga.evals.suite import PARTS, Settings, sha256
    from hga.evals.tasks import TASKS

    parts = tuple(split_names(options.suite))
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"--suite {options.suite!r} must name parts of {', '.join(PARTS)}")
    check_scored(options.score, options.exact_prompt)
    lengths = tuple(_count(text, "--tokens", 5) for text in split_names(options.tokens))
    budgets = None if options.budget is None else tuple(split_names(options.budget))
    for budget in budgets or ():
        parse_share(budget)
    names, own = read_rules(options.rules, options.config)
    rules = [name for name in names if name != "dense"]
    for name, value, least in (
        ("--examples", options.examples, 1),
        ("--new-tokens", options.new_tokens, 2),
        ("--sample-tokens", options.sample_tokens, 0),
    ):
        _count(value, name, least)
    return Settings(
        model=_label(options),
        loaded={name: getattr(options, name) for name in ("gguf_file", "rope_scaling", "dtype")},
        documents={name: sha256(text) for name, text in texts.items()},
        parts=parts,
        tokens=lengths,
        rules=tuple(rules),
        budgets=budgets or (None,),
        own={name: config.to_json() for name, config in own.items()},
        score_all=options.score == "all",
        tasks=tuple(check_tasks(TASKS if options.tasks == "all" else split_names(options.tasks))),
        examples=options.examples,
        new_tokens=options.new_tokens,
        sample_tokens=options.sample_tokens,
        seed=options.seed,
        exact_prompt=options.exact_prompt,
    )


def _label(options: Options) -> str:
    """The model's name in rows: its file's, its folder's, or its id; and how its positions are stretched."""
    folder = Path(options.model).expanduser()
    if options.gguf_file is not None:
        name = Path(options.gguf_file).stem
    else:
        name = folder.resolve().name if folder.is_dir() else options.model
    return name if options.rope_scaling is None else f"{name} {options.rope_scaling}"


def _count(value: str | int, option: str, least: int) -> int:
    try:
        count = int(value)
    except ValueError as error:
        raise ValueError(f"{option} {value!r} must be a number of tokens") from error
    if count < least:
        raise ValueError(f"{option} {count} must be at least {least}")
    return count


def _environment(model: Any) -> dict[str, Any]:
    """A row that says what the rows after it were measured with."""
    import torch
    import transformers

    from hga import __version__

    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    return {
        "kind": "run",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hga": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hardware": gpu or platform.processor() or platform.machine(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _line(row: Row) -> str:
    """A row for the reader who waits."""
    head = f"{row['document']}, {row['tokens']:,} tokens, {label(row)}: "
    match row["kind"]:
        case "nll":
            gap = (
                ""
                if row["rule"] == "dense"
                else f", gap {row['gap_nats']:+.4f} ± {row['se_nats']:.4f}, KL {row['kl_mean']:.4f}"
            )
            what = f"nll {row['nll']:.4f}{gap}, {row['attended']:.1%} attended, {in_bytes(row['mean_device_bytes'])}"
        case "task":
            what = f"{row['task']} {row['example']}: {row['score']:.2f}"
        case "agreement":
            first = row["first_divergence"]
            what = f"{row['equal']:.1%} of {row['new_tokens']} tokens as dense, " + (
                "no divergence" if first is None else f"the first other one is number {first + 1}"
            )
        case _:
            what = f"drift {row['drift_nats']:+.4f} ± {row['drift_se']:.4f} over {row['new_tokens']} sampled tokens"
    return f"{head}{what} ({row['seconds']:.0f} s)"


def _show_tasks(results: Results) -> None:
    scores = task_scores(results.rows)
    if not scores:
        return
    shown = table("task", "tokens", "rule", "replies", "score", "± se", "of dense")
    for score in sorted(scores, key=lambda score: (score.tokens, score.task == "all", score.task)):
        shown.add_row(
            score.task,
            f"{score.tokens:,}",
            f"{score.rule} {score.budget or ''}".rstrip(),
            str(score.replies),
            f"{score.score:.2f}",
            "" if score.se is None else f"{score.se:.2f}",
            "" if score.of_dense is None else f"{score.of_dense:.0%}",
        )
    console.print(shown)
