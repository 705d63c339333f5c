"""From logits to the next token."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# What a model's generation config can ask for that changes answers and is not built here.
_UNSUPPORTED = (
    *("bad_words_ids", "begin_suppress_tokens", "suppress_tokens", "sequence_bias", "forced_bos_token_id"),
    *("forced_eos_token_id", "min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_repetition_penalty"),
    *("exponential_decay_length_penalty", "guidance_scale", "watermarking_config", "num_beams", "penalty_alpha"),
    *("dola_layers", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "stop_strings"),
)
_GENERATE_TOP_K = 50
"""What `generate` takes for a model that samples and does not say."""
_COLDEST = 1e-4
"""Below it the likeliest token is certain, and logits divided by the temperature may overflow."""
_HARMLESS: tuple[Any, ...] = (None, 0, 1.0, [], {})


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0: the likeliest. top_k 0: of all; seed None: another answer each time."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @classmethod
    def default(cls, config: GenerationConfig) -> Sampling:
        """What `model.generate` would do by itself. ValueError for a generation config that asks for more."""
        for name in _UNSUPPORTED:
            value = getattr(config, name, None)
            if value not in _HARMLESS:
                raise ValueError(
                    f"the model's generation config asks for {name}={value}, which serving does not do and which "
                    f"changes answers; set model.generation_config.{name} = None to serve without it"
                )
        penalty = config.repetition_penalty or 1.0
        if not config.do_sample:
            return cls(repetition_penalty=penalty)
        temperature = 1.0 if config.temperature is None else config.temperature
        top_p = 1.0 if config.top_p is None else config.top_p
        top_k = _GENERATE_TOP_K if config.top_k is None else config.top_k
        return cls(temperature, top_p, top_k, penalty)

    def replace(self, **changes: Any) -> Sampling:
        """A copy with the changes that are not None."""
        return dataclasses.replace(self, **{name: value for name, value in changes.items() if value is not None})


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        self._generator: torch.Generator | None = None
        if sampling.temperature < _COLDEST:
            return
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        if sampling.temperature != 1:
            self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self._processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._processors.append(TopPLogitsWarper(sampling.top_p))

    def choose(self, ids: list[int], logits: Tensor) -> int:
        """The token after `ids`, by logits (1, V) on any device."""
        scores = logits.float()
        if self._processors:
            scores = self._processors(torch.tensor([ids], device=scores.device), scores)  # type: ignore[arg-type]
        if self._generator is None:
            return int(scores.argmax())
        # Drawn on the CPU, so that a seed means the same on every device.
        return int(torch.multinomial(scores.softmax(-1)[0].cpu(), 1, generator=self._generator))
