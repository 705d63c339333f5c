"""The report's plots, drawn by matplotlib (the extra `report`) as SVG for the middle of a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hga.evals.results import Row
from hga.evals.summary import grouped, label, mean_gap, rule_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_models(name: str, rows: list[Row], draw: Callable[[Axes, list[Row]], None]) -> str:
    """A plot a model, as SVG."""
    plots = []
    for model, part in grouped(rows, lambda row: str(row["model"])).items():
        figure = _figure(1)
        axes = figure.axes[0]
        draw(axes, part)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_ylabel("gap, nats a token")
        axes.set_title(f"{name}: {model}", fontsize=10)
        axes.legend(fontsize=8)
        plots.append(_svg(figure))
    return "\n".join(plots)


def draw_budget(axes: Axes, rows: list[Row]) -> None:
    """Gap over the share attended: a line a rule and context length."""
    for (rule, tokens), part in grouped(rows, lambda row: (rule_name(row), int(row["tokens"]))).items():
        points = []
        for same in grouped(part, lambda row: row["budget"]).values():
            attended = sum(float(row["attended"]) for row in same) / len(same)
            points.append((attended * 100, *mean_gap(same)))
        _line(axes, points, f"{rule}, {tokens:,}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("attended, % of the context")


def draw_context(axes: Axes, rows: list[Row]) -> None:
    """Gap over the context length: a line a rule and budget."""
    for name, part in grouped(rows, label).items():
        points = [(tokens, *mean_gap(same)) for tokens, same in grouped(part, lambda row: int(row["tokens"])).items()]
        _line(axes, points, name)
    lengths = sorted({int(row["tokens"]) for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length / 1024:g}K" for length in lengths])
    axes.set_xlabel("context, tokens")


def draw_memory(axes: Axes, rows: list[Row], dense: list[Row]) -> None:
    """Gap over the bytes beside the model, as a share of what dense keeps there."""
    kept = {(row["model"], row["document"], row["tokens"]): float(row["mean_device_bytes"]) for row in dense}
    for name, part in grouped(rows, label).items():
        points = []
        for same in grouped(part, lambda row: int(row["tokens"])).values():
            shares = [
                float(row["mean_device_bytes"]) / kept[row["model"], row["document"], row["tokens"]]
                for row in same
                if (row["model"], row["document"], row["tokens"]) in kept
            ]
            if shares:
                points.append((100 * sum(shares) / len(shares), *mean_gap(same)))
        if points:
            _line(axes, points, name, joined=False)
    axes.set_xlabel("K/V and summaries beside the model, % of dense K/V")


def draw_positions(axes: Axes, rows: list[Row]) -> None:
    """Gap by position, of the longest context."""
    longest = max(int(row["tokens"]) for row in rows)
    names: list[str] = []
    for name, part in grouped([row for row in rows if row["tokens"] == longest], label).items():
        buckets = [bucket for row in part for bucket in row["buckets"] if bucket["se_nats"] is not None]
        points = []
        for (lower, upper), same in grouped(buckets, lambda b: (b["from_tokens"], b["to_tokens"])).items():
            names += [f"{lower // 1024}-{upper // 1024}K"] * (f"{lower // 1024}-{upper // 1024}K" not in names)
            points.append((float(names.index(f"{lower // 1024}-{upper // 1024}K")), *mean_gap(same)))
        _line(axes, points, name)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel(f"position, of {longest:,} tokens")


def _line(axes: Axes, points: Sequence[tuple[float, float, float]], name: str, joined: bool = True) -> None:
    """Points (x, mean, standard error), by x."""
    x, y, error = zip(*sorted(points), strict=True)
    axes.errorbar(x, y, yerr=error, label=name, marker="o", markersize=4, capsize=2, linestyle="-" if joined else "")


def draw_recall(rows: list[Row], rule: str) -> str:
    """Heat maps by layer and head: attention mass recalled, and error of the output."""
    figure = _figure(2)
    for axes, name in zip(figure.axes, ("recalled", "output_error"), strict=True):
        layers, heads = (1 + max(int(row[field]) for row in rows) for field in ("layer", "head"))
        grid = [[float("nan")] * heads for _ in range(layers)]
        for row in rows:
            grid[int(row["layer"])][int(row["head"])] = float(row[name])
        image = axes.imshow(grid, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=axes)
        axes.set_title(f"{name.replace('_', ' ')}: {rule}", fontsize=10)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
    return _svg(figure)


def _figure(plots: int) -> Figure:
    """A figure with so many plots side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the report's plots need matplotlib: pip install 'hga[report]'") from error
    figure = Figure(figsize=(6.4 * plots, 4.2), layout="constrained")
    for place in range(plots):
        figure.add_subplot(1, plots, place + 1)
    return figure


def _svg(figure: Figure) -> str:
    """A figure as SVG for the middle of a page: text as shapes, no outside reference."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    svg = written.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return svg if len(figure.axes) == 1 else svg.replace("<svg", '<svg class="wide"', 1)
