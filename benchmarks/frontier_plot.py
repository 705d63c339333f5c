"""Draw docs/frontier.png from results/peers.jsonl: how far from dense each rule is, over the bytes that it keeps.

python benchmarks/frontier_plot.py

Mean KL(dense || rule) over the documents, SmolLM2-135M, 4,096 tokens, 1/16 attended (quantised K/V: all of it). Needs
matplotlib: pip install 'hga[report]'.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from hga.cache.layout import summary_bytes_per_token
from hga.config import PRESETS, HGAConfig

_FOLDER = Path(__file__).parent
_HEAD_DIM = 64
_LEFT_OUT = ("dense", "sinks-window")  # nothing, and nothing beside the window, is kept


def read_points() -> dict[str, tuple[float, float]]:
    """Of each rule: share of 16-bit K/V kept beside the model, in percent, and mean KL; a preset's latest rows."""
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for line in (_FOLDER / "results" / "peers.jsonl").read_text().splitlines():
        row = json.loads(line)
        latest[row["rule"], row["document"]] = row
    points = {}
    for rule in dict.fromkeys(rule for rule, _ in latest):
        rows = [row for (name, _), row in latest.items() if name == rule]
        if rule in _LEFT_OUT or "," in rule:
            continue
        share = rows[0]["summary_share"]
        if rule in PRESETS:  # they were measured in float32, whose summaries have 16 bits
            share = summary_bytes_per_token(HGAConfig.preset(rule), _HEAD_DIM, torch.bfloat16) / (4 * _HEAD_DIM)
        points[rule] = 100 * share, statistics.mean(row["kl_mean"] for row in rows)
    return points


def main() -> None:
    figure = Figure(figsize=(7.2, 4.2), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    for rule, (share, divergence) in read_points().items():
        ours, quantised = rule in ("lean", "balanced", "fidelity"), rule.startswith("kv-")
        color = "tab:red" if ours else "tab:green" if quantised else "tab:grey" if "oracle" in rule else "tab:blue"
        axes.plot(share, divergence, "*" if ours else "o", color=color, markersize=13 if ours else 6)
        left = rule.startswith("quest")  # RetroInfer's points are beside its
        axes.annotate(
            rule,
            (share, divergence),
            xytext=(-7, 0) if left else (7, 3),
            textcoords="offset points",
            horizontalalignment="right" if left else "left",
            fontsize=10 if ours else 8,
            color=color,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(1.2, 110)
    axes.xaxis.set_major_formatter("{x:g}%")
    axes.set_xlabel("kept beside the model, share of 16-bit K/V")
    axes.set_ylabel("mean KL from dense, nats a token")
    axes.grid(alpha=0.3)
    figure.savefig(_FOLDER.parent / "docs" / "frontier.png")


if __name__ == "__main__":
    main()
