"""One HTML file of rows: tables, and plots as inline SVG, so that it opens without a network."""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence

from hga.evals.plots import draw_budget, draw_context, draw_memory, draw_positions, draw_recall, plot_models
from hga.evals.results import Row
from hga.evals.summary import grouped, label, of_kind, task_scores, task_table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; } p.remark { color: #555; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } svg { max-width: 34rem; width: 100%; height: auto; }
svg.wide { max-width: 100%; }
"""


def write_report(rows: Sequence[Row], title: str) -> str:
    """The report's HTML. ValueError if no row can be shown; ImportError names the extra without matplotlib."""
    sections = [
        ("What it was measured with", _environment_section(of_kind(rows, "run"))),
        ("Loss against dense", _loss_section(of_kind(rows, "nll"))),
        ("Tasks", _tasks_section(rows)),
        ("Long generation", _generation_section(rows)),
        ("Where the loss comes from", _recall_section(of_kind(rows, "recall"))),
    ]
    if not any(body for _, body in sections[1:]):
        raise ValueError("there is no measurement to report yet; run hga eval run first")
    parts = [f"<h2>{html.escape(name)}</h2>\n{body}" for name, body in sections if body]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _environment_section(rows: list[Row]) -> str:
    names = ("started", "hardware", "dtype", "torch", "transformers", "hga")
    return _table(names, [[str(row.get(name, "")) for name in names] for row in rows]) if rows else ""


# ---- losses -------------------------------------------------------------------------------------------


def _loss_section(rows: list[Row]) -> str:
    if not rows:
        return ""
    compared = [row for row in rows if _is_compared(row)]
    remark = (
        "Gap: nats a token above dense on the same tokens, ± its standard error over tokens; plots show means over "
        "documents. Attended: share of the context attended exactly by a query head; fetched: unique tokens of a KV "
        "head. Both, and the bytes beside the model, are means over the scored positions."
    )
    columns = (
        "model, document",
        "tokens",
        "rule",
        "attended",
        "fetched",
        "bytes",
        "nll",
        "gap",
        "KL",
        "KL p99",
        "top-1",
    )
    lines = [
        [
            f"{row['model']}, {row['document']}",
            f"{row['tokens']:,}",
            label(row),
            f"{row['attended']:.2%}",
            f"{row['fetched']:.2%}",
            f"{row['mean_device_bytes'] / 2**20:,.1f} MiB",
            f"{row['nll']:.4f}",
            *(_distances(row) if _is_compared(row) else [""] * 4),
        ]
        for row in rows
    ]
    dense = [row for row in rows if row["rule"] == "dense"]
    plots = ""
    if compared:
        plots += plot_models("Gap against budget", compared, draw_budget)
        plots += plot_models("Gap against context", compared, draw_context)
        plots += plot_models("Memory against fidelity", compared, functools.partial(draw_memory, dense=dense))
        plots += plot_models("Gap by position", compared, draw_positions)
    return f'<p class="remark">{remark}</p>\n{plots}{_table(columns, lines)}'


# ---- tasks, generation, recall ------------------------------------------------------------------------


def _tasks_section(rows: Sequence[Row]) -> str:
    scores = task_scores(rows)
    if not scores:
        return ""
    remark = (
        "Mean share of right answers, ± its standard error. Of dense: what all tasks scored, over dense's score on the "
        "same examples; where dense itself scores low that says little."
    )
    return f'<p class="remark">{remark}</p>\n{_table(*task_table(scores))}'


def _generation_section(rows: Sequence[Row]) -> str:
    agreements, drifts = of_kind(rows, "agreement"), of_kind(rows, "drift")
    parts = []
    if agreements:
        columns: tuple[str, ...] = ("model, document", "tokens", "rule", "written", "as dense", "first divergence")
        lines = [
            [
                *_where(row),
                f"{row['new_tokens']:,}",
                f"{row['equal']:.1%}",
                "none" if row["first_divergence"] is None else str(row["first_divergence"] + 1),
            ]
            for row in agreements
        ]
        parts.append(
            '<p class="remark">Greedy tokens, given those of dense before; the first divergence is where free decoding '
            f"leaves dense.</p>\n{_table(columns, lines)}"
        )
    if drifts:
        columns = ("model, document", "tokens", "rule", "sampled", "own nll", "dense's nll", "drift", "by quarters")
        lines = [
            [
                *_where(row),
                f"{row['new_tokens']:,}",
                f"{row['own_nll']:.4f}",
                f"{row['dense_nll']:.4f}",
                _plus_minus(row["drift_nats"], row["drift_se"]),
                ", ".join(f"{quarter:+.3f}" for quarter in row["drift_quarters"]),
            ]
            for row in drifts
        ]
        parts.append(
            '<p class="remark">Tokens that a rule sampled, read by dense. Drift: the nll of dense less that of the '
            "rule.</p>\n" + _table(columns, lines)
        )
    return "\n".join(parts)


def _recall_section(rows: list[Row]) -> str:
    if not rows:
        return ""
    parts = ['<p class="remark">By layer and query head: attention mass recalled, and error of the output.</p>']
    for (model, document, tokens, rule), part in grouped(
        rows, lambda row: (str(row["model"]), str(row["document"]), int(row["tokens"]), label(row))
    ).items():
        parts.append(
            f"<h3>{html.escape(f'{model}, {document}, {tokens:,} tokens, {rule}')}</h3>\n{draw_recall(part, rule)}"
        )
    return "\n".join(parts)


# ---- pieces -------------------------------------------------------------------------------------------


def _where(row: Row) -> list[str]:
    return [f"{row['model']}, {row['document']}", f"{row['tokens']:,}", label(row)]


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _is_compared(row: Row) -> bool:
    return row["rule"] != "dense" and row["gap_nats"] is not None


def _distances(row: Row) -> list[str]:
    """From dense, of a rule that was compared with it."""
    gap, kl = _plus_minus(row["gap_nats"], row["se_nats"]), _plus_minus(row["kl_mean"], row["kl_se"])
    return [gap, kl, f"{row['kl_p99']:.4f}", f"{row['top1_agreement']:.2%}"]


def _plus_minus(value: float, error: float) -> str:
    return f"{value:+.4f} ± {error:.4f}"
