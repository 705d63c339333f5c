"""`hga eval tasks`, `generate`, `run` and `report`: the suite over models, documents, lengths, rules and budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hga.cli.measure import Options, measure
from hga.cli.options import Configs, Device, Dtype, ExactPrompt, GgufFile, Json, Model, Rope
from hga.cli.output import in_bytes, say
from hga.models import SMOLLM2

# typer reads options off signatures, so each command lists its own; `Options` has all of them by the same names.
Documents = Annotated[
    list[Path], typer.Option("--document", metavar="FILE", help="UTF-8 text to read; several are measured in turn.")
]
Lengths = Annotated[str, typer.Option("--tokens", metavar="N,...", help="Context lengths.")]
Rules = Annotated[
    str, typer.Option("--rules", help="Presets, window, or names given by --config; dense is always measured.")
]
Budgets = Annotated[
    str | None,
    typer.Option("--budget", metavar="F,...", help="Exact tokens a query as shares of the context: 1/32,1/16."),
]
Tasks = Annotated[str, typer.Option("--tasks", help="Task names; by default all that the documents can be used for.")]
Examples = Annotated[int, typer.Option("--examples", metavar="N", help="Of each task, document and length.")]
Seed = Annotated[int, typer.Option("--seed", help="Of tasks and samples.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", metavar="N", help="Tokens decoded greedily.")]
SampleTokens = Annotated[int, typer.Option("--sample-tokens", metavar="N", help="Tokens sampled; 0 for none.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", help="Keep rows here; the same command resumes an unfinished run."),
]
Minutes = Annotated[float | None, typer.Option("--minutes", help="Begin no further measurement after so many minutes.")]


def tasks(
    document: Documents,
    tokens: Lengths = "4096",
    rules: Rules = "balanced",
    budget: Budgets = "1/32",
    config: Configs = None,
    exact_prompt: ExactPrompt = False,
    tasks: Tasks = "all",
    examples: Examples = 8,
    seed: Seed = 0,
    model: Model = SMOLLM2.name,
    gguf_file: GgufFile = None,
    rope_scaling: Rope = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Out = None,
    minutes: Minutes = None,
    json: Json = False,
) -> None:
    """Ask for what stands in a long context, and count right answers: dense's, and each rule's against them.

    Needles, chains of variables, common words, JSON records, and constants of source code (where a document is
    such), made from a seed and the documents' text. A rule's score says little where dense scores low.

    Example: hga eval tasks --document book.txt --tokens 4096 --rules balanced,lean --budget 1/32
    """
    measure(Options(suite="tasks", **locals()))


def generate(
    document: Documents,
    tokens: Lengths = "4096",
    rules: Rules = "balanced",
    budget: Budgets = "1/32",
    config: Configs = None,
    exact_prompt: ExactPrompt = False,
    new_tokens: NewTokens = 256,
    sample_tokens: SampleTokens = 0,
    seed: Seed = 0,
    model: Model = SMOLLM2.name,
    gguf_file: GgufFile = None,
    rope_scaling: Rope = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Out = None,
    minutes: Minutes = None,
    json: Json = False,
) -> None:
    """Write behind a document: how long a rule's greedy text is dense's, and how far its samples drift.

    Prompt and continuation end together at --tokens.

    Example: hga eval generate --document book.txt --tokens 8192 --rules balanced --sample-tokens 4096
    """
    measure(Options(suite="generate", **locals()))


def run(
    document: Documents,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Keep rows here; the same command resumes.")],
    suite: Annotated[str, typer.Option("--suite", help="Parts, in this order.")] = "nll,tasks,generate",
    tokens: Lengths = "4096,8192",
    rules: Rules = "contiguous,lean,balanced",
    budget: Budgets = "1/32",
    config: Configs = None,
    exact_prompt: ExactPrompt = False,
    score: Annotated[
        str, typer.Option("--score", help="Positions that nll scores: half (the second) or all.")
    ] = "half",
    tasks: Tasks = "all",
    examples: Examples = 8,
    new_tokens: NewTokens = 256,
    sample_tokens: SampleTokens = 0,
    seed: Seed = 0,
    model: Model = SMOLLM2.name,
    gguf_file: GgufFile = None,
    rope_scaling: Rope = None,
    device: Device = None,
    dtype: Dtype = None,
    minutes: Minutes = None,
    json: Json = False,
) -> None:
    """Measure a model on documents, all of it in one folder: losses, tasks, long generation. Then: hga eval report.

    Rows are kept as they come. A run that was killed, or ended by --minutes, goes on where it was when the command
    is given again; with other settings the folder is refused.

    Example: hga eval run --document a.txt --document b.c --tokens 4096,8192 --budget 1/32,1/16 --out results
    """
    measure(Options(**locals()))


def report(
    folder: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Folders of hga eval run.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="By default report.html in the first folder.")
    ] = None,
) -> None:
    """Draw the rows of one or several runs into one HTML file that opens without a network.

    Every .jsonl file in a folder is read, so that rows of other commands can be put beside those of a run. Needs
    matplotlib: pip install 'hga[report]'.

    Example: hga eval report results --output report.html
    """
    from hga.evals.report import write_report
    from hga.evals.results import read_folder

    rows = [row for path in folder for row in read_folder(path)]
    target = output or folder[0] / "report.html"
    if target.is_dir():
        raise ValueError(f"--output {target} is a folder; name a file")
    try:
        text = write_report(rows, f"hga: {', '.join(dict.fromkeys(str(r['model']) for r in rows if 'model' in r))}")
    except ImportError as error:
        raise ValueError(str(error)) from error
    target.write_text(text, encoding="utf-8")
    say(f"{target} ({in_bytes(len(text.encode()))})")
