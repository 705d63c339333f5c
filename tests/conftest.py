"""What all tests share: few threads, derandomised property tests, kernels interpreted without a GPU."""

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: kernels then run on the CPU

from hypothesis import settings
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
torch.set_num_threads(1)  # tiny tensors: two contended threads are many times slower; two workers share the tests
settings.register_profile("hga", derandomize=True, deadline=None, max_examples=25, print_blob=False)
settings.load_profile("hga")


@pytest.fixture(scope="session")
def default_model() -> tuple[Any, Any]:
    """The default model's real weights and tokenizer, float32: one copy in a process, shared by all its tests."""
    from hga.models import load_model

    return load_model("smollm2-135m")


@pytest.fixture(scope="session")
def recorded_layer(default_model: tuple[Any, Any]) -> Any:
    """Q, K and V of one layer of the default model on 2,000 tokens of the demo's text."""
    from importlib.resources import files

    from rows import Sequence3

    model, tokenizer = default_model
    ids = tokenizer((files("hga.data") / "thursday.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids
    recorded: dict[str, Any] = {}

    def record(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        if module.layer_idx == 12:
            heads = key.shape[1]
            recorded["sequence"] = Sequence3(query[0].unflatten(0, (heads, -1)), key[0], value[0])
            recorded["config"] = module.config
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("recording", record)
    AttentionMaskInterface.register("recording", sdpa_mask)
    model.set_attn_implementation("recording")
    try:
        with torch.no_grad():
            model.model(ids[:, :2000], use_cache=False)
    finally:
        model.set_attn_implementation("sdpa")
    return SimpleNamespace(layer_idx=12, **recorded)


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Path]]:
    """small_disk(bytes): a file system of its own for scratch files. Skips where mounting is not permitted."""
    from hga.store import scratch

    place = tmp_path / "disk"
    place.mkdir()
    mounted: list[Path] = []

    def mount(size_bytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")
        mounted.append(place)
        monkeypatch.setenv("HGA_SCRATCH", str(place))
        monkeypatch.setattr(scratch, "_in_memory", lambda folder: False)
        return place

    yield mount
    gc.collect()
    for held in mounted:
        subprocess.run(["umount", "--lazy", str(held)], check=True)
