"""`hga eval`: what routing loses on a document; `nll` is here, the suite in `suite.py`, `recall` in `recall.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hga.cli import recall, suite
from hga.cli.options import (
    Configs,
    Device,
    Dtype,
    ExactPrompt,
    GgufFile,
    Json,
    Model,
    Rope,
    check_scored,
    load,
    parse_share,
    read_rules,
    read_text,
)
from hga.cli.output import console, emit, in_bytes, table, token_progress
from hga.models import SMOLLM2, check_positions

if TYPE_CHECKING:
    from hga.evals.nll import RuleScore

app = typer.Typer()
app.command("recall")(recall.recall)
app.command("tasks")(suite.tasks)
app.command("generate")(suite.generate)
app.command("run")(suite.run)
app.command("report")(suite.report)


@app.callback()
def evaluate() -> None:
    """Measure fidelity on real text."""


@app.command("nll")
def nll(
    document: Annotated[Path, typer.Option("--document", metavar="FILE", help="UTF-8 text to read.")],
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="Read the first N tokens of it.")] = 8192,
    rules: Annotated[
        str,
        typer.Option("--rules", help="Presets, dense, window, other systems' rules, or names given by --config."),
    ] = "dense,contiguous,balanced",
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="F", help="Exact tokens a query as a share of N: 1/32 or 0.03125."),
    ] = None,
    score: Annotated[str, typer.Option("--score", help="Positions to score: half (the second) or all.")] = "half",
    exact_prompt: ExactPrompt = False,
    config: Configs = None,
    model: Model = SMOLLM2.name,
    gguf_file: GgufFile = None,
    rope_scaling: Rope = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Score the second half of a document under each rule: one row a rule, with the distance from dense attention.

    Every token is scored under teacher forcing through the real cache, routed from the first token on unless
    --exact-prompt is given. gap: nats a token above dense; KL: of what each would write next, dense || rule; top-1: how
    often the likeliest token is the same. JSON rows have the losses by position too.

    Example: hga eval nll --document book.txt --tokens 8192 --rules dense,paper,balanced --budget 1/6
    """
    names, own = read_rules(rules, config)
    text = read_text(document)
    share = None if budget is None else parse_share(budget)
    if tokens < 5:
        raise ValueError(f"--tokens {tokens} must be at least 5, so that there is a second half to score")
    check_scored(score, exact_prompt)
    from hga.evals.nll import evaluate_nll, first_tokens
    from hga.evals.rule import resolve_rules

    resolved = resolve_rules(names, tokens, share, own)
    loaded, tokenizer = load(model, gguf_file, rope_scaling, device, dtype)
    check_positions(loaded.config, tokens)
    ids = first_tokens(tokenizer, text, tokens).to(loaded.device)
    scores: list[RuleScore] = []
    with token_progress() as progress:
        tasks = {rule: progress.add_task(rule, total=tokens - 1) for rule in resolved}
        for made in evaluate_nll(
            loaded,
            ids,
            resolved,
            score_from=0 if score == "all" else None,
            exact_prompt=exact_prompt,
            progress=lambda rule, n: progress.advance(tasks[rule], n),
        ):
            scores.append(made)
            if json:
                about = {"kind": "nll", "model": model, "document": document.name, "budget": budget}
                emit(about | {"exact_prompt": exact_prompt} | made.row())
    if not json:
        _show(document.name, tokens, scores)


def _show(document: str, tokens: int, scores: list[RuleScore]) -> None:
    console.print(f"{document}, {tokens:,} tokens, means over the last {scores[0].scored:,}", style="bold")
    columns = ("rule", "budget", "attended", "fetched", "nll", "gap", "± se", "KL", "top-1", "beside model", "s")
    shown = table(*columns)
    for score in scores:
        gap = ("", "") if score.gap_nats is None else (f"{score.gap_nats:+.4f}", f"{score.se_nats:.4f}")
        shown.add_row(
            score.rule,
            "" if score.budget_tokens is None else f"{score.budget_tokens:,}",
            f"{score.attended:.1%}",
            f"{score.fetched:.1%}",
            f"{score.nll:.4f}",
            *gap,
            "" if score.kl_mean is None else f"{score.kl_mean:.4f}",
            "" if score.top1_agreement is None else f"{score.top1_agreement:.1%}",
            in_bytes(score.mean_device_bytes),
            f"{score.seconds:.0f}",
        )
    console.print(shown)
