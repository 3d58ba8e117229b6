"""What stays in a store and what goes: never a block that a named or pinned model needs."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shard_tools.availability import availability, weakest
from shard_tools.choice import Choice
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError, InputError, NotFoundError
from shard_tools.fetch import fetch, load_manifest, model_blocks, verify
from shard_tools.index.directory import DirectoryIndex
from shard_tools.keeping import LOW_WATER, Pins, Quota, collect, filling, kept_blocks
from shard_tools.publish import publish
from shard_tools.signing import Signer
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.memory import MemoryStore
from shard_tools.store.stores import open_store
from tests.shard_tools.test_cli import Desk, refusal
from tests.tiny_models import write_tiny_checkpoint

SIGNER = Signer.from_seed(bytes(32))


class House:
    """A store with two models that share most blocks: the second has another last layer."""

    def __init__(self, root: Path, checkpoints: tuple[Path, Path]) -> None:
        self.root = root
        self.store, self.index = DirectoryStore(root), DirectoryIndex(root)
        for name, checkpoint in zip(("one", "two"), checkpoints, strict=True):
            publish(checkpoint, self.store, self.index, name, SIGNER)
        self.manifests = {name: load_manifest(self.store, self.index.resolve(name).manifest) for name in ("one", "two")}

    def blocks(self, name: str) -> set[Cid]:
        return set(model_blocks(self.manifests[name], self.store.get))

    def forget(self, name: str) -> None:
        (self.root / "names" / name).unlink()

    def collect(self) -> int:
        return collect(self.root, time.time() + 10, grace_s=0).removed


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a fine-tune of it, of which one norm differs."""
    from safetensors.numpy import load_file, save_file

    first = write_tiny_checkpoint(tmp_path_factory.mktemp("1"), layers=2)
    second = write_tiny_checkpoint(tmp_path_factory.mktemp("2"), layers=2)
    weights = load_file(second / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, second / "model.safetensors", metadata={"format": "pt"})
    return first, second


@pytest.fixture
def house(tmp_path: Path, checkpoints: tuple[Path, Path]) -> House:
    return House(tmp_path / "store", checkpoints)


def test_what_no_name_or_pin_needs_goes_and_nothing_else(house: House) -> None:
    junk = house.store.put(Codec.RAW, b"junk")
    only_two = house.blocks("two") - house.blocks("one")
    assert 0 < len(only_two) < len(house.blocks("two"))
    assert house.collect() == 1 and not house.store.has(junk)
    signature = house.index.resolve("two").signature
    house.forget("two")
    Pins(house.root).add(house.manifests["two"].cid)
    assert house.collect() == 1 and not house.store.has(signature)
    assert verify(house.store, house.manifests["two"]) == []
    Pins(house.root).remove(house.manifests["two"].cid)
    assert house.collect() == len(only_two)
    assert verify(house.store, house.manifests["one"]) == []
    assert set(house.store.cids()) == kept_blocks(house.root)


def test_young_blocks_stay_and_a_dry_run_removes_nothing(house: House) -> None:
    junk = house.store.put(Codec.RAW, b"junk")
    assert collect(house.root, time.time()).removed == 0
    found = collect(house.root, time.time() + 10, grace_s=0, dry=True)
    assert (found.removed, found.removed_bytes) == (1, 4) and house.store.has(junk)
    assert found.kept == len(kept_blocks(house.root)) and found.kept_bytes > 100_000


def test_nothing_is_removed_while_a_store_is_filled(house: House) -> None:
    junk = house.store.put(Codec.RAW, b"junk")
    with filling(house.root), filling(house.root), pytest.raises(InputError, match="Try again later"):
        house.collect()
    assert house.store.has(junk)
    assert house.collect() == 1


def test_nothing_is_removed_where_a_manifest_cannot_be_read(house: House) -> None:
    junk = house.store.put(Codec.RAW, b"junk")
    house.store.delete(house.manifests["two"].cid)
    with pytest.raises(FormatError, match="nothing was removed"):
        house.collect()
    assert house.store.has(junk)


def test_pins_are_of_manifests_and_survive(tmp_path: Path) -> None:
    pins = Pins(tmp_path)
    assert pins.all() == ()
    cid = Cid.of(Codec.DAG_CBOR, b"m")
    pins.add(cid)
    pins.add(cid)
    (tmp_path / "pins" / "README").touch()
    assert Pins(tmp_path).all() == (cid,)
    with pytest.raises(InputError, match="no manifest"):
        pins.add(Cid.of(Codec.RAW, b""))
    pins.remove(cid)
    with pytest.raises(NotFoundError, match="llmd ls"):
        pins.remove(cid)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(seed=st.integers(0, 1 << 30))
