"""The suite: which measurements a run consists of, and how it makes those that are still missing."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from hga import __version__
from hga.config import HGAConfig
from hga.evals.baseline import Baseline
from hga.evals.continuation import agree, check_sample, drift
from hga.evals.exam import answer, end_tokens, make_example, material_of
from hga.evals.material import Material
from hga.evals.nll import first_tokens, score_rule
from hga.evals.results import Results, Row
from hga.evals.rule import Rule, check_rules, read_prompt_exactly, resolve_rules
from hga.evals.tasks import LEAST_CONSTANTS

PARTS = ("nll", "tasks", "generate")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run measures. Two runs of equal settings make the same rows.

    model: its label; loaded: how it was loaded. documents: name -> sha256 of the text. parts: of PARTS. tokens: context
    lengths. rules: names beside "dense", which is always measured; own: JSON of configs by name. budgets: shares of
    the context such as "1/32", or None for each rule's own. score_all: all positions rather than the second half.
    tasks, examples: which, and how many of each a document and length. new_tokens: greedy ones; sample_tokens: drawn
    ones, 0 for none; both end at the context length. seed: of tasks and samples. exact_prompt: whether what is neither
    scored nor written is read densely under the rules too.
    """

    model: str
    loaded: Mapping[str, str | None]
    documents: Mapping[str, str]
    parts: tuple[str, ...]
    tokens: tuple[int, ...]
    rules: tuple[str, ...]
    budgets: tuple[str | None, ...]
    own: Mapping[str, str]
    score_all: bool
    tasks: tuple[str, ...]
    examples: int
    new_tokens: int
    sample_tokens: int
    seed: int
    exact_prompt: bool = False
    version: str = __version__

    def json(self) -> dict[str, Any]:
        """For `open_results`."""
        return asdict(self)

    @property
    def written_tokens(self) -> int:
        """What the longest text behind a prompt needs."""
        return max(self.new_tokens, self.sample_tokens)

    def rule(self, name: str, tokens: int, budget: str | None) -> Rule:
        """The named rule for a context length. ValueError as `resolve_rules`."""
        own = {key: HGAConfig.from_json(text) for key, text in self.own.items()}
        return resolve_rules([name], tokens, None if budget is None else float(Fraction(budget)), own)[name]


@dataclass(frozen=True)
class Unit:
    """One measurement; the fields are those of its row that tell it from others. kind: nll, task, agreement, drift."""

    kind: str
    document: str
    tokens: int
    rule: str
    budget: str | None
    task: str | None = None
    example: int | None = None

    @property
    def read_tokens(self) -> int:
        """About as many tokens are read or written for it; dense reads what was sampled once more."""
        return self.tokens * (2 if self.kind == "drift" else 1)

    @classmethod
    def of(cls, row: Row) -> Unit:
        """The unit that a row is of."""
        return cls(**{name: row.get(name) for name in cls.__dataclass_fields__})  # type: ignore[arg-type]


