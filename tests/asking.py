"""Reading a document and asking about it: what the tests of forks and saved contexts share."""

from __future__ import annotations

import torch
from rows import SMALL
from torch import Tensor
from transformers import PreTrainedModel

import hga
from hga.cache import HGACache


def read(model: PreTrainedModel, ids: Tensor, cache: HGACache) -> Tensor:
    """Feed ids (B, T); the last logits."""
    with torch.no_grad():
        return model(ids, past_key_values=cache, logits_to_keep=1).logits


def answer(model: PreTrainedModel, ids: Tensor, cache: HGACache, tokens: int = 40) -> Tensor:
    """Greedy tokens and logits (tokens, 1 + vocabulary) behind a prompt of which the cache holds the first part."""
    out = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat([out.sequences[0, ids.shape[1] :, None], torch.cat(out.logits)], 1)


def new_cache(model: PreTrainedModel, config: hga.HGAConfig = SMALL) -> HGACache:
    return HGACache(config=model.config, hga_config=config)
