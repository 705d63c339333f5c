"""Write the README's table of figures from `results/`, or check that it is what the results say.

python benchmarks/readme_table.py            # rewrites the table between its markers
python benchmarks/readme_table.py --check    # exit code 1 if the README is out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from hga.cache.layout import summary_bytes_per_token
from hga.config import HGAConfig

_FOLDER = Path(__file__).parent
_README = _FOLDER.parent / "README.md"
_BEGIN, _END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"
_RULES = ("contiguous", "lean", "balanced")
_DOCUMENTS = {"edgeworth-parents.txt": "novel", "sqlite3.c": "C source", "kvm-api.rst": "manual"}


def read_results(name: str) -> list[dict[str, Any]]:
    """The rows of one file of results."""
    return [json.loads(line) for line in (_FOLDER / "results" / name).read_text().splitlines()]


def fidelity_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each model, length and document, a column for each rule."""
    lines = [
        "| model, tokens, document | " + " | ".join(_RULES) + " |",
        "| --- |" + " --- |" * len(_RULES),
    ]
    measured = [row for row in rows if row["rule"] == "balanced"]
    keys = sorted({(row["model"], row["tokens"], row["document"]) for row in measured}, reverse=True)
    for model, tokens, document in keys:
        cells = []
        for rule in _RULES:
            wanted = (model, tokens, document, rule)
            row = next(
                (row for row in rows if (row["model"], row["tokens"], row["document"], row["rule"]) == wanted), None
            )
            cells.append("-" if row is None else _cell(row))
        lines.append(f"| {model}, {tokens // 1024}K, {_DOCUMENTS[document]} | " + " | ".join(cells) + " |")
    lines.append("| summaries beside the model, share of K/V | " + " | ".join(_shares()) + " |")
    for field in ("attended", "fetched"):
        lines.append(f"| {field}, share of the context | " + " | ".join(_spread(rows, field)) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    divergence = f" ({row['kl_mean']:.3f})" if "kl_mean" in row else ""
    return f"{row['gap_nats']:.3f} ± {row['se_nats']:.3f}{divergence}"


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
    text = _README.read_text()
    begin, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    wanted = text[:begin] + fidelity_table(read_results("fidelity.jsonl")) + text[end:]
    if "--check" in sys.argv:
        if text != wanted:
            sys.exit("README.md: the table of figures is out of date; run python benchmarks/readme_table.py")
    else:
        _README.write_text(wanted)


if __name__ == "__main__":
    main()
