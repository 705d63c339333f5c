"""`hga context` and `hga generate --context`: a document is read once, questions come in later processes."""

from pathlib import Path

import pytest
from test_cli import TEXT, refused, rows
from tiny_model import byte_tokenizer, save_tiny_model, tiny_model
from transformers import AutoTokenizer

from hga.cli import main
from hga.cli.context import encode_document
from hga.config import HGAConfig

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BUDGET = ("--budget", 128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = save_tiny_model(tmp_path_factory.mktemp("model"))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def document(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def _read_alike(monkeypatch):
    """A short question behind a saved context is routed, which a prompt read at once is not: here both are."""
    monkeypatch.setattr(HGAConfig, "exact_block_tokens", 1 << 20)


def run(capsys, *arguments) -> dict:
    assert main([str(argument) for argument in (*arguments, "--json")]) == 0, capsys.readouterr().err
    (found,) = rows(capsys)
    return found


def saved(capsys, folder: Path, document: Path, *options) -> Path:
    path = document.with_suffix(".hga")
    run(capsys, "context", "save", "--model", folder, "--document", document, "--out", path, *BUDGET, *options)
    return path


def test_save_info_verify(folder, document, tmp_path, capsys):
    path = tmp_path / "book.hga"
    options = ("--model", folder, "--document", document, "--out", path, *BUDGET)
    row = run(capsys, "context", "save", *options)
    assert row["tokens"] == len(TEXT) + 2  # a token a byte, and an empty line behind it
    assert row["size_bytes"] == path.stat().st_size
    assert row["read_seconds"] > 0 < row["save_seconds"]
    assert row["config"]["budget_tokens"] == 128
    told = run(capsys, "context", "info", path)
    assert told == {name: value for name, value in row.items() if not name.endswith("_seconds")}
    checked = run(capsys, "context", "verify", path)
    assert (checked["intact"], checked["size_bytes"]) == (True, row["size_bytes"])
    assert main(["context", "info", str(path)]) == 0
    assert "llama, 2 layers, float32" in capsys.readouterr().out
    assert main(["context", "verify", str(path)]) == 0
    assert "is intact" in capsys.readouterr().err


@pytest.mark.usefixtures("_read_alike")
def test_an_answer_needs_no_reading(folder, document, capsys):
    path = saved(capsys, folder, document)
    options = ("generate", "--model", folder, "--max-new-tokens", 20)
    asked = run(capsys, *options, "--context", path, "--prompt", "Who?")
    whole = run(capsys, *options, *BUDGET, "--prompt", f"{TEXT}\n\nWho?")
    assert (asked["text"], asked["prompt_tokens"]) == (whole["text"], whole["prompt_tokens"])
    assert asked["reused_tokens"] == len(TEXT) + 2
    assert whole["reused_tokens"] == 0
    changed = f"{TEXT[:700]} and then?"  # begins with the document: only what differs is read
    asked = run(capsys, *options, "--context", path, "--prompt", changed)
    whole = run(capsys, *options, *BUDGET, "--prompt", changed)
    assert (asked["text"], asked["prompt_tokens"]) == (whole["text"], len(changed))
    assert asked["reused_tokens"] == 700
    assert main(["generate", "--model", str(folder), "--context", str(path), "--prompt", "Who?"]) == 0
    assert f"{len(TEXT) + 2:,} tokens from {path} in" in capsys.readouterr().err


@pytest.mark.parametrize("store", ["nvme", "auto"])
def test_an_answer_from_the_file_where_it_is(store, folder, document, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HGA_SCRATCH", str(tmp_path))
    path = saved(capsys, folder, document)
    options = ("generate", "--model", folder, "--max-new-tokens", 8, "--context", path, "--prompt", "Who?")
    memory = run(capsys, *options)
    disk = run(capsys, *options, "--store", store, "--ram-cache-gb", 0.0001)
    assert disk["text"] == memory["text"]
    storage = disk["cache"]["storage"]
    assert storage["read_operations"] > 0
    assert set(storage) >= {
        "read_bytes",
        "read_p50_ms",
        "read_p99_ms",
        "deepest_queue",
        "ram_hit_rate",
        "written_bytes",
    }
    assert memory["cache"]["storage"] is None


@pytest.mark.usefixtures("_read_alike")
def test_a_question_in_a_chat(folder, document, tmp_path, capsys):
    path = saved(capsys, folder, document, "--system", "Be brief.")
    asked = run(capsys, "generate", "--model", folder, "--context", path, "--prompt", "Who?", "--max-new-tokens", 20)
    prompt = f"<system>Be brief.</system><user>{TEXT}\n\nWho?</user><assistant>"
    whole = run(capsys, "generate", "--model", folder, *BUDGET, "--prompt", prompt, "--max-new-tokens", 20)
    assert (asked["text"], asked["prompt_tokens"]) == (whole["text"], len(prompt))
    assert asked["reused_tokens"] == prompt.index("Who?")
    assert main(["context", "info", str(path)]) == 0
    assert "in a chat template" in capsys.readouterr().out


def test_tokens_that_depend_on_the_question_are_left_out(default_model):
    tokenizer = default_model[1]
    for chat in (False, True):
        ids, suffix = encode_document(tokenizer, TEXT + "The end", chat, None)
        for question in ("What is it?", "7 of them", "über"):
            whole = tokenizer(f"{TEXT}The end\n\n{question}").input_ids if not chat else None
            if chat:
                message = [{"role": "user", "content": f"{TEXT}The end\n\n{question}"}]
                text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
                assert text.endswith(question + suffix)
                whole = tokenizer(text, add_special_tokens=False).input_ids
            assert whole[: len(ids)] == ids
        assert len(ids) > 200
        assert bool(suffix) == chat


def test_bad_input(folder, document, tmp_path, capsys):
    path = saved(capsys, folder, document)
    save = ("context", "save", "--model", folder, *BUDGET)
    assert "does not exist" in refused(capsys, *save, "--document", tmp_path / "no.txt", "--out", tmp_path / "o.hga")
    assert "it is a folder" in refused(capsys, *save, "--document", document, "--out", tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    assert "is empty" in refused(capsys, *save, "--document", tmp_path / "empty.txt", "--out", tmp_path / "o.hga")
    (tmp_path / "long.txt").write_text(TEXT * 3)
    assert "more than the model's 2048 positions" in refused(
        capsys, *save, "--document", tmp_path / "long.txt", "--out", tmp_path / "o.hga"
    )
    assert "is no saved context" in refused(capsys, "context", "info", document)
    assert "there is no saved context at" in refused(capsys, "context", "verify", tmp_path / "no.hga")
    ask = ("generate", "--prompt", "Who?", "--context", path)
    assert "leave --chat out" in refused(capsys, *ask, "--model", folder, "--chat")
    assert "leave --preset, --budget and --prefill out" in refused(capsys, *ask, "--model", folder, "--budget", 256)
    other = tmp_path / "other"
    tiny_model(rms_norm_eps=1e-3).save_pretrained(other)
    AutoTokenizer.from_pretrained(folder).save_pretrained(other)
    capsys.readouterr()  # saving draws a progress bar
    assert "saved for another model: rms_norm_eps" in refused(capsys, *ask, "--model", other)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert "is damaged: the checksum of" in refused(capsys, "context", "verify", path, "--json")
    assert sorted(p.name for p in tmp_path.glob("*.hga")) == ["book.hga"]


def test_help(capsys):
    for command in ("context", "context save", "context info", "context verify"):
        assert main([*command.split(), "--help"]) == 0
        assert "Example: hga context" in capsys.readouterr().out or command == "context"
    assert main(["generate", "--help"]) == 0
    assert "--context" in capsys.readouterr().out
