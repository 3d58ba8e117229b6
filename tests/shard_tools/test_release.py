"""Releases: who must have signed, for how long, and never back to an older one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_tools.catalog import find_model, open_record
from shard_tools.cid import Cid, Codec
from shard_tools.errors import (
    ExpiredError,
    FormatError,
    InputError,
    IntegrityError,
    LlmdError,
    NotFoundError,
    RollbackError,
    SignatureError,
)
from shard_tools.fetch import load_manifest
from shard_tools.index.memory import MemoryIndex
from shard_tools.index.model_index import ModelRecord
from shard_tools.index.seen import SeenVersions
from shard_tools.manifest import Manifest
from shard_tools.naming import cosign, sign_and_name
from shard_tools.publish import publish
from shard_tools.release import Release, SignedRelease
from shard_tools.signing import Signer
from shard_tools.store.memory import MemoryStore
from shard_tools.trust import Rule, TrustPolicy
from tests.tiny_models import write_tiny_checkpoint

ANN, BEN, CAT = (Signer.from_seed(bytes([i]) * 32) for i in (1, 2, 3))
NOW = 1_800_000_000
DAY = 86400
MANIFEST, OTHER = Cid.of(Codec.DAG_CBOR, b"m"), Cid.of(Codec.DAG_CBOR, b"m2")
ONE_OF_ANN = TrustPolicy.any_of([ANN.public])


def two_of_three(revoked: frozenset[bytes] = frozenset()) -> TrustPolicy:
    return TrustPolicy((Rule("org/*", frozenset(s.public for s in (ANN, BEN, CAT)), 2),), revoked)  # type: ignore[arg-type]


@given(
    name=st.text(max_size=100),
    version=st.integers(1, 1 << 53),
    expires=st.integers(0, 1 << 53),
    signers=st.sets(st.sampled_from([ANN, BEN, CAT])),
)
def test_a_release_is_read_as_it_was_written(name: str, version: int, expires: int, signers: set[Signer]) -> None:
    release = Release(name, version, expires, MANIFEST)
    signed = SignedRelease.sign(release, *signers)
    assert SignedRelease.decode(signed.encode()) == signed
    again = SignedRelease.sign(release)
    for signer in signers:
        again = again.signed_also_by(signer)
    assert again == signed


@given(st.data())
def test_a_changed_byte_of_a_signed_release_is_refused(data: st.DataObject) -> None:
    block = bytearray(SignedRelease.sign(Release("org/m", 5, NOW, MANIFEST), ANN).encode())
    block[data.draw(st.integers(0, len(block) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(IntegrityError):
        SignedRelease.decode(bytes(block)).check(ONE_OF_ANN)


def test_as_many_publishers_of_the_name_must_sign_as_the_policy_says() -> None:
    release = Release("org/m", 1, NOW, MANIFEST)
    both = SignedRelease.sign(release, ANN, CAT)
    assert both.check(two_of_three()) == release
    with pytest.raises(SignatureError, match="of whom 1 count; 2 must"):
        SignedRelease.sign(release, ANN).check(two_of_three())
    with pytest.raises(SignatureError, match="no rule of the policy covers"):
        SignedRelease.sign(Release("other/m", 1, NOW, MANIFEST), ANN, BEN).check(two_of_three())
    with pytest.raises(SignatureError, match=r"of whom 1 count.*Revoked"):
        both.check(two_of_three(frozenset([CAT.public])))
    wrong = SignedRelease(release, tuple(sorted([(ANN.public, both.signatures[1][1]), both.signatures[1]])))
    with pytest.raises(SignatureError, match="is wrong"):
        wrong.check(two_of_three())


def test_a_key_that_signs_twice_counts_once() -> None:
    signed = SignedRelease.sign(Release("org/m", 1, NOW, MANIFEST), ANN)
    twice = SignedRelease(signed.release, signed.signatures * 2)
    with pytest.raises(SignatureError):
        twice.check(two_of_three())
    with pytest.raises(FormatError, match="signs twice"):
        SignedRelease.decode(twice.encode())


def test_the_first_rule_that_covers_a_name_decides() -> None:
    policy = TrustPolicy(
        (
            Rule("org/m", frozenset([ANN.public]), 1),
            Rule("org/*", frozenset([BEN.public]), 1),
            Rule("*", frozenset([CAT.public]), 1),
        )
    )
    publishers = {name: policy.publishers_of(name) for name in ("org/m", "org/x", "org", "organ/x", "x")}
    assert publishers == {
        "org/m": {ANN.public},
        "org/x": {BEN.public},
        "org": {CAT.public},
        "organ/x": {CAT.public},
        "x": {CAT.public},
    }


@pytest.mark.parametrize(
    ("names", "keys", "threshold"), [("a*", 1, 1), ("../x", 1, 1), ("*", 0, 0), ("*", 1, 2), ("*", 1, 0)]
)
def test_a_rule_that_nobody_or_anybody_could_meet_is_refused(names: str, keys: int, threshold: int) -> None:
    with pytest.raises(InputError):
        Rule(names, frozenset([ANN.public][:keys]), threshold)


def test_an_expired_release_is_refused_and_says_what_to_do() -> None:
    release = Release("org/m", 1, NOW, MANIFEST)
    release.check_fresh(NOW - 1)
    with pytest.raises(ExpiredError, match="llmd renew org/m"):
        release.check_fresh(NOW)


def test_versions_never_go_down_and_never_mean_two_things(tmp_path: Path) -> None:
    seen = SeenVersions(tmp_path / "seen")
    seen.check("org/m", 5, MANIFEST, "index a")
    SeenVersions(tmp_path / "seen").check("org/m", 5, MANIFEST, "index b")
    seen.check("org/m", 7, OTHER, "index a")
    seen.check("org/n", 1, OTHER, "index a")
    with pytest.raises(RollbackError, match=r"index b answers 'org/m' with release 5, and release 7 was seen"):
        seen.check("org/m", 5, MANIFEST, "index b")
    with pytest.raises(RollbackError, match="its publisher signed two"):
        seen.check("org/m", 7, MANIFEST, "index b")
    (tmp_path / "seen" / "org%2Fm").write_bytes(b"junk")
    with pytest.raises(FormatError, match="the note"):
        seen.check("org/m", 8, MANIFEST, "index a")


def test_where_nothing_can_be_remembered_nothing_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot remember"):
        SeenVersions(tmp_path / "file").check("m", 1, MANIFEST, "index")


class World:
    """A store and an index with one model, released by Ann."""

    def __init__(self, folder: Path) -> None:
        self.store, self.index = MemoryStore(), MemoryIndex()
        publish(write_tiny_checkpoint(folder / "ck", layers=2), self.store, MemoryIndex(), "org/m", ANN)
        cid = next(cid for cid in self.store.cids() if cid.codec is Codec.DAG_CBOR and self.is_manifest(cid))
        self.manifest = load_manifest(self.store, cid)
        self.seen = SeenVersions(folder / "seen")

    def is_manifest(self, cid: Cid) -> bool:
        try:
            load_manifest(self.store, cid)
        except LlmdError:
            return False
        return True

    def release(self, now_s: int, *signers: Signer) -> ModelRecord:
        return sign_and_name(self.manifest, self.store, self.index, (signers or (ANN,))[0], now_s, DAY)

    def find(self, now_s: int, policy: TrustPolicy = ONE_OF_ANN) -> tuple[ModelRecord, Manifest]:
        return find_model("org/m", self.index, self.store, policy, now_s, self.seen)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_an_index_that_answers_with_an_old_release_is_found_out(world: World) -> None:
    old = world.release(NOW)
    assert world.find(NOW + 1)[0] == old
    new = world.release(NOW + 10)
    assert world.find(NOW + 11)[0] == new
    world.index.publish("org/m", old, world.store.has)
    with pytest.raises(RollbackError, match="memory index answers"):
        world.find(NOW + 12)
    with pytest.raises(ExpiredError):
        find_model("org/m", world.index, world.store, ONE_OF_ANN, NOW + DAY, None)
    assert open_record(old, world.store, ONE_OF_ANN).name == "org/m"


def test_two_releases_within_a_second_are_two_versions(world: World) -> None:
    versions = []
    for _ in range(3):
        record = world.release(NOW)
        versions.append(SignedRelease.decode(world.store.get(record.signature)).release.version)
    assert versions == [NOW, NOW + 1, NOW + 2]


def test_a_second_publisher_signs_the_same_release(world: World) -> None:
    world.release(NOW)
    with pytest.raises(SignatureError, match="2 must"):
        world.find(NOW, two_of_three())
    cosign("org/m", world.store, world.index, BEN)
    assert world.find(NOW, two_of_three())[1] == world.manifest
    with pytest.raises(NotFoundError):
        cosign("org/x", world.store, world.index, BEN)


def test_a_revoked_publisher_is_refused_and_bars_no_version(world: World) -> None:
    """What is noted as seen was signed by publishers that count, so a stranger's huge version changes nothing."""
    world.release(NOW + 10**6, BEN)
    with pytest.raises(SignatureError, match="not by a trusted publisher"):
        world.find(NOW)
    revoked = TrustPolicy((Rule("*", frozenset([ANN.public, BEN.public]), 1),), frozenset([BEN.public]))
    with pytest.raises(SignatureError, match="Revoked: llmd-ed25519"):
        world.find(NOW, revoked)
    world.index = MemoryIndex()
    assert world.release(NOW) == world.find(NOW, revoked)[0]


def test_a_signature_of_the_first_format_says_to_publish_anew() -> None:
    from shard_tools import canonical

    block = canonical.encode({"v": 1, "manifest": MANIFEST, "sigs": []})
    with pytest.raises(FormatError, match="publish the model again"):
        SignedRelease.decode(block)
