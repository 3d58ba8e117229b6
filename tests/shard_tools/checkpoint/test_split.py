"""Checkpoints to shards: every family's parameters arrive, each in its unit, and nothing less than a whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.errors import CheckpointError, InputError
from shard_tools.fetch import read_file, read_tensor, verify
from shard_tools.manifest import Manifest
from shard_tools.store.block_store import BlockStore
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "mixtral", "qwen3_moe")


def parameters(store: BlockStore, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Every parameter of the manifest, as a stage would read it."""
    out = {}
    for unit in manifest.units:
        for ref in unit.tensors:
            tensor = manifest.tensor(ref)
            data = bytearray(tensor.size)
            read_tensor(store, tensor, memoryview(data))
            out[ref.name] = torch.frombuffer(data, dtype=getattr(torch, tensor.dtype)).view(tensor.shape)
    return out


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family_arrives_bit_for_bit(family: str, tied: bool, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, family, layers=3, tied=tied)
    store = MemoryStore()
    manifest = split(open_checkpoint(folder), store, "m")
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = parameters(store, manifest)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert verify(store, manifest) == []
    embedding, head = manifest.units[0], manifest.units[-1]
    shared = {(ref.shard, ref.tensor) for ref in embedding.tensors} & {(ref.shard, ref.tensor) for ref in head.tensors}
    assert bool(shared) == tied
    for i, unit in enumerate(manifest.units[1:-1]):
        assert all(f".{i}." in ref.name and ref.shard == i + 1 for ref in unit.tensors)
    assert manifest.context_length == 512 and manifest.vocab_size == 512 and manifest.hidden_size == 64


def test_a_shard_is_a_safetensors_file_that_other_tools_read(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "ck", dtype="bfloat16")
    store = MemoryStore()
    manifest = split(open_checkpoint(folder), store, "m")
    path = tmp_path / "layer.safetensors"
    path.write_bytes(b"".join(store.get(leaf.cid) for leaf in manifest.shards[1].leaves))
    expected = load_file(folder / "model.safetensors")
    for name, tensor in load_file(path).items():
        assert name.startswith("model.layers.0.") and torch.equal(tensor, expected[name])


def test_a_sharded_checkpoint_gives_the_same_manifest_as_a_single_file(tmp_path: Path) -> None:
    one = write_tiny_checkpoint(tmp_path / "one")
    many = write_tiny_checkpoint(tmp_path / "many", max_shard_size="200KB")
    assert (many / "model.safetensors.index.json").exists()
    cids = {split(open_checkpoint(folder), MemoryStore(), "m").cid for folder in (one, many)}
    assert len(cids) == 1


def test_a_fine_tune_shares_the_layers_it_did_not_change(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    store = MemoryStore()
    before = split(open_checkpoint(folder), store, "m")
    held = set(store.cids())
    edit(folder, lambda t: t["model.layers.2.mlp.up_proj.weight"].mul_(2))
    after = split(open_checkpoint(folder), store, "m")
    assert [a.cid == b.cid for a, b in zip(before.shards, after.shards, strict=True)] == [True] * 3 + [False] + [
        True
    ] * 2
    assert len(set(store.cids()) - held) == 4  # one leaf, the layer's tree, its index, the manifest


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_conversion_rounds_as_torch_does(dtype: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    store = MemoryStore()
    manifest = split(open_checkpoint(folder), store, "m", dtype)  # type: ignore[arg-type]
    expected = load_file(folder / "model.safetensors")
    assert manifest.dtype == dtype
    for name, tensor in parameters(store, manifest).items():
        assert torch.equal(tensor, expected[name].to(getattr(torch, dtype)))


def test_small_files_travel_unchanged(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# x\nlicense: mit\n")
    store = MemoryStore()
    manifest = split(open_checkpoint(folder), store, "m")
    assert manifest.license == "apache-2.0"
    for file in manifest.files:
        assert read_file(store, file) == (folder / file.path).read_bytes()
    assert {"config.json", "tokenizer.json"} <= {file.path for file in manifest.files}


def test_a_checkpoint_of_the_bare_decoder_is_read(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, "gpt2", tied=True)
    whole = split(open_checkpoint(folder), MemoryStore(), "m")
    rename(folder, lambda name: name.removeprefix("transformer."))
    assert split(open_checkpoint(folder), MemoryStore(), "m").cid == whole.cid


def edit(folder: Path, change: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors")


def rename(folder: Path, to: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({to(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")  # type: ignore[operator]


def refused(folder: Path, match: str, dtype: str = "keep") -> None:
    """The checkpoint is refused with a message that says `match`, and nothing was written."""
    store = MemoryStore()
    with pytest.raises(CheckpointError, match=match):
        split(open_checkpoint(folder), store, "m", dtype)  # type: ignore[arg-type]
    assert not store.blocks


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    edit(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, "lacks tensor 'model.layers.1.mlp.up_proj.weight'")


def test_a_left_over_tensor_is_named(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    edit(folder, lambda t: t.update({"model.layers.9.x": torch.zeros(1)}))
    refused(folder, "'model.layers.9.x'")


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    edit(folder, lambda t: t.update({"model.norm.weight": torch.zeros(65)}))
    refused(folder, r"'model.norm.weight' has the shape \[65\]")


def test_integers_are_no_weights(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    edit(folder, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}))
    refused(folder, "int8")


def test_values_beyond_float16_are_not_turned_into_infinities(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    edit(folder, lambda t: t["model.norm.weight"].fill_(1e6))
    with pytest.raises(CheckpointError, match="beyond float16"):
        split(open_checkpoint(folder), MemoryStore(), "m", "float16")


def test_a_tied_tensor_stored_twice_with_different_values_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, tied=True)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    split(open_checkpoint(folder), MemoryStore(), "m")
    edit(folder, lambda t: t["lm_head.weight"].add_(1))
    refused(folder, "different values")


def test_a_truncated_weights_file_is_named(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, "model.safetensors is missing, cut short")


@pytest.mark.parametrize("part", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", "", 3])
def test_an_index_cannot_name_files_elsewhere(part: object, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, max_shard_size="200KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = part
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "no file of this folder")


def test_an_index_that_names_the_wrong_file_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, max_shard_size="200KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    parts = sorted(set(index["weight_map"].values()))
    wrong = next(part for part in parts if part != index["weight_map"]["model.norm.weight"])
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"model.norm.weight": wrong}}))
    refused(folder, "'model.norm.weight'")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, max_shard_size="200KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shutil.copy(folder / index["weight_map"]["model.norm.weight"], folder / "twice.safetensors")
    index["weight_map"]["more"] = "twice.safetensors"
    path.write_text(json.dumps(index))
    refused(folder, "is in .* and in")


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refused(folder, "quantised")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"model_type": "nothing_known"}',
        '{"model_type": "llama", "hidden_size": -1}',
        '{"model_type": "bert"}',
        '{"model_type": "llama", "num_hidden_layers": 2000000000}',
    ],
)
def test_a_configuration_nobody_can_use_is_refused(text: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    (folder / "config.json").write_text(text)
    refused(folder, "config|lacks|layers|type")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer.json")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(50))
    with pytest.raises(CheckpointError, match="no GGUF file"):
        open_checkpoint(tmp_path / "x.gguf")
