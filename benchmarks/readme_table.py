"""Write the tables of figures in README.md and docs/fidelity.md from `results/`, or check that they say the same.

python benchmarks/readme_table.py            # rewrites the tables between their markers
python benchmarks/readme_table.py --check    # exit code 1 if one is out of date
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from hga.cache.layout import summary_bytes_per_token
from hga.config import HGAConfig

_FOLDER = Path(__file__).parent
_README = _FOLDER.parent / "README.md"
_DETAIL = _FOLDER.parent / "docs" / "fidelity.md"
_MARKS = "<!-- {0}: begin -->\n", "<!-- {0}: end -->\n"
_RULES = ("contiguous", "lean", "balanced", "mixed")
_LENGTHS = (8192, 32768, 65536)  # in the README; docs/fidelity.md has the others, too
_DECODED = ("dense, graph", "balanced", "lean")
_DOCUMENTS = {"edgeworth-parents.txt": "novel", "sqlite3.c": "C source", "kvm-api.rst": "manual"}


def read_results(name: str) -> list[dict[str, Any]]:
    """The rows of one file of results."""
    return [json.loads(line) for line in (_FOLDER / "results" / name).read_text().splitlines()]


def summary_table(rows: list[dict[str, Any]]) -> str:
    """Markdown for the README: a line for each model and length, means over the documents."""
    lines = ["| model, tokens | " + " | ".join(_RULES) + " |", "| --- |" + " --- |" * len(_RULES)]
    for model, tokens in _measured(rows):
        if tokens not in _LENGTHS or model != _best_measured(rows, model, tokens):
            continue
        cells = [_mean(_of(rows, model, tokens, rule)) for rule in _RULES]
        lines.append(f"| {model}, {tokens // 1024}K | " + " | ".join(cells) + " |")
    lines.append("| summaries beside the model, share of K/V | " + " | ".join(_shares()) + " |")
    for field in ("attended", "fetched"):
        lines.append(f"| {field}, share of the context | " + " | ".join(_spread(rows, field)) + " |")
    return "\n".join(lines) + "\n"


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Markdown for the README: a line for each context, of the last commit at which every rule was measured."""
    lines = [
        "| a token, over dense, GPU memory beside the weights | dense | `balanced` | `lean` |",
        "| --- | --- | --- | --- |",
    ]
    setting = {"model": "qwen3-30b-a3b.json", "hardware": "NVIDIA H200", "drift": 0.02}
    decoded = [row for row in rows if "p50_ms" in row and all(row.get(k, v) == v for k, v in setting.items())]
    groups: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for row in decoded:
        groups.setdefault((row["context"], row["commit"]), {})[row["rule"]] = row
    whole = {context: (commit, found) for (context, commit), found in groups.items() if found.keys() >= set(_DECODED)}
    for context, (commit, found) in sorted(whole.items()):
        dense_ms = found[_DECODED[0]]["p50_ms"]
        cells = []
        for rule in _DECODED:
            over = "" if rule == _DECODED[0] else f", {found[rule]['p50_ms'] / dense_ms:.2f}"
            cells.append(f"{found[rule]['p50_ms']:.1f} ms{over}, {found[rule]['gpu_bytes'] / 2**30:.1f} GiB")
        lines.append(f"| {context // 1024}K, at {commit} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def document_table(rows: list[dict[str, Any]]) -> str:
    """Markdown for docs/fidelity.md: a line for each model, length and rule, a column for each document."""
    lines = [
        "| model, tokens, rule | " + " | ".join(_DOCUMENTS.values()) + " |",
        "| --- |" + " --- |" * len(_DOCUMENTS),
    ]
    for model, tokens in _measured(rows):
        for rule in (*_RULES, "fidelity"):
            found = {row["document"]: row for row in _of(rows, model, tokens, rule)}
            if found:
                cells = [_cell(found[name]) if name in found else "-" for name in _DOCUMENTS]
                lines.append(f"| {model}, {tokens // 1024}K, {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _measured(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Models and lengths that `balanced` was measured on, in the rows' order."""
    return list(dict.fromkeys((_name(row), row["tokens"]) for row in rows if row["rule"] == "balanced"))


def _best_measured(rows: list[dict[str, Any]], name: str, tokens: int) -> str:
    """Of the types that this model was measured in at a length, the one with most rules; the first of those alike."""
    models = {_name(row): row["model"] for row in rows}
    alike = sorted({one for one, model in models.items() if model == models[name]})
    return max(alike, key=lambda one: sum(bool(_of(rows, one, tokens, rule)) for rule in _RULES))


def _name(row: dict[str, Any]) -> str:
    """The model, and its type where that is not float32."""
    return f"{row['model']} in {row['dtype']}" if "dtype" in row else str(row["model"])


def _of(rows: list[dict[str, Any]], name: str, tokens: int, rule: str) -> list[dict[str, Any]]:
    return [row for row in rows if (_name(row), row["tokens"], row["rule"]) == (name, tokens, rule)]


def _cell(row: dict[str, Any]) -> str:
    divergence = f" ({row['kl_mean']:.3f})" if "kl_mean" in row else ""
    return f"{row['gap_nats']:.3f} ± {row['se_nats']:.3f}{divergence}"


def _mean(rows: list[dict[str, Any]]) -> str:
    """A cell of means over documents, whose errors are independent; "-" unless all were measured."""
    if {row["document"] for row in rows} != set(_DOCUMENTS):
        return "-"
    mean = {
        "gap_nats": statistics.mean(row["gap_nats"] for row in rows),
        "se_nats": math.hypot(*(row["se_nats"] for row in rows)) / len(rows),
    }
    if all("kl_mean" in row for row in rows):
        mean["kl_mean"] = statistics.mean(row["kl_mean"] for row in rows)
    return _cell(mean)


def _shares() -> list[str]:
    """Of 16-bit K/V with heads of 128 numbers."""
    configs = [HGAConfig.preset(rule) for rule in _RULES]
    return [f"{summary_bytes_per_token(config, 128, torch.bfloat16) / 512:.1%}" for config in configs]


def _spread(rows: list[dict[str, Any]], field: str) -> list[str]:
    cells = []
    for rule in _RULES:
        values = [row[field] for row in rows if row["rule"] == rule]
        if not values:
            cells.append("-")
            continue
        low, high = f"{min(values):.1%}", f"{max(values):.1%}"
        cells.append(low if low == high else f"{low} to {high}")
    return cells


def main() -> None:
    fidelity = [row for row in read_results("fidelity.jsonl") if not row.get("exact_prompt")]
    tables = (
        (_README, "figures", summary_table(fidelity)),
        (_README, "speed", speed_table(read_results("gpu_model.jsonl"))),
        (_DETAIL, "figures", document_table(fidelity)),
    )
    for path, name, table in tables:
        text, (begin, end) = path.read_text(), (mark.format(name) for mark in _MARKS)
        wanted = text[: text.index(begin) + len(begin)] + table + text[text.index(end) :]
        if "--check" not in sys.argv:
            path.write_text(wanted)
        elif text != wanted:
            sys.exit(f"{path.name}: the table of {name} is out of date; run python benchmarks/readme_table.py")


if __name__ == "__main__":
    main()
