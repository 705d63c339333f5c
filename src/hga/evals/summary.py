"""Rows put together: what a report shows, and the tables after a run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from hga.evals.results import Row

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


@dataclass(frozen=True)
class TaskScore:
    """A rule's replies to one task, or to all. score: their mean grade; se: its standard error, None for one reply.

    exact: share of replies with every answer right. dense: dense's mean grade for the same examples, and of_dense the
    rule's score over it, None where dense has none of them right.
    """

    model: str
    tokens: int
    rule: str
    budget: str | None
    task: str
    replies: int
    score: float
    se: float | None
    exact: float
    dense: float | None
    of_dense: float | None


def rule_name(row: Row) -> str:
    """A rule, and whether its prompt was read densely; for dense that makes no difference."""
    exact = row.get("exact_prompt") and row["rule"] != "dense"
    return f"{row['rule']}, exact prompt" if exact else str(row["rule"])


def label(row: Row) -> str:
    """A rule as a report names it: with its budget, where it is a share of the context."""
    return f"{rule_name(row)} {row['budget']}" if row.get("budget") else rule_name(row)


def grouped(rows: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Rows, or scores, by key; keys in order of appearance."""
    groups: dict[Key, list[Item]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    """The rows of one kind."""
    return [row for row in rows if row.get("kind") == kind]


def task_scores(rows: Sequence[Row]) -> list[TaskScore]:
    """Scores of each model, length and rule: of every task, then of "all" of them together."""
    scores: list[TaskScore] = []
    replies = of_kind(rows, "task")
    dense = {_example(row): float(row["score"]) for row in replies if row["rule"] == "dense"}
    by_rule = grouped(replies, lambda row: (row["model"], row["tokens"], rule_name(row), row["budget"]))
    for (model, tokens, rule, budget), given in by_rule.items():
        tasks = grouped(given, lambda row: str(row["task"]))
        for task, part in (*tasks.items(), ("all", given)):
            grades = [float(row["score"]) for row in part]
            paired = [(float(row["score"]), dense[_example(row)]) for row in part if _example(row) in dense]
            theirs = sum(other for _, other in paired)
            scores.append(
                TaskScore(
                    model=model,
                    tokens=tokens,
                    rule=rule,
                    budget=budget,
                    task=task,
                    replies=len(part),
                    score=fmean(grades),
                    se=_standard_error(grades),
                    exact=fmean(grade == 1 for grade in grades),
                    dense=theirs / len(paired) if paired else None,
                    of_dense=sum(own for own, _ in paired) / theirs if theirs else None,
                )
            )
    return scores


def task_table(scores: Sequence[TaskScore]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: a line a model, length and rule, a column a task; "all" and its share of dense's come last.

    A cell is the mean score and its standard error.
    """
    tasks = sorted({score.task for score in scores} - {"all"})
    lines: list[list[str]] = []
    for (model, tokens, rule, budget), part in grouped(
        sorted(scores, key=lambda score: (score.model, score.tokens)), lambda s: (s.model, s.tokens, s.rule, s.budget)
    ).items():
        by_task = {score.task: score for score in part}
        every = by_task["all"]
        line = [model, f"{tokens:,}", f"{rule} {budget or ''}".rstrip(), str(every.replies)]
        line += [_cell(by_task[task]) if task in by_task else "" for task in tasks]
        lines.append([*line, _cell(every), "" if every.of_dense is None else f"{every.of_dense:.0%}"])
    names = [task.replace("_", " ") for task in tasks]
    return ["model", "tokens", "rule", "replies", *names, "all", "of dense"], lines


def _cell(score: TaskScore) -> str:
    return f"{score.score:.2f}" + (f" ± {score.se:.2f}" if score.se is not None else "")


def mean_gap(rows: Sequence[Row]) -> tuple[float, float]:
    """Mean gap of rows of several documents, and its standard error from theirs."""
    gaps, errors = [float(row["gap_nats"]) for row in rows], [float(row["se_nats"]) for row in rows]
    return fmean(gaps), math.hypot(*errors) / len(errors)


def _example(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("model", "document", "tokens", "task", "example"))


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
