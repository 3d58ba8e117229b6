"""Weights as small integers: what is kept of them, what a manifest says of them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shard_tools.checkpoint.quantise import dequantised, integers, quantised
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.checkpoint.split import split
from shard_tools.errors import ManifestError
from shard_tools.manifest import Dtype, Manifest, Shard
from shard_tools.quantised import Scheme, scale_of, scale_shape
from shard_tools.store.memory import MemoryStore
from tests.tiny_models import write_tiny_checkpoint


def weight(rows: int = 48, columns: int = 96) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("dtype", "bits", "error"),
    [("int8", 8 + 16 / 96, 0.008), ("uint8", 4.5, 0.1), ("float8_e4m3fn", 8 + 16 / 96, 0.03)],
)
def test_integers_are_as_small_and_as_close_as_promised(dtype: Dtype, bits: float, error: float) -> None:
    """Relative to the weights' norm; llama.cpp's Q4_0, of as many bits, is off by about 0.09 on such values."""
    w = weight()
    stored, scales = quantised(w, dtype)
    assert scales.dtype == torch.bfloat16 and tuple(scales.shape) == scale_shape(dtype, tuple(stored.shape))
    assert 8 * (stored.numel() + 2 * scales.numel()) / w.numel() == pytest.approx(bits)
    assert float((dequantised(stored, scales) - w).norm() / w.norm()) < error


@pytest.mark.parametrize("dtype", ["uint8", "float8_e4m3fn"])
def test_some_weights_are_exact_in_bfloat16(dtype: Dtype) -> None:
    """So an engine that multiplies first and scales later computes with the same values as one that does not."""
    exact = dequantised(*quantised(weight(), dtype))
    assert torch.equal(exact.bfloat16().float(), exact)


def test_zeros_stay_zeros_and_each_half_of_a_byte_has_its_place() -> None:
    for dtype in ("int8", "uint8", "float8_e4m3fn"):
        assert not dequantised(*quantised(torch.zeros(16, 64), dtype)).any()
    assert integers(torch.tensor([[0x1F]], dtype=torch.uint8)).tolist() == [[7, -7]]


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_model_says_so_and_survives_its_bytes(scheme: Scheme, tied: bool, tmp_path: Path) -> None:
    """The manifest decodes to itself; layers are of the scheme, embedding and head of 8 bits, norms as they were."""
    checkpoint = open_checkpoint(write_tiny_checkpoint(tmp_path, tied=tied))
    store = MemoryStore()
    manifest = split(checkpoint, store, "tiny", "bfloat16", scheme=scheme)
    assert Manifest.decode(manifest.encode(), store.get) == manifest and manifest.quantised == scheme
    found = {ref.name: manifest.tensor(ref) for unit in manifest.units for ref in unit.tensors}
    dtypes = {"int8": ("int8", "int8"), "int4": ("uint8", "int8"), "fp8": ("float8_e4m3fn", "float8_e4m3fn")}
    assert found["model.layers.0.mlp.up_proj.weight"].dtype == dtypes[scheme][0]
    assert found["lm_head.weight"].dtype == found["model.embed_tokens.weight"].dtype == dtypes[scheme][1]
    assert found[scale_of("lm_head.weight")].shape == (512, 1)
    assert found["model.norm.weight"].dtype == "bfloat16" and manifest.dtype == "bfloat16"


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_stacked_experts_are_small_too_and_their_router_is_not(scheme: Scheme, tmp_path: Path) -> None:
    """One dimension more, in front; what is read back is close."""
    checkpoint = open_checkpoint(write_tiny_checkpoint(tmp_path, "qwen3_moe"))
    store = MemoryStore()
    manifest = split(checkpoint, store, "tiny", "bfloat16", scheme=scheme)
    assert Manifest.decode(manifest.encode(), store.get) == manifest
    found = {ref.name: manifest.tensor(ref) for unit in manifest.units for ref in unit.tensors}
    name = "model.layers.0.mlp.experts.down_proj"
    four = scheme == "int4"
    assert found[name].shape == (4, 64, 32 if four else 64) and found[name].dtype != "bfloat16"
    assert found[scale_of(name)].shape == (4, 64, 2 if four else 1)
    assert found["model.layers.0.mlp.gate.weight"].dtype == "bfloat16"
    w = torch.randn((3, 48, 96), generator=torch.Generator().manual_seed(2))
    stored, scales = quantised(w, found[name].dtype)
    assert stored.ndim == scales.ndim == 3
    assert float((dequantised(stored, scales) - w).norm() / w.norm()) < 0.1


def test_the_bytes_of_a_model_of_floats_do_not_mention_it(tmp_path: Path) -> None:
    manifest = split(open_checkpoint(write_tiny_checkpoint(tmp_path)), MemoryStore(), "tiny")
    assert manifest.quantised is None and b"quantised" not in manifest.encode()


def test_integers_without_their_scales_are_no_model(tmp_path: Path) -> None:
    manifest = split(open_checkpoint(write_tiny_checkpoint(tmp_path)), MemoryStore(), "tiny", scheme="int8")
    with pytest.raises(ManifestError, match="no quantised weight"):
        replace(manifest, quantised=None)
    with pytest.raises(ManifestError, match="'int3' is unknown"):
        replace(manifest, quantised="int3")  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match="is unknown"):
        replace(manifest, dtype="int8")  # type: ignore[arg-type]
    shard = manifest.shards[1]
    rows = [(t.name, t.dtype, t.shape, [leaf.cid for leaf in t.leaves]) for t in shard.tensors]
    wide = [(n, "float16" if n.endswith("_scale") else d, s, leaves) for n, d, s, leaves in rows]
    shards = (manifest.shards[0], Shard.build(wide), *manifest.shards[2:])  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match="the scales of"):
        replace(manifest, shards=shards)
