"""A model of a few thousand weights with a byte tokenizer, as a folder that from_pretrained reads."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<end>"


def tiny_config(**changes) -> LlamaConfig:
    shape = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }
    return LlamaConfig(**(shape | changes))


def tiny_model(dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(initializer_range=0.3, **changes)).to(dtype)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {END: 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def save_tiny_model(folder: Path, **changes) -> Path:
    """Save model and tokenizer; returns the folder."""
    tiny_model(**changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
