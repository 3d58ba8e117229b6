"""A manifest whose blocks are in a store gets its name: released, signed, and filed in an index, in that order."""

from __future__ import annotations

from shard_tools.cid import Codec
from shard_tools.errors import LlmdError
from shard_tools.index.model_index import ModelIndex, ModelRecord
from shard_tools.manifest import Manifest
from shard_tools.release import LIFETIME_S, Release, SignedRelease
from shard_tools.signing import Signer
from shard_tools.store.block_store import BlockStore


def sign_and_name(
    manifest: Manifest, store: BlockStore, index: ModelIndex, signer: Signer, now_s: int, lifetime_s: int = LIFETIME_S
) -> ModelRecord:
    """The manifest, whose blocks are in the store, is released from now on for lifetime_s, and its name means it.

    Its version is the time, or one more than the version before if that is later: no publisher has to count.
    """
    version = max(now_s, _version_of(manifest.name, store, index) + 1)
    release = Release(manifest.name, version, now_s + lifetime_s, manifest.cid)
    return _name(SignedRelease.sign(release, signer), store, index)


def cosign(name: str, store: BlockStore, index: ModelIndex, signer: Signer) -> ModelRecord:
    """The release that `name` means is signed by this publisher too, as policies with a threshold ask.

    Whoever signs has looked at the model: nothing is checked here. Raises NotFoundError, FormatError.
    """
    signed = SignedRelease.decode(store.get(index.resolve(name).signature))
    return _name(signed.signed_also_by(signer), store, index)


def _name(signed: SignedRelease, store: BlockStore, index: ModelIndex) -> ModelRecord:
    record = ModelRecord(signed.release.manifest, store.put(Codec.DAG_CBOR, signed.encode()))
    index.publish(signed.release.name, record, store.has)
    return record


def _version_of(name: str, store: BlockStore, index: ModelIndex) -> int:
    try:
        return SignedRelease.decode(store.get(index.resolve(name).signature)).release.version
    except LlmdError:  # nothing there, or nothing that can be read: the time is later than what anybody signed
        return 0
