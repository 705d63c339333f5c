"""The suite: what a run consists of, that a killed one goes on, and what its report shows."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest
from filelock import FileLock
from tiny_model import byte_tokenizer, save_tiny_model, tiny_model

import hga
from hga.cli import main
from hga.evals import suite
from hga.evals.report import write_report
from hga.evals.results import open_results, read_folder
from hga.evals.suite import Settings, Suite, Unit, plan, run, sha256
from hga.evals.summary import mean_gap, task_scores, task_table

NOVEL = (files("hga") / "data" / "thursday.txt").read_text(encoding="utf-8")
SOURCE = "\n".join(f"#define LIMIT_{number} {number}\nint part_{number}(void);\n" for number in range(200))
OWN = hga.HGAConfig(
    chunk_size=32,
    group_size=4,
    node_size=4,
    overselection="all",
    coded=False,
    sink_tokens=4,
    window_tokens=12,
    budget_tokens=40,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def texts(tmp_path):
    for name, text in (("novel.txt", NOVEL), ("source.c", SOURCE)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "own.json").write_text(OWN.to_json())
    return tmp_path


def settings(**changes) -> Settings:
    fields = {
        "model": "tiny",
        "loaded": {},
        "documents": {"novel.txt": sha256(NOVEL), "source.c": sha256(SOURCE)},
        "parts": ("nll", "tasks", "generate"),
        "tokens": (400, 700),
        "rules": ("own",),
        "budgets": ("1/8", "1/4"),
        "own": {"own": OWN.to_json()},
        "score_all": False,
        "tasks": ("needle", "code"),
        "examples": 2,
        "new_tokens": 8,
        "sample_tokens": 12,
        "seed": 0,
    }
    return Settings(**(fields | changes))


def made_suite(results, **changes) -> Suite:
    texts = {"novel.txt": NOVEL, "source.c": SOURCE}
    return Suite(tiny_model(), byte_tokenizer(), settings(**changes), texts, results)


def measured(rows):
    """Rows without what differs between two runs."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows if row["kind"] != "run"]


# ---- plan and run -------------------------------------------------------------------------------------


def test_the_plan_has_every_measurement_once():
    units = plan(settings(), {"source.c"})
    assert len(set(units)) == len(units) == 2 * (3 * 2 + 2 * 3 * 3 + 2 * (3 + 2))
    assert not [unit for unit in units if unit.kind == "drift" and unit.rule == "dense"]
    assert [unit.rule for unit in units[:3]] == ["dense", "own", "own"]
    assert [unit.budget for unit in units[:3]] == [None, "1/8", "1/4"]
    assert {unit.document for unit in units if unit.task == "code"} == {"source.c"}
    assert not [unit for unit in plan(settings(sample_tokens=0), set()) if unit.kind == "drift" or unit.task == "code"]


def test_the_plan_refuses_before_any_work():
    with pytest.raises(ValueError, match="'best' is unknown"):
        plan(settings(rules=("best",)), set())
    with pytest.raises(ValueError, match="'own' on 400 tokens: budget_tokens=12 must be at least 16"):
        plan(settings(budgets=("1/32",)), set())
    with pytest.raises(ValueError, match="leave no prompt before 399"):
        plan(settings(sample_tokens=399), set())
    with pytest.raises(ValueError, match="rule 'quest' is simulated"):
        plan(settings(tokens=(4000,), rules=("quest",), exact_prompt=True), set())


