"""A model's experts may be stored apart or stacked: it is one model, and less than a whole one is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shard_tools.checkpoint.conversion import as_loaded
from shard_tools.checkpoint.safetensors import SafetensorsFolder
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.errors import CheckpointError
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint

MIXTRAL_EXPERT = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
QWEN_EXPERT = "model.layers.1.mlp.experts.{}.{}.weight"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_apart_and_experts_stacked_are_one_model(family: str, tmp_path: Path) -> None:
    """As it was published, and as transformers' modules hold it: the same CID, and transformers' own parameters."""
    apart = write_tiny_checkpoint(tmp_path / "apart", family, layers=2)
    stacked = write_tiny_checkpoint(tmp_path / "stacked", family, layers=2, as_published=False)
    many = write_tiny_checkpoint(tmp_path / "many", family, layers=2, max_shard_size="100KB")
    names = [set(load_file(folder / "model.safetensors")) for folder in (apart, stacked)]
    assert any(".experts.3." in name for name in names[0]) and not any(".experts.3." in name for name in names[1])
    assert len({split(open_checkpoint(folder), MemoryStore(), "m").cid for folder in (apart, stacked, many)}) == 1
    seen, expected = as_loaded(open_checkpoint(apart)), AutoModelForCausalLM.from_pretrained(apart).state_dict()
    assert seen.table.keys() == expected.keys()
    assert all(torch.equal(seen.read(name), tensor) for name, tensor in expected.items())
    assert all(seen.table[name].shape == tuple(tensor.shape) for name, tensor in expected.items())


def test_a_decoder_saved_bare_is_read(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, "qwen3_moe", layers=2, tied=True)
    whole = split(open_checkpoint(folder), MemoryStore(), "m").cid
    edit(folder, lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()})
    assert split(open_checkpoint(folder), MemoryStore(), "m").cid == whole


def test_one_parameter_is_made_of_its_own_parts_only(tmp_path: Path) -> None:
    """So memory holds one parameter's experts, never a model's."""

    class Recording(SafetensorsFolder):
        def read(self, name: str) -> torch.Tensor:
            asked.append(name)
            return super().read(name)

    asked: list[str] = []
    seen = as_loaded(Recording(write_tiny_checkpoint(tmp_path, "mixtral", layers=3)))
    assert not asked
    seen.read("model.layers.1.mlp.experts.down_proj")
    assert asked == [MIXTRAL_EXPERT.format(i, "w2") for i in range(4)]


def test_a_family_without_conversions_is_left_alone(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_checkpoint(tmp_path, "llama", layers=1))
    assert as_loaded(checkpoint) is checkpoint


@pytest.mark.parametrize("number", [0, 2, 3], ids=["first", "middle", "last"])
@pytest.mark.parametrize(
    ("family", "expert", "kind"),
    [("mixtral", MIXTRAL_EXPERT, "w1"), ("mixtral", MIXTRAL_EXPERT, "w2"), ("qwen3_moe", QWEN_EXPERT, "up_proj")],
)
def test_a_missing_expert_is_named(family: str, expert: str, kind: str, number: int, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, family, layers=2)
    edit(folder, lambda t: {n: v for n, v in t.items() if n != expert.format(number, kind)})
    refused(folder, f"lacks tensor '{expert.format(number, kind)}', one of 4")


def test_a_missing_half_of_all_experts_is_named(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, "mixtral", layers=2)
    edit(folder, lambda t: {n: v for n, v in t.items() if not ("layers.1." in n and ".w3." in n)})
    refused(folder, f"lacks tensor '{MIXTRAL_EXPERT.format(0, 'w3')}'")


def test_an_expert_too_many_is_named(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, "mixtral", layers=2)
    for kind in ("w1", "w2", "w3"):
        name = MIXTRAL_EXPERT.format(0, kind)
        edit(folder, lambda t, name=name: t | {name.replace("experts.0", "experts.7"): t[name].clone()})  # type: ignore[misc]
    refused(folder, r"experts\.7\.w.*says 4")


def test_experts_stored_in_both_ways_are_refused(tmp_path: Path) -> None:
    apart = write_tiny_checkpoint(tmp_path / "apart", "qwen3_moe", layers=2)
    stacked = load_file(
        write_tiny_checkpoint(tmp_path / "b", "qwen3_moe", layers=2, as_published=False) / "model.safetensors"
    )
    name = "model.layers.0.mlp.experts.down_proj"
    edit(apart, lambda t: t | {name: stacked[name]})
    refused(apart, f"stores '{name}' twice")


def test_experts_of_several_dtypes_or_shapes_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, "mixtral", layers=2)
    name = MIXTRAL_EXPERT.format(2, "w1")
    edit(folder, lambda t: t | {name: t[name].half()})
    refused(folder, "parts of one parameter")
    edit(folder, lambda t: t | {name: t[name].float()[:-1].clone()})
    refused(folder, "cannot be made of")
    edit(folder, lambda t: {n: v[:, :-1].clone() if ".w1." in n or ".w3." in n else v for n, v in t.items()})
    refused(folder, "cannot be made of|has the shape")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def refused(folder: Path, match: str) -> None:
    """The checkpoint is refused with a message that says `match`, and nothing was written."""
    store = MemoryStore()
    with pytest.raises(CheckpointError, match=match):
        split(open_checkpoint(folder), store, "m")
    assert not store.blocks
