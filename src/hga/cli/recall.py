"""`hga eval recall`: which layers and heads a rule loses in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hga.cli.options import (
    Configs,
    Device,
    Dtype,
    GgufFile,
    Json,
    Model,
    Rope,
    load,
    parse_share,
    read_rules,
    read_text,
)
from hga.cli.output import console, emit, messages, table
from hga.models import SMOLLM2, check_positions

if TYPE_CHECKING:
    from hga.evals.recall import Recall

_WORST = 3


def recall(
    document: Annotated[Path, typer.Option("--document", metavar="FILE", help="UTF-8 text to read.")],
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="Read the first N tokens of it.")] = 8192,
    rules: Annotated[
        str, typer.Option("--rules", help="Presets, window, other systems' rules, or names given by --config.")
    ] = "contiguous,balanced",
    budget: Annotated[
        str, typer.Option("--budget", metavar="F", help="Exact tokens a query as a share of N: 1/32 or 0.03125.")
    ] = "1/32",
    config: Configs = None,
    queries: Annotated[int, typer.Option("--queries", metavar="N", help="Positions sampled in the second half.")] = 256,
    model: Model = SMOLLM2.name,
    gguf_file: GgufFile = None,
    rope_scaling: Rope = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Show where a rule loses: dense attention mass that it attends to exactly, and error of the attention output.

    The document is read once, densely; each layer also attends by each rule, simulated, for sampled queries. So each
    layer's error is its own, not what it inherits. --json prints one row a layer and query head.

    Example: hga eval recall --document book.txt --tokens 8192 --rules contiguous,balanced,quest
    """
    names, own = read_rules(rules, config)
    text = read_text(document)
    share = parse_share(budget)
    from hga.evals.nll import first_tokens
    from hga.evals.recall import measure_recall
    from hga.evals.rule import resolve_rules

    resolved = {name: rule for name, rule in resolve_rules(names, tokens, share, own).items() if rule is not None}
    if not resolved:
        raise ValueError(f"--rules {rules} names no rule that could lose anything; for example contiguous,balanced")
    loaded, tokenizer = load(model, gguf_file, rope_scaling, device, dtype)
    check_positions(loaded.config, tokens)
    ids = first_tokens(tokenizer, text, tokens).to(loaded.device)
    with messages.status(f"reading {tokens:,} tokens under {len(resolved)} rules ..."):
        found = measure_recall(loaded, ids, resolved, queries=queries)
    if json:
        for measured in found:
            for row in measured.rows():
                emit({"kind": row.pop("kind"), "model": model, "document": document.name} | row)
    else:
        _show(document.name, tokens, found)


def _show(document: str, tokens: int, found: list[Recall]) -> None:
    console.print(f"{document}, {tokens:,} tokens, sampled queries of the second half", style="bold")
    shown = table("rule", "attended", "fetched", "recalled", "output error", "worst layer.head")
    for measured in found:
        error = measured.output_error
        order = error.flatten().argsort(descending=True)[:_WORST].tolist()
        heads = error.shape[1]
        worst = (f"{measured.layers[i // heads]}.{i % heads} {error.flatten()[i]:.2f}" for i in order)
        shown.add_row(
            measured.rule,
            f"{measured.attended:.1%}",
            f"{measured.fetched:.1%}",
            f"{measured.recalled.mean():.1%}",
            f"{error.mean():.3f}",
            ", ".join(worst),
        )
    console.print(shown)
