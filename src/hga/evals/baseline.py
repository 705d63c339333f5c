"""What dense attention said about a document, kept so that each rule can be compared with it token by token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_NUMBERS_AT_ONCE = 1 << 24  # 64 MiB in float32


@dataclass(frozen=True)
class Baseline:
    """A dense reading: losses (n,) in nats, float32, and hidden (n, H), what the model's output layer read.

    n scored tokens. Hidden states are a hundred times smaller than logits; kept on the CPU in the model's type they
    give the dense logits again exactly.
    """

    losses: Tensor
    hidden: Tensor

    def save(self, path: Path) -> None:
        """Write a safetensors file; the name appears only once the file is whole."""
        beside = path.with_suffix(".partial")
        save_file({"losses": self.losses, "hidden": self.hidden}, beside)
        os.replace(beside, path)

    @classmethod
    def load(cls, path: Path) -> Baseline:
        """Read what `save` wrote. ValueError for another file."""
        try:
            with safe_open(path, framework="pt") as file:
                return cls(file.get_tensor("losses"), file.get_tensor("hidden"))
        except SafetensorError as error:
            raise ValueError(f"{path} is no dense reading ({error}); delete it, and it is made again") from error


@contextmanager
def output_layer_inputs(model: Any) -> Iterator[list[Tensor]]:
    """The list that fills with what the model's output layer reads, (T, H) a forward of one row."""
    inputs: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    try:
        yield inputs
    finally:
        hook.remove()


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits (T, V) that the model gives to hidden states (T, H) before its output layer."""
    logits: Tensor = model.get_output_embeddings()(hidden[None])[0]  # in the model's own shape: the same rounding
    cap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def check_logits(model: Any, hidden: Tensor, logits: Tensor) -> None:
    """ValueError if the model's logits (T, V) are not those of its output layer's input (T, H)."""
    rounding = 32 * torch.finfo(logits.dtype).eps * logits.abs().amax()
    if (logits_of(model, hidden) - logits).abs().amax() > rounding:
        raise ValueError(
            f"{type(model).__name__} changes its logits behind the output layer in a way that is not known here, so "
            "dense logits cannot be recomputed; score the rules without dense"
        )


def divergence(dense: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """KL(dense || other) in nats and whether both would write the same token, from logits (T, V): two of (T,)."""
    rows = max(1, _NUMBERS_AT_ONCE // dense.shape[-1])
    kl, same = [], []
    for p, q in zip(dense.split(rows), logits.split(rows), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    return torch.cat(kl), torch.cat(same)