def test_a_run_makes_the_rows_of_its_plan(tmp_path):
    with open_results(tmp_path / "out", settings().json()) as results:
        units, seen, read = plan(settings(), {"source.c"}), [], []
        assert run(made_suite(results), units, at_row=seen.append, progress=read.append) == 0
        assert [Unit.of(row) for row in results.rows] == units
        assert seen == results.rows == read_folder(tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "rows.jsonl", "settings.json"]
    assert sum(read) > 0.8 * sum(unit.read_tokens for unit in units)
    for row in results.rows:
        assert row["model"] == "tiny"
        share = {None: None, "1/8": 8, "1/4": 4}[row["budget"]]
        assert row["budget_tokens"] == (share and row["tokens"] // share)
        assert (row["attended"] == 1) == (row["rule"] == "dense")
    longest = [row for row in results.rows if row["kind"] == "drift" and row["tokens"] == 700]
    assert {row["new_tokens"] for row in longest} == {12}


def test_prompts_can_be_read_exactly(tmp_path):
    made = {}
    for exact in (False, True):
        chosen = settings(tokens=(700,), budgets=("1/8",), examples=1, exact_prompt=exact)
        with open_results(None, {}) as results:
            run(made_suite(results, **vars(chosen)), plan(chosen, {"source.c"}))
        made[exact] = {Unit.of(row): row for row in results.rows}
    for unit, row in made[True].items():
        other = made[False][unit]
        assert (row["exact_prompt"], other["exact_prompt"]) == (True, False)
        assert (row["attended"] < 0.2) == (unit.rule != "dense")
        differ = {name for name in ("nll", "drift_nats") if name in row and row[name] != other[name]}
        assert bool(differ) == (unit.rule != "dense" and unit.kind in ("nll", "drift")), unit
    scores = task_scores([row for rows in made.values() for row in rows.values()])
    assert {score.rule for score in scores} == {"dense", "own", "own, exact prompt"}


def test_a_resumed_run_makes_the_same_rows(tmp_path, monkeypatch):
    units = plan(settings(), {"source.c"})
    with open_results(None, {}) as whole:
        run(made_suite(whole), units)
    dense_readings = []
    monkeypatch.setattr(
        suite, "score_rule", lambda *a, f=suite.score_rule, **k: dense_readings.append(a[2]) or f(*a, **k)
    )
    for first, last in ((0, 1), (1, 2), (2, 19), (19, len(units))):
        with open_results(tmp_path, settings().json()) as results:
            assert len(results.rows) == first
            run(made_suite(results), units[first:last]) if last == len(units) else [
                part.measure(unit) for part in [made_suite(results)] for unit in units[first:last]
            ]
    assert measured(read_folder(tmp_path)) == measured(whole.rows)
    assert dense_readings.count("dense") == 4  # documents and lengths: never again for a rule to come
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_lost_dense_reading_is_made_again(tmp_path):
    units = plan(settings(parts=("nll",)), set())[:3]
    with open_results(None, {}) as whole:
        run(made_suite(whole), units)
    with open_results(tmp_path, settings().json()) as results:
        made_suite(results).measure(units[0])
        (path,) = tmp_path.glob("*.safetensors")
        path.unlink()
        path.with_suffix(".partial").write_bytes(b"killed while it was saved")
        run(made_suite(results), units[1:])
    assert not list(tmp_path.glob("dense-*"))
    assert measured(read_folder(tmp_path)) == measured(whole.rows)


def test_no_unit_is_begun_when_the_time_is_over():
    with open_results(None, {}) as results:
        units = plan(settings(parts=("nll",)), set())
        assert run(made_suite(results), units, seconds=-1) == len(units)
        assert not results.rows


def test_a_suite_refuses_before_it_reads():
    from transformers import GPT2Config, GPT2LMHeadModel

    with open_results(None, {}) as results:
        with pytest.raises(ValueError, match=r"novel\.txt: the document has \d+ tokens, fewer than the 60000"):
            made_suite(results, tokens=(60_000,), documents={"novel.txt": ""})
        no_rope = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=8, n_layer=1, n_head=1, n_positions=700))
        with pytest.raises(ValueError, match="model_type='gpt2' is not on the list"):
            Suite(no_rope, byte_tokenizer(), settings(), {"novel.txt": NOVEL}, results)
        assert not results.rows


# ---- the folder ---------------------------------------------------------------------------------------


def test_a_folder_is_resumed_with_equal_settings_only(tmp_path):
    out = tmp_path / "a" / "out"
    with open_results(out, {"rules": ["balanced"], "seed": 0}) as results:
        results.append({"kind": "nll", "nll": 1.5})
    with open_results(out, {"seed": 0, "rules": ("balanced",)}) as results:
        assert results.rows == [{"kind": "nll", "nll": 1.5}]
    with (
        pytest.raises(ValueError, match=r"other settings \(seed: 0 there, 1 now\); name another folder"),
        open_results(out, {"rules": ["balanced"], "seed": 1}),
    ):
        pass


def test_a_folder_without_rows_takes_other_settings(tmp_path):
    for seed in (0, 1):
        with open_results(tmp_path, {"seed": seed}):
            pass
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 1}


