"""`hga chat` and the conversation behind it, on a tiny model."""

import io
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import byte_tokenizer, save_tiny_model, tiny_model

import hga
from hga.cli import main
from hga.serving.conversation import Conversation
from hga.serving.sampling import Sampling

SMALL = hga.HGAConfig(chunk_size=32, sink_tokens=4, window_tokens=16, budget_tokens=64, prefill="routed")
# As those of thinking models: what was thought in earlier turns is taken out again.
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<a>{{ m.content.split('</think>')[-1] }}"
    "{% else %}<u>{{ m.content }}{% endif %}<e>{% endfor %}{% if add_generation_prompt %}<a><think>{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    made = tiny_model()
    made.generation_config.eos_token_id = None
    with hga.enabled(made, SMALL):
        yield made


def tokenizer() -> Any:
    made = byte_tokenizer()
    made.chat_template = THINKING
    return made


def turn(conversation: Conversation, question: str, tokens: int = 20) -> tuple[str, Any]:
    answer = conversation.begin(question, Sampling(), tokens)
    text = ""
    while answer.finish is None:
        text += answer.advance()
    conversation.end(question, answer, text)
    return text, answer


def generated(model: Any, text: str, tokens: int) -> str:
    prompt = torch.tensor([tokenizer()(text).input_ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
    return tokenizer().decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


def test_turns_read_from_where_the_template_rewrote_them(model: Any) -> None:
    document = "A document that is read once. " * 9
    conversation = Conversation(model, tokenizer(), SMALL, [document])
    first, answer = turn(conversation, "One?")
    opening = f"<u>{document}\n\nOne?<e><a><think>"
    assert first == generated(model, opening, 20)
    assert answer.cached_tokens == 0
    # The template leaves out <think> now: of the first turn all is reused up to there.
    second, answer = turn(conversation, "Two?")
    prompt = f"<u>{document}\n\nOne?<e><a>{first}<e><u>Two?<e><a><think>"
    assert second == generated(model, prompt, 20)
    kept = hga.common_prefix((opening + first).encode(), prompt.encode())
    assert answer.cached_tokens == kept < len(opening)
    third, answer = turn(conversation, "Three?")
    assert answer.cached_tokens >= len(prompt) - len("<think>") - 1
    assert third == generated(model, f"{prompt[:-7]}{second}<e><u>Three?<e><a><think>", 20)


def test_what_was_thought_is_taken_out(model: Any) -> None:
    conversation = Conversation(model, tokenizer(), SMALL)
    answer = conversation.begin("One?", Sampling(), 30)
    while answer.finish is None:
        answer.advance()
    conversation.end("One?", answer, "long thoughts</think>Yes.")
    second, answer = turn(conversation, "Two?")
    assert second == generated(model, "<u>One?<e><a>Yes.<e><u>Two?<e><a><think>", 20)
    assert answer.cached_tokens == len("<u>One?<e><a>")


def test_saved_conversations_go_on(model: Any, tmp_path: Path) -> None:
    document = "Some document. " * 20
    conversation = Conversation(model, tokenizer(), SMALL, [document])
    first, _ = turn(conversation, "One?")
    saved = conversation.save(tmp_path / "talk.hga", lambda done, whole: None)
    second, _ = turn(conversation, "Two?")
    for _ in range(2):
        resumed = Conversation.resume(tmp_path / "talk.hga", model, tokenizer())
        for _ in range(2):
            again, answer = turn(resumed, "Two?")
            assert again == second
            assert answer.cached_tokens == saved.tokens
            third, answer = turn(resumed, "Three?")
            prompt = f"<u>{document}\n\nOne?<e><a>{first}<e><u>Two?<e><a>{second}<e><u>Three?<e><a><think>"
            assert third == generated(model, prompt, 20)
            resumed.save(tmp_path / "later.hga", lambda done, whole: None)
            resumed.reset()
        later = Conversation.resume(tmp_path / "later.hga", model, tokenizer())
        fourth, _ = turn(later, "Four?")
        assert fourth == generated(model, f"{prompt[:-7]}{third}<e><u>Four?<e><a><think>", 20)


def test_an_answer_that_was_stopped(model: Any) -> None:
    text = "x" * 1500  # read in two blocks
    conversation = Conversation(model, tokenizer(), SMALL)
    answer = conversation.begin(text, Sampling(), 20)
    answer.advance()
    assert answer.is_reading
    conversation.end(text, answer, "")
    assert conversation.messages == []
    said, answer = turn(conversation, text + "y")
    assert answer.cached_tokens > 700  # what was read is not lost
    assert said == generated(model, "<u>" + text + "y<e><a><think>", 20)


def test_positions_run_out(model: Any) -> None:
    conversation = Conversation(model, tokenizer(), SMALL)
    with pytest.raises(ValueError, match="2048 positions"):
        conversation.begin("x" * 2100, Sampling(), 20)
    assert conversation.begin("x" * 2030, Sampling(), 20).request.max_tokens < 20


def test_models_without_a_template_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        Conversation(model, byte_tokenizer(), SMALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = save_tiny_model(tmp_path / "model", eos_token_id=None)
    tokenizer().save_pretrained(made)
    return made


def chat(folder: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", "--model", str(folder), "--max-new-tokens", "8", *options])


def test_command_through_a_pipe(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "document.txt"
    document.write_text("What the talk is about. " * 30)
    saved = tmp_path / "talk.hga"
    lines = f"/help\nOne?\n/stats\n/save\n/save {saved}\n/nonsense\n//slash\n\n/reset\nOne?\n/save {tmp_path}\n"
    assert chat(folder, lines, monkeypatch, "--document", str(document)) == 0
    out, err = capsys.readouterr()
    answers = [line for line in out.split("\n") if line]
    assert len(answers) >= 3
    for said in ("Ctrl-C stops", "tokens held", "last turn", "needs a path", "no command", "forgotten", "saved"):
        assert said in err, err
    assert chat(folder, "One?\n/quit\nnever\n", monkeypatch, "--context", str(saved)) == 0
    capsys.readouterr()
    assert chat(folder, "", monkeypatch, "--context", str(saved), "--budget", "99") == 2
    assert "another routing rule" in capsys.readouterr().err
    assert chat(folder, "", monkeypatch, "--context", str(saved), "--document", str(document)) == 2
    assert "not both" in capsys.readouterr().err
    assert chat(folder, "", monkeypatch, "--document", str(tmp_path / "missing")) == 2


def test_a_document_that_was_saved_is_a_document_that_is_given(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document, saved = tmp_path / "document.txt", tmp_path / "document.hga"
    document.write_text("What the talk is about. " * 30)
    lines = "One?\nTwo?\n/stats\n/reset\nOne?\n"
    assert chat(folder, lines, monkeypatch, "--document", str(document)) == 0
    given = capsys.readouterr().out
    save = ["context", "save", "--model", str(folder), "--document", str(document), "--out", str(saved)]
    assert main([*save, "--chat"]) == 0
    capsys.readouterr()
    assert chat(folder, lines, monkeypatch, "--context", str(saved)) == 0
    assert capsys.readouterr().out == given
    assert main(save) == 0
    assert chat(folder, lines, monkeypatch, "--context", str(saved)) == 2
    assert "holds a text and no chat" in capsys.readouterr().err


def test_what_goes_wrong_with_a_line_does_not_end_the_chat(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = Conversation.begin
    on_a_cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    for raised, said in (
        (KeyboardInterrupt(), "stopped"),
        (torch.OutOfMemoryError("full"), "full"),
        (on_a_cpu, "can't allocate"),
    ):

        def fail(conversation: Conversation, question: str, *arguments: Any, raised: Any = raised) -> Any:
            if question == "Two?":
                conversation.cache.keep_first(3)  # cut off in the middle of going back
                raise raised
            return begin(conversation, question, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Conversation, "begin", fail)
            assert chat(folder, "One?\nTwo?\nThree?\n", patch) == 0
        out, err = capsys.readouterr()
        assert said in err
        assert chat(folder, "One?\nThree?\n", monkeypatch) == 0
        assert capsys.readouterr().out == out
    assert chat(folder, "One?\nb\udcffd\nTwo?\n/stats\n", monkeypatch) == 0
    err = capsys.readouterr().err
    assert "no UTF-8" in err
    assert "last turn" in err


def test_ctrl_c_stops_the_answer_and_not_the_program(folder: Path) -> None:
    command = [sys.executable, "-u", "-m", "hga", "chat", "--model", str(folder), "--max-new-tokens", "1900"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("tell me everything\n")
        process.stdin.flush()
        assert process.stdout.read(5)  # the answer has begun
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, err = process.communicate("/stats\n", timeout=30)
        assert time.monotonic() - started < 20
        assert process.returncode == 0
        assert "stopped" in err
        assert "tokens held" in err
    finally:
        process.kill()
        process.communicate()
