"""Manifests: the round trip, and refusal of everything that is not one whole model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_tools import canonical
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError, LlmdError, ManifestError
from shard_tools.manifest import File, Manifest, ModelName, Shard, TensorRef, Unit
from shard_tools.unixfs import leaf_sizes


def leaf(text: str) -> Cid:
    return Cid.of(Codec.RAW, text.encode())


def shard(name: str, rows: int = 4) -> Shard:
    count = len(list(leaf_sizes(rows * 8 * 4)))
    return Shard.build([(name, "float32", (rows, 8), [leaf(f"{name}{i}") for i in range(count)])])


def tiny(layers: int = 2) -> Manifest:
    """Embedding, layers and a head tied to the embedding, with a norm of its own."""
    shards = [shard("embed"), *(shard(f"layers.{i}.w", 300_000) for i in range(layers)), shard("norm")]
    units = [Unit("embedding", 0, 0, (TensorRef(0, 0, "embed"),))]
    units += [Unit("layer", i, i + 1, (TensorRef(i + 1, 0, f"layers.{i}.w"),)) for i in range(layers)]
    head = (TensorRef(0, 0, "lm_head"), TensorRef(layers + 1, 0, "norm"))
    units.append(Unit("head", layers, layers, head))
    files = (File("config.json", leaf("config"), 6), File("tokenizer.json", leaf("tok"), 3))
    name = ModelName("org/tiny")
    return Manifest(name, "llama", layers, 8, 4, 512, "float32", "mit", files, tuple(shards), tuple(units))


def decode(manifest: Manifest, block: bytes | None = None) -> Manifest:
    known = {Cid.of(Codec.DAG_CBOR, b): b for b in manifest.index_blocks()}
    return Manifest.decode(block or manifest.encode(), known.__getitem__)


def test_what_was_encoded_is_decoded() -> None:
    manifest = tiny()
    assert decode(manifest) == manifest
    assert decode(manifest).cid == manifest.cid


def test_the_bytes_of_a_manifest_are_fixed() -> None:
    """A change of this CID changes the name of every model ever published: it must be meant (FORMATS.md, v)."""
    assert str(tiny().cid) == "bafyreiapdqv2wostgempmqwljlytlnznp75e34r5r3bmnsfcqxac5edk2i"


def test_the_index_of_the_largest_layer_fits_one_block() -> None:
    """A layer of a 405B model in bfloat16: three matrices of 53248 x 16384, 1664 leaves each."""
    big = Shard.build([(f"mlp.{i}", "bfloat16", (53248, 16384), [leaf("x")] * 1664) for i in range(3)])
    assert len(big.index()) < 300_000


def test_a_manifest_of_126_layers_is_small() -> None:
    assert len(tiny(126).encode()) < 20_000


def test_a_stage_gets_the_embedding_with_its_first_layer_and_the_head_with_its_last() -> None:
    manifest = tiny(4)
    kinds = lambda units: [(unit.kind, unit.start) for unit in units]
    assert kinds(manifest.units_of(0, 2)) == [("embedding", 0), ("layer", 0), ("layer", 1)]
    assert kinds(manifest.units_of(2, 3)) == [("layer", 2)]
    assert kinds(manifest.units_of(3, 4)) == [("layer", 3), ("head", 4)]
    assert manifest.units_of(0, 4) == manifest.units


def _units_without(manifest: Manifest, place: int) -> tuple[Unit, ...]:
    return tuple(unit for i, unit in enumerate(manifest.units) if i != place)


BROKEN: dict[str, Any] = {
    "a layer missing": lambda m: {"units": _units_without(m, 1)},
    "a layer twice": lambda m: {"units": (m.units[0], m.units[1], m.units[1], m.units[2], m.units[3])},
    "layers swapped": lambda m: {"units": (m.units[0], m.units[2], m.units[1], m.units[3])},
    "no head": lambda m: {"units": m.units[:-1]},
    "a unit of two layers": lambda m: {"units": (m.units[0], dataclasses.replace(m.units[1], stop=2), m.units[3])},
    "an orphan tensor": lambda m: {"shards": (*m.shards, shard("orphan"))},
    "a unit without tensors": lambda m: {"units": (*m.units[:-1], dataclasses.replace(m.units[-1], tensors=()))},
    "a tensor that is not there": lambda m: {
        "units": (dataclasses.replace(m.units[0], tensors=(TensorRef(9, 0, "embed"),)), *m.units[1:])
    },
    "a negative place": lambda m: {
        "units": (dataclasses.replace(m.units[0], tensors=(TensorRef(0, -1, "embed"),)), *m.units[1:])
    },
    "a name twice": lambda m: {
        "units": (
            *m.units[:-1],
            dataclasses.replace(m.units[-1], tensors=(TensorRef(0, 0, "embed"), TensorRef(3, 0, "n"))),
        )
    },
    "an unknown dtype": lambda m: {"dtype": "int8"},
    "no layers": lambda m: {"n_layers": 0},
    "files unsorted": lambda m: {"files": m.files[::-1]},
    "a file twice": lambda m: {"files": m.files + m.files},
    "a bad name": lambda m: {"name": "../x"},
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_no_whole_model_cannot_be_constructed(how: str) -> None:
    manifest = tiny()
    with pytest.raises(ManifestError):
        dataclasses.replace(manifest, **BROKEN[how](manifest))


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../b", "a//b", "", ".", ".hidden", "a\\b", "a" * 400, "a\n"]
)
def test_a_file_cannot_be_called_something_that_leaves_its_directory(path: str) -> None:
    with pytest.raises(ManifestError):
        File(path, leaf("x"), 1)


def test_tensors_with_a_gap_an_overlap_or_a_wrong_size_are_refused() -> None:
    good = shard("w", 300_000)
    tensor = good.tensors[0]
    for offset, size, kind in ((8, 0, "a gap"), (-8, 0, "an overlap")):
        with pytest.raises(ManifestError, match=kind):
            dataclasses.replace(
                good, tensors=(dataclasses.replace(tensor, offset=tensor.offset + offset),), size=good.size + size
            )
    with pytest.raises(ManifestError, match="end at"):
        dataclasses.replace(good, size=good.size + 1)
    for change in (
        {"size": tensor.size - 4},
        {"shape": (8,)},
        {"leaves": tensor.leaves[1:]},
        {"leaves": tensor.leaves * 2},
    ):
        with pytest.raises(ManifestError):
            dataclasses.replace(tensor, **change)
    with pytest.raises(ManifestError, match="int8"):
        dataclasses.replace(tensor, dtype="int8")


@settings(max_examples=300)
@given(st.data())
def test_a_manifest_with_one_changed_byte_is_refused_or_another_model(data: st.DataObject) -> None:
    """It never decodes to the same manifest, and whatever it decodes to encodes to those bytes."""
    manifest = tiny()
    blocks = [manifest.encode(), *manifest.index_blocks()]
    which = data.draw(st.integers(0, len(blocks) - 1))
    bad = bytearray(blocks[which])
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
    known = {Cid.of(Codec.DAG_CBOR, b): b for b in blocks[1:]}
    if which:
        known[Cid.of(Codec.DAG_CBOR, blocks[which])] = bytes(bad)  # a store that does not hash
        blocks[0] = manifest.encode()
    else:
        blocks[0] = bytes(bad)
    try:
        got = Manifest.decode(blocks[0], lambda cid: known.get(cid, b""))
    except LlmdError:
        return
    assert which == 0 and got != manifest and got.encode() == bytes(bad)


def test_an_index_of_another_file_is_refused() -> None:
    a, b = shard("a"), shard("b")
    with pytest.raises(ManifestError, match=str(a.cid)):
        Shard.from_index(b.index(), a.cid)


@given(st.binary(max_size=100))
def test_garbage_is_no_manifest(garbage: bytes) -> None:
    with pytest.raises(FormatError):
        decode(tiny(), garbage or b"\0")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("v", 2),
        ("layers", 1),
        ("layers", True),
        ("extra", 1),
        ("units", 3),
        ("units", [[[0, 0, "embed"]]]),
        ("files", [["config.json", leaf("x"), True]]),
        ("shards", []),
        ("name", "x" * 300),
    ],
)
def test_a_well_formed_manifest_that_says_something_else_is_refused(field: str, value: canonical.Value) -> None:
    said = canonical.decode(tiny().encode(), max_bytes=1 << 20)
    assert isinstance(said, dict)
    with pytest.raises((FormatError, ManifestError)):
        decode(tiny(), canonical.encode({**said, field: value}))