def test_a_cache_over_its_quota_loses_what_was_not_used_for_longest_but_nothing_kept(house: House, seed: int) -> None:
    """Law: total <= quota or nothing left to go; the survivors are the newest used; kept blocks are whole."""
    draw = random.Random(seed)
    kept = sum(block.size for block in house.store.held() if block.cid in kept_blocks(house.root))
    others = [house.store.put(Codec.RAW, draw.randbytes(1000)) for _ in range(40)]
    used = list(range(40))
    draw.shuffle(used)
    for cid, age in zip(others, used, strict=True):
        os.utime(house.root / "blocks" / str(cid)[-3:-1] / str(cid), (1000 + age, 1000 + age))
    quota = kept + draw.randrange(1, 45) * 1000
    Quota(house.root, quota).grew(0)
    left = [age for cid, age in zip(others, used, strict=True) if house.store.has(cid)]
    total = sum(block.size for block in house.store.held())
    assert total <= quota and (not left or sorted(left) == list(range(40 - len(left), 40)))
    assert len(left) == 40 or total > LOW_WATER * quota - 1000 or not left
    assert all(verify(house.store, manifest) == [] for manifest in house.manifests.values())
    for cid in others:
        house.store.delete(cid)


def test_a_store_with_a_quota_keeps_what_is_read_often(tmp_path: Path) -> None:
    mirror = DirectoryStore(tmp_path / "mirror")
    cids = [mirror.put(Codec.RAW, bytes([i]) * 100_000) for i in range(30)]
    options = {"cache": str(tmp_path / "cache"), "mirrors": str(tmp_path / "mirror"), "quota_gb": 0.001}
    store = open_store(Choice.of("tiered", **options))
    for cid in cids:
        assert store.get(cids[0]) and store.get(cid)
        os.utime(next((tmp_path / "cache" / "blocks").rglob(str(cid))), (time.time() - 100,) * 2)
        store.get(cids[0])
    held = set(DirectoryStore(tmp_path / "cache").cids())
    assert cids[0] in held and len(held) * 100_000 <= 1_000_000
    with pytest.raises(InputError, match="is no quota"):
        open_store(Choice.of("tiered", **{**options, "quota_gb": -1}))


def test_availability_says_who_holds_which_layer_and_the_weakest_link(house: House) -> None:
    model, part = house.manifests["one"], MemoryStore()
    fetch(house.store, part, model.cid, layers=(1, 2))
    held = availability(model, [house.store, part], sample=0)
    assert [unit.label for unit in held] == ["embedding", "layer 0", "layer 1", "head"]
    assert [unit.replicas for unit in held] == [1, 1, 2, 2]
    assert weakest(held).label == "embedding" and dict(held[1].shares)["memory"] == 0.0


def test_the_commands_pin_collect_and_say_what_is_available(tmp_path: Path, checkpoints: tuple[Path, Path]) -> None:
    desk = Desk(tmp_path / "desk")
    desk.run("publish", checkpoints[0], "--name", "one")
    desk.run("publish", checkpoints[1], "--name", "two")
    cid = str(DirectoryIndex(desk.store).resolve("two").manifest)
    assert desk.run("pin", "two").exit_code == 0
    (desk.store / "names" / "two").unlink()
    assert f"pinned                   {cid}" in desk.run("ls").stdout
    assert "Would remove 1 blocks" in desk.run("gc", "--grace-s", 0, "--dry-run").stdout
    assert "Removed 1 blocks" in desk.run("gc", "--grace-s", 0).stdout
    assert desk.run("verify", cid).exit_code == 0
    assert desk.run("unpin", cid).exit_code == 0
    assert "is not in" in refusal(desk.run("unpin", cid))
    assert "Removed 0" in desk.run("gc").stdout
    assert "Removed 0" not in desk.run("gc", "--grace-s", 0).stdout
    assert desk.run("verify", "one").exit_code == 0
    mirror = tmp_path / "mirror"
    desk.run("fetch", "one", "--from", desk.store, "--store", mirror, "--layers", "0:1")
    said = desk.run("availability", "one", "--mirror", mirror, "--sample", 0).stdout
    assert "layer 0    2 of 2" in said and "layer 1    1 of 2" in said and "0%" in said
    assert "Weakest link: layer 1, 1 whole copies" in said
    gone = desk.run("availability", "one", "--gateway", "http://127.0.0.1:1").stdout
    assert "gateway http://127.0.0.1:1: no answer" in gone