def test_a_folder_that_is_none_of_ours(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path, why in ((tmp_path, "holds no results of hga eval"), (tmp_path / "notes.txt", "is a file")):
        with pytest.raises(ValueError, match=why), open_results(path, {}):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="holds no rows"):
        read_folder(tmp_path)


def test_a_run_killed_at_its_very_beginning_leaves_no_results(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".settings.json").write_text('{"se')
    with open_results(tmp_path, {"seed": 0}) as results:
        assert results.rows == []
    with open_results(tmp_path, {"seed": 0}):
        pass


def test_a_folder_in_use(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="in use"), open_results(tmp_path, {}):
        pass


def test_an_unfinished_line_is_dropped_and_a_broken_one_is_named(tmp_path):
    with open_results(tmp_path, {}) as results:
        results.append({"kind": "nll"})
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"kind": "ta')
    with open_results(tmp_path, {}) as results:
        assert results.rows == [{"kind": "nll"}]
        results.append({"kind": "task"})
    assert read_folder(tmp_path) == [{"kind": "nll"}, {"kind": "task"}]
    for broken in ('{"kind": \n', "3\n"):
        (tmp_path / "rows.jsonl").write_text('{"kind": "nll"}\n' + broken)
        with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"), open_results(tmp_path, {}):
            pass
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for broken, why in (("{", "is not JSON"), ("[]", "holds list instead of an object")):
        (tmp_path / "settings.json").write_text(broken)
        with pytest.raises(ValueError, match=why), open_results(tmp_path, {}):
            pass


def test_no_row_with_a_number_that_json_lacks(tmp_path):
    with open_results(tmp_path, {}) as results:
        with pytest.raises(ValueError, match="JSON compliant"):
            results.append({"nll": float("nan")})
        assert not results.rows
    assert not (tmp_path / "rows.jsonl").exists()


# ---- the command --------------------------------------------------------------------------------------


def command(folder, texts, out, *more) -> list[str]:
    arguments = ["eval", "run", "--model", folder, "--document", texts / "novel.txt", "--document", texts / "source.c"]
    arguments += ["--tokens", "400,600", "--rules", "dense", "--config", texts / "own.json", "--budget", "1/8,1/4"]
    arguments += ["--tasks", "needle", "--examples", 8, "--new-tokens", 8, "--sample-tokens", 8, "--out", out, *more]
    return [str(argument) for argument in arguments]


def test_a_killed_run_goes_on_where_it_was(capsys, folder, texts):
    out, source = texts / "out", Path(hga.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "hga", *command(folder, texts, out)],
        env=os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    rows = out / "rows.jsonl"
    while process.poll() is None and (not rows.exists() or rows.read_bytes().count(b"\n") < 9):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
    kept = rows.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    capsys.readouterr()
    assert main(command(folder, texts, out)) == 0
    units = [Unit.of(row) for row in read_folder(out) if row["kind"] != "run"]
    assert rows.read_bytes().startswith(kept)
    assert len(kept.splitlines()) >= 9
    assert len(units) == len(set(units)) == 2 * (3 * 2 + 8 * 3 * 2 + 2 * (3 + 2))
    before = len(kept.splitlines()) - 1
    assert f"{before} of {len(units)} rows are there already" in " ".join(capsys.readouterr().err.split())
    assert main([*command(texts / "gone", texts, out)]) == 2  # another model
    assert "model: " in capsys.readouterr().err


def test_a_finished_run_loads_no_model(capsys, folder, texts, monkeypatch):
    out = texts / "out"
    parts = ("--suite", "nll", "--json")
    assert main(command(folder, texts, out, *parts)) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [row for row in read_folder(out) if row["kind"] != "run"]
    monkeypatch.setattr("hga.cli.measure.load", None)
    assert main(command(folder, texts, out, *parts)) == 0
    assert "12 of 12 rows are there already" in " ".join(capsys.readouterr().err.split())


def test_stretched_positions_have_a_name_of_their_own(capsys, folder, texts):
    base = ["eval", "run", "--model", str(folder), "--document", str(texts / "novel.txt"), "--suite", "nll"]
    base += ["--tokens", "2100", "--budget", "1/8", "--rules", "lean", "--json", "--out", str(texts / "out")]
    assert main(base) == 2
    assert "--rope-scaling yarn:2" in capsys.readouterr().err
    assert main([*base, "--rope-scaling", "yarn:2"]) == 0
    dense, lean = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert dense["model"] == lean["model"] == f"{folder.name} yarn:2"
    assert (lean["tokens"], lean["budget_tokens"], lean["scored"]) == (2100, 262, 1049)


