"""Models for benchmarks on GPUs: published configurations with random weights, and what a step reads of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from serve_app.engine.engine import KvDtype
from shard_tools.manifest import Manifest
from tests.tiny_models import write_tokenizer

MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True, "rope_theta": 1000000.0, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    },
    "llama3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "tie_word_embeddings": False, "rope_theta": 500000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    },
    # The layers of Qwen3-30B-A3B, as many as leave room for a checkpoint and a store of them on one host.
    "qwen3-30b-a3b-8-layers": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 8,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": False, "rope_theta": 1000000.0, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    },
    "tiny": {
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000,
        "tie_word_embeddings": True, "rope_theta": 1000000.0, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    },
    "tiny-moe": {
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000,
        "tie_word_embeddings": True, "rope_theta": 1000000.0, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True,
    },
}  # fmt: skip
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "llama": "LlamaForCausalLM"}


def write_checkpoint(folder: Path, shape: dict[str, Any], device: str) -> None:
    """Random weights as transformers would write them, made on the device."""
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(**shape, bos_token_id=0, eos_token_id=2, pad_token_id=0)
    config.architectures = [ARCHITECTURES[shape["model_type"]]]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    files: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    size, n_files = 0, 0
    for name, parameter in model.named_parameters():
        weight = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim > 1:
            drawn = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.bfloat16)
            weight = (drawn * 0.02).cpu()
        pending[name] = weight
        size += weight.nbytes
        if size > 4 << 30:
            n_files, size = flush(folder, pending, files, n_files), 0
    flush(folder, pending, files, n_files)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder, context=shape["max_position_embeddings"])


def flush(folder: Path, pending: dict[str, torch.Tensor], files: dict[str, str], n: int) -> int:
    """Write what is pending as one file; the number of the next."""
    name = f"model-{n}.safetensors"
    save_file(pending, folder / name, metadata={"format": "pt"})
    files |= dict.fromkeys(pending, name)
    pending.clear()
    return n + 1


def bytes_read(manifest: Manifest, shape: dict[str, Any], rows: int) -> float:
    """Of weights, by a step of so many rows: each once, of experts those that somebody goes to if all are as likely.

    Of an embedding that is not tied only one row per token is read, which is not counted.
    """
    n, top = shape.get("num_experts", 1), shape.get("num_experts_per_tok", 1)
    reached, total = 1 - (1 - top / n) ** rows, 0.0
    places = {(ref.shard, manifest.tensor(ref).name): ref for unit in manifest.units for ref in unit.tensors}
    for ref in places.values():
        if "embed_tokens" in manifest.tensor(ref).name and not shape["tie_word_embeddings"]:
            continue
        total += manifest.tensor(ref).size * (reached if ".experts." in ref.name else 1.0)
    return total


def kv_bytes(shape: dict[str, Any], kv: KvDtype) -> int:
    """Of keys and values of one position in all layers."""
    of_head = shape["head_dim"] + 4 if kv == "fp8" else 2 * shape["head_dim"]
    return int(2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * of_head)
