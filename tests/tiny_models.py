"""Tiny random checkpoints, as transformers saves them, for every test that needs a model and not its knowledge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_checkpoint(
    directory: Path,
    model_type: str = "llama",
    layers: int = 4,
    seed: int = 0,
    tied: bool = False,
    dtype: str = "float32",
    vocab: int = 512,
    hidden: int = 64,
    context: int = 512,
    max_shard_size: str = "5GB",
    as_published: bool = True,
    shape: Mapping[str, object] | None = None,
) -> Path:
    """A whole Hugging Face folder at `directory`: random weights, a real byte-level tokenizer, a chat template.

    Weights are drawn ten times wider than a fresh model's, so that logits differ enough for greedy draws to be
    stable; norms differ from one, so that a swapped norm shows. max_shard_size "200KB" gives a sharded index.
    as_published False: tensors as transformers' modules hold them (experts stacked), not as such models are published.
    shape: settings of the configuration in place of these.
    Equal arguments give equal bytes. Returns `directory`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    settings: dict[str, object] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, **(settings | _extra(model_type, hidden) | dict(shape or {})))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(directory, max_shard_size=max_shard_size, save_original_format=as_published)
    write_tokenizer(directory, vocab, context)
    return directory


def write_tokenizer(directory: Path, vocab: int = 512, context: int = 512) -> None:
    """The files beside the weights: a tokenizer of at most `vocab` tokens, its chat template, what ends an answer."""
    tiny_tokenizer(vocab).save(str(directory / "tokenizer.json"))
    _write(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END,
            "pad_token": END_OF_TEXT,
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write(directory / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0})


def tiny_tokenizer(vocab: int) -> Tokenizer:
    """Byte-level BPE with at most `vocab` tokens, the specials first; any text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = (Path(__file__).parents[1] / "LICENSE").read_text()
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    return tokenizer


def _extra(model_type: str, hidden: int) -> dict[str, object]:
    if model_type == "gpt2":
        return {"n_inner": 2 * hidden}
    extra: dict[str, object] = {"intermediate_size": 2 * hidden, "num_key_value_heads": 2}
    if model_type != "phi3":
        extra["head_dim"] = hidden // 4
    if model_type == "mixtral":
        extra |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if model_type == "qwen3_moe":
        extra |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden}
    if model_type in ("gemma2", "gemma3_text"):
        extra |= {"sliding_window": 32, "query_pre_attn_scalar": hidden // 4}
    return extra


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
