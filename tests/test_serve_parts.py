"""Parts of the server one by one, the command that starts it, and a soak of mixed requests."""

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi")
from server import SMALL, model_and_tokenizer, serving
from tiny_model import byte_tokenizer, save_tiny_model

from hga.cli import main
from hga.serving.contexts import Contexts
from hga.serving.gate import read_keys
from hga.serving.sampling import Sampling
from hga.serving.text import TextStream


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# clients\n\nabcdefghijklmnop\nqrstuvwxyz0123456\n")
    assert read_keys(path) == ["abcdefghijklmnop", "qrstuvwxyz0123456"]
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys(path)
    path.write_text("short\n")
    with pytest.raises(ValueError, match="16 characters"):
        read_keys(path)
    with pytest.raises(ValueError, match="is no file"):
        read_keys(tmp_path / "missing")


def test_sampling_defaults_are_the_models() -> None:
    model, _ = model_and_tokenizer()
    config = model.generation_config
    assert Sampling.default(config) == Sampling()
    config.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1)
    assert Sampling.default(config) == Sampling(0.6, 0.9, 20, 1.1)
    config.update(top_k=None)
    assert Sampling.default(config).top_k == 50
    config.update(no_repeat_ngram_size=3)
    with pytest.raises(ValueError, match="no_repeat_ngram_size=3"):
        Sampling.default(config)


@pytest.mark.parametrize("text", ["plain", "naïve, 日本語 \U0001f600 end", "a\N{REPLACEMENT CHARACTER}b"])
@pytest.mark.parametrize("stop", [(), ("zzz",), ("日本",), ("aïv", "ï"), ("d",)])
def test_text_streams_are_the_text_up_to_a_stop(text: str, stop: tuple[str, ...]) -> None:
    stream, shown = TextStream(byte_tokenizer(), stop), ""
    for token in byte_tokenizer()(text).input_ids:
        if not stream.stopped:
            shown += stream.add(token)
            assert "\N{REPLACEMENT CHARACTER}" not in shown or "\N{REPLACEMENT CHARACTER}" in text
    shown += stream.end()
    first = min(((text.index(one) + len(one), text.index(one)) for one in stop if one in text), default=(0, len(text)))[
        1
    ]
    assert shown == text[:first]
    assert stream.stopped == (first < len(text))


def test_command_refuses_what_is_not_safe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "--api-key-file" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err
    assert main(["serve", "--context-dir", str(tmp_path / "none")]) == 2
    folder = save_tiny_model(tmp_path)
    assert main(["serve", "--model", str(folder), "--port", "0", "--max-context", "5000"]) == 2
    assert "2048 positions" in capsys.readouterr().err


def test_command_serves_and_ends(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    command = [sys.executable, "-m", "hga", "serve", "--model", str(folder), "--port", "0", "--cache-gb", "0.1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = ""
        while "listening" not in said:
            said = process.stderr.readline()
            assert said, "the server ended"
        url = said.split()[-1]
        models = httpx.get(f"{url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["tiny"]  # the folder's name, never its path
        body = {"model": "tiny", "prompt": "x", "max_tokens": 3}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_command_says_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert "pip install 'hga[serve]'" in capsys.readouterr().err


def test_transformers_own_chat_client(tmp_path: Path) -> None:
    command = shutil.which("transformers", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("this transformers has no command of its own")
    with serving(*model_and_tokenizer(), SMALL) as server:
        talk = [command, "chat", "served", server.url, "max_new_tokens=9", "do_sample=False"]
        lines = "hello\nn\n!exit\n"  # n: nothing more of an answer that has reached its limit
        done = subprocess.run(talk, input=lines, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        assert "<served>" in done.stdout
        metrics = server.metrics()
    assert metrics['hga_requests_total{path="/load_model",status="200"}'] == 1
    assert metrics['hga_requests_total{path="/v1/chat/completions",status="200"}'] == 1
    assert metrics["hga_new_tokens_total"] == 9


def test_contexts_start_empty() -> None:
    assert Contexts(0).find("", [1, 2], None) == (None, 0)


def test_soak_of_mixed_requests() -> None:
    from serve_soak import CLIENTS, find_faults, soak

    model, tokenizer = model_and_tokenizer()
    with serving(model, tokenizer, SMALL, max_requests=3 * CLIENTS, limit_bytes=4 << 20) as server:
        told = soak(server, 200, "A document on which several clients ask. " * 12)
    assert not find_faults(told), told


def test_a_soak_finds_what_grows() -> None:
    from serve_soak import GROWTH_BYTES, find_faults

    sound = {"add_up": {"400": True}, "under_way": 0, "files": [9, 9], "contexts_bytes": [0, 0], "rss_bytes": [1, 1]}
    assert not find_faults(sound)
    assert "still grows" in find_faults(sound | {"rss_bytes": [1, 2 + GROWTH_BYTES]})[0]
    assert not find_faults(sound | {"rss_bytes": [1, 2 + GROWTH_BYTES], "contexts_bytes": [0, 1]})
    assert "do not add up" in find_faults(sound | {"add_up": {"400": False}})[0]
    assert "stuck" in find_faults(sound | {"under_way": 1})[0]
    assert "3 files more" in find_faults(sound | {"files": [9, 12]})[0]