def sha256(text: str) -> str:
    """For `Settings.documents`."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_source(text: str) -> bool:
    """Whether a document defines integer constants enough for the task "code"."""
    return len(Material(text, "").constants) >= LEAST_CONSTANTS


def plan(settings: Settings, sources: set[str]) -> list[Unit]:
    """All units in the order of work: contexts as they are named, dense before the rules, tasks in turns.

    sources: the documents that task "code" can be made of. ValueError as `Settings.rule`, before any work.
    """
    return [
        unit
        for part in settings.parts
        for tokens in settings.tokens
        for unit in _plan_part(settings, part, tokens, sources)
    ]


def _plan_part(settings: Settings, part: str, tokens: int, sources: set[str]) -> Iterator[Unit]:
    for budget in settings.budgets:
        for name in settings.rules:
            rule = settings.rule(name, tokens, budget)
            if settings.exact_prompt:
                read_prompt_exactly(name, rule)
    under = [("dense", None), *((name, budget) for budget in settings.budgets for name in settings.rules)]
    if part == "tasks":
        for example in range(settings.examples):
            for document in settings.documents:
                for task in settings.tasks:
                    if task != "code" or document in sources:
                        yield from (Unit("task", document, tokens, *rule, task, example) for rule in under)
        return
    if part == "generate" and tokens - settings.written_tokens < 2:
        raise ValueError(
            f"--tokens {tokens} leave no prompt before {settings.written_tokens} written tokens; raise --tokens, or "
            "lower --new-tokens and --sample-tokens"
        )
    if part == "generate" and settings.sample_tokens:
        check_sample(settings.sample_tokens)
    for document in settings.documents:
        yield from (Unit("nll" if part == "nll" else "agreement", document, tokens, *rule) for rule in under)
        if part == "generate" and settings.sample_tokens:
            # What dense samples does not drift from dense.
            yield from (Unit("drift", document, tokens, *rule) for rule in under[1:])


class Suite:
    """A run of a model over documents: it makes the rows of units, one after the other."""

    def __init__(
        self, model: Any, tokenizer: Any, settings: Settings, texts: Mapping[str, str], results: Results
    ) -> None:
        """texts: the documents by name. ValueError if one is too short, or a rule does not work on the model."""
        self._model, self._tokenizer, self._settings, self._results = model, tokenizer, settings, results
        self._texts = texts
        self._ids = functools.cache(self._read_ids)
        self._material = functools.cache(self._read_material)
        self._example = functools.lru_cache(maxsize=1)(self._make_example)
        self._baseline: tuple[Unit, Baseline] | None = None
        longest = max(settings.tokens)
        check_rules(model, (settings.rule(name, longest, b) for name in settings.rules for b in settings.budgets))
        if {"nll", "generate"} & set(settings.parts):
            for document in texts:
                self._ids(document)

    def check_examples(self, units: Iterable[Unit]) -> None:
        """ValueError if a task of these units does not fit into its context, or its document is too short for it."""
        for unit in units:
            if unit.kind == "task" and unit.example == 0 and unit.rule == "dense":
                self._example(unit.document, unit.task, unit.tokens, 0)

    def measure(self, unit: Unit, progress: Callable[[int], object] | None = None) -> Row:
        """Make the row of a unit and keep it among the results. progress is called with the tokens just read."""
        makers = {"nll": self._nll, "task": self._task, "agreement": self._agreement, "drift": self._drift}
        rule = None if unit.rule == "dense" else self._settings.rule(unit.rule, unit.tokens, unit.budget)
        if self._settings.exact_prompt:
            rule = read_prompt_exactly(unit.rule, rule, self._scored_from(unit) if unit.kind == "nll" else None)
        made = makers[unit.kind](unit, rule, progress)
        row = asdict(unit) | {"model": self._settings.model, "exact_prompt": self._settings.exact_prompt} | made
        row["budget_tokens"] = None if rule is None else rule.budget_tokens
        return self._results.append(row)

    def _read_ids(self, document: str) -> Tensor:
        longest = max(self._settings.tokens)
        with _naming(document):
            return first_tokens(self._tokenizer, self._texts[document], longest).to(self._model.device)

    def _read_material(self, document: str) -> Material:
        return material_of(self._texts[document])

    def _make_example(self, document: str, task: str, tokens: int, index: int) -> Any:
        with _naming(document):
            return make_example(self._tokenizer, self._material(document), task, tokens, self._settings.seed, index)

    def _nll(self, unit: Unit, rule: Rule, progress: Callable[[int], object] | None) -> dict[str, Any]:
        ids = self._ids(unit.document)[:, : unit.tokens]
        read = functools.partial(score_rule, self._model, ids, score_from=self._scored_from(unit), progress=progress)
        baseline = None if rule is None else self._dense(unit, read)
        score, made = read(unit.rule, rule, baseline)
        if rule is None and made is not None:
            self._keep(unit, made)
        return score.row()

    def _scored_from(self, unit: Unit) -> int:
        return 0 if self._settings.score_all else unit.tokens // 2

    def _dense(self, unit: Unit, read: Callable[..., tuple[Any, Baseline | None]]) -> Baseline:
        """The dense reading that a rule is compared with: in memory, else in the folder, else made again."""
        dense = replace(unit, rule="dense", budget=None)
        if self._baseline is not None and self._baseline[0] == dense:
            return self._baseline[1]
        path = self._baseline_path(dense)
        if path is not None and path.exists():
            self._baseline = dense, Baseline.load(path)
            return self._baseline[1]
        _, made = read("dense", None, None)
        assert made is not None
        self._keep(dense, made)
        return made

    def _keep(self, dense: Unit, made: Baseline) -> None:
        self.forget()
        self._baseline = dense, made
        if (path := self._baseline_path(dense)) is not None:
            made.save(path)

    def _baseline_path(self, dense: Unit) -> Path | None:
        folder = self._results.folder
        return None if folder is None else folder / f"dense-{sha256(repr(dense))[:16]}.safetensors"

    def forget(self) -> None:
        """Delete the dense readings that the folder holds for rules to come."""
        self._baseline = None
        if self._results.folder is not None:
            for path in self._results.folder.glob("dense-*"):
                path.unlink()

    def _task(self, unit: Unit, rule: Rule, progress: Callable[[int], object] | None) -> dict[str, Any]:
        example = self._example(unit.document, unit.task, unit.tokens, unit.example)
        given = answer(self._model, self._tokenizer, example, rule)
        if progress is not None:
            progress(given.prompt_tokens)
        return _flat(given) | {"answers": list(example.answers), "depth": example.depth}

    def _agreement(self, unit: Unit, rule: Rule, progress: Callable[[int], object] | None) -> dict[str, Any]:
        written = None
        if rule is not None:
            dense = replace(unit, rule="dense", budget=None)
            written = next(list(row["written"]) for row in self._results.rows if Unit.of(row) == dense)
        ids = self._prompt(unit)
        return _flat(agree(self._model, ids, rule, written, new_tokens=self._settings.new_tokens, progress=progress))

    def _drift(self, unit: Unit, rule: Rule, progress: Callable[[int], object] | None) -> dict[str, Any]:
        return _flat(
            drift(
                self._model,
                self._prompt(unit),
                rule,
                new_tokens=self._settings.sample_tokens,
                seed=self._settings.seed,
                ends=end_tokens(self._model, self._tokenizer),
                progress=progress,
            )
        )

    def _prompt(self, unit: Unit) -> Tensor:
        """The document's beginning, so long that the text written behind it ends at the context length."""
        return self._ids(unit.document)[:, : unit.tokens - self._settings.written_tokens]


def run(
    suite: Suite,
    units: list[Unit],
    *,
    seconds: float | None = None,
    at_row: Callable[[Row], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> int:
    """Measure units in order until all are made, or none is begun any more because `seconds` are over.

    Returns how many are left. at_row is called with each new row. ValueError as `Suite.check_examples`, before any.
    """
    started = time.monotonic()
    suite.check_examples(units)
    for number, unit in enumerate(units):
        if seconds is not None and time.monotonic() - started > seconds:
            return len(units) - number
        row = suite.measure(unit, progress)
        if at_row is not None:
            at_row(row)
    suite.forget()
    return 0


@contextmanager
def _naming(document: str) -> Iterator[None]:
    """What is wrong with one of several documents says which."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{document}: {error}") from error


def _flat(made: Any) -> dict[str, Any]:
    """A dataclass's fields, those of `held` among them."""
    fields = dict(vars(made))
    held: dict[str, Any] = fields.pop("held")
    return fields | held