def test_a_run_ends_by_minutes(capsys, folder, texts):
    out = texts / "out"
    assert main(command(folder, texts, out, "--minutes", "0.0000001")) == 0
    assert re.search(r"minutes are over, \d+ of \d+ rows are left; the same command goes on", capsys.readouterr().err)


def test_tasks_and_generate_show_what_they_found(capsys, folder, texts):
    novel = ["--model", str(folder), "--document", str(texts / "novel.txt"), "--tokens", "1500", "--budget", "1/4"]
    assert main(["eval", "tasks", *novel, "--tasks", "needle,records", "--examples", "1"]) == 0
    shown = capsys.readouterr()
    for word in ("1,500", "needle", "records", "of dense", "dense", "balanced 1/4"):
        assert word in shown.out
    assert "novel.txt, 1,500 tokens, balanced 1/4: needle 0: 0.00" in shown.err
    assert main(["eval", "generate", *novel, "--new-tokens", "6", "--sample-tokens", "8", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["kind"], row["rule"]) for row in rows] == [
        ("agreement", "dense"),
        ("agreement", "balanced"),
        ("drift", "balanced"),
    ]
    assert len(rows[0]["written"]) == 6


def test_the_command_refuses(capsys, folder, texts):
    (texts / "again").mkdir()
    (texts / "again" / "novel.txt").write_text("x")
    novel = ["--document", str(texts / "novel.txt")]
    for arguments, why in (
        (["tasks", *novel, "--tasks", "haystack"], "task 'haystack' is unknown"),
        (["tasks", *novel, "--tasks", "code"], "none of novel.txt is one"),
        (["tasks", *novel, "--examples", "0"], "--examples 0 must be at least 1"),
        (["tasks", *novel, "--rules", "best"], "rule 'best' is unknown"),
        (["tasks", *novel, "--tokens", "2048", "--budget", "1/64"], "budget_tokens=32 must be at least 36"),
        (["tasks", *novel, "--budget", "much"], "1/32 or 0.03125"),
        (["tasks", *novel, "--tokens", "4K"], "--tokens '4K' must be a number"),
        (["tasks", *novel, "--document", str(texts / "again" / "novel.txt")], "two documents are called novel.txt"),
        (["tasks", *novel, "--minutes", "0"], "--minutes 0.0 must be above 0"),
        (["tasks", *novel, "--model", str(folder), "--tokens", "4096"], "--rope-scaling yarn:2"),
        (["tasks", *novel, "--model", str(folder), "--tokens", "150", "--budget", "1"], "raise --tokens"),
        (["tasks", *novel, "--model", str(folder), "--tokens", "700", "--budget", "1"], "does not fit into 700 tokens"),
        (["generate", *novel, "--tokens", "256", "--budget", "1"], "leave no prompt"),
        (["generate", *novel, "--tokens", "900", "--budget", "1/4", "--sample-tokens", "3"], "at least 8"),
        (["run", *novel, "--out", str(texts / "out"), "--suite", "all"], "must name parts of nll, tasks, generate"),
        (["run", *novel, "--out", str(texts / "out"), "--score", "some"], "must be half or all"),
        (["run", *novel, "--out", str(texts / "out"), "--score", "all", "--exact-prompt"], "leaves no prompt"),
        (["run", *novel, "--out", str(texts)], "holds no results of hga eval"),
        (["run", *novel], "--out"),
        (["report", str(texts)], "holds no rows"),
    ):
        assert main(["eval", *arguments]) == 2, arguments
        out, err = capsys.readouterr()
        assert out == ""
        assert why in err.splitlines()[-1]


# ---- summary and report -------------------------------------------------------------------------------


def task_row(rule, example, score, **more):
    fields = {"kind": "task", "model": "m", "document": "d", "tokens": 100, "task": "needle", "budget": None}
    return fields | {"rule": rule, "example": example, "score": score} | more


def test_scores_are_read_against_dense():
    rows = [task_row("dense", n, score) for n, score in enumerate((1, 1, 0, 0.5))]
    rows += [task_row("own", n, score, budget="1/8") for n, score in enumerate((1, 0, 1))]
    rows += [task_row("dense", 0, 0, task="code"), task_row("own", 0, 1, task="code", budget="1/8")]
    found = {(score.rule, score.task): score for score in task_scores(rows)}
    own = found["own", "needle"]
    assert (own.replies, own.score, own.dense, own.of_dense) == (3, pytest.approx(2 / 3), pytest.approx(2 / 3), 1)
    assert own.exact == pytest.approx(2 / 3)
    assert own.se == pytest.approx((1 / 3 / 3) ** 0.5)  # variance 1/3 over 3 replies
    assert found["dense", "needle"].exact == 0.5
    assert found["own", "code"].of_dense is None
    assert found["own", "code"].se is None
    assert found["own", "all"].of_dense == pytest.approx(3 / 2)
    columns, lines = task_table(list(found.values()))
    assert columns == ["model", "tokens", "rule", "replies", "code", "needle", "all", "of dense"]
    assert lines[0] == ["m", "100", "dense", "5", "0.00", "0.62 ± 0.24", "0.50 ± 0.22", "100%"]
    assert lines[1] == ["m", "100", "own 1/8", "4", "1.00", "0.67 ± 0.33", "0.75 ± 0.25", "150%"]


def test_mean_gap_of_documents():
    assert mean_gap([{"gap_nats": 0.1, "se_nats": 0.03}, {"gap_nats": 0.3, "se_nats": 0.04}]) == pytest.approx(
        (0.2, 0.025)
    )


def test_the_report_opens_offline_and_shows_every_part(capsys, folder, texts):
    out = texts / "out"
    assert main(command(folder, texts, out, "--examples", "1")) == 0
    recall = [
        {"kind": "recall", "model": "tiny", "document": "<b>d</b>", "tokens": 400, "rule": "own", "layer": layer}
        | {"head": head, "recalled": 0.5, "output_error": 0.1}
        for layer in range(2)
        for head in range(3)
    ]
    (out / "recall.jsonl").write_text("".join(json.dumps(row) + "\n" for row in recall))
    assert main(["eval", "report", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == page.count("</svg>") == 5
    for text in (
        "Gap against budget",
        "Gap by position",
        "needle",
        "first divergence",
        "&lt;b&gt;d&lt;/b&gt;",
        "own 1/8",
    ):
        assert text in page or text in re.sub(r"<!--|-->", "", page)
    assert "<b>" not in page
    # Nothing is fetched: no script, and no address but the names of XML dialects.
    assert "<script" not in page
    assert set(re.findall(r"https?://[^\"' ]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert main(["eval", "report", str(out), "--output", str(out)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_report_of_nothing(monkeypatch):
    with pytest.raises(ValueError, match="no measurement"):
        write_report([{"kind": "run", "hardware": "x"}], "title")


def test_the_report_without_matplotlib(capsys, tmp_path, monkeypatch):
    row = {"kind": "recall", "model": "m", "document": "d", "tokens": 4, "rule": "r", "layer": 0, "head": 0}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"recalled": 1.0, "output_error": 0.0}) + "\n")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["eval", "report", str(tmp_path)]) == 2
    assert "pip install 'hga[report]'" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.weights
def test_a_real_model_finds_a_needle(default_model, tmp_path):
    model, tokenizer = default_model
    own = settings(tokens=(400,), rules=("balanced",), budgets=("1",), own={}, tasks=("needle",), examples=1)
    own = Settings(**vars(own) | {"parts": ("tasks", "nll"), "documents": {"novel.txt": sha256(NOVEL)}})
    with open_results(None, {}) as results:
        assert run(Suite(model, tokenizer, own, {"novel.txt": NOVEL}, results), plan(own, set())) == 0
    dense, whole, dense_nll, whole_nll = results.rows
    assert dense["score"] == 1
    assert whole["reply"] == dense["reply"]
    assert dense["prompt_tokens"] > 360
    assert 2.5 < dense_nll["nll"] < 4.5
    assert abs(whole_nll["gap_nats"]) < 1e-4
    assert whole_nll["kl_mean"] < 1e-4
    assert whole_nll["top1_agreement"] > 0.99
