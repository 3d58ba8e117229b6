"""From a name to a model that a trusted publisher signed."""

from __future__ import annotations

from shard_tools.cid import Cid
from shard_tools.errors import FormatError
from shard_tools.fetch import load_manifest
from shard_tools.index.model_index import ModelIndex, ModelRecord
from shard_tools.manifest import MAX_MANIFEST_BYTES, Manifest
from shard_tools.manifest_signature import ManifestSignature
from shard_tools.signing import PublicKey
from shard_tools.store.block_store import BlockSource


def open_model(name: str, index: ModelIndex, store: BlockSource, trusted: frozenset[PublicKey]) -> Manifest:
    """The manifest that `name` points at, once a key of `trusted` is known to have signed it.

    Raises NotFoundError, SignatureError, and what reading a manifest raises.
    """
    manifest = open_record(index.resolve(name), store, trusted)
    if manifest.name != name:
        raise FormatError(f"{index.label} answers {name!r} with a manifest of {manifest.name!r}: a name was re-pointed")
    return manifest


def open_record(record: ModelRecord, store: BlockSource, trusted: frozenset[PublicKey]) -> Manifest:
    """The manifest of a record, its signature checked before anything of it is parsed."""
    block = store.get(record.manifest)
    if len(block) > MAX_MANIFEST_BYTES:
        raise FormatError(f"manifest {record.manifest} has {len(block)} bytes")
    signature = ManifestSignature.decode(store.get(record.signature))
    signature.check(block, trusted)
    return load_manifest(store, record.manifest)


def open_cid(manifest: Cid, store: BlockSource) -> Manifest:
    """The manifest of this CID. Whoever wrote the CID down vouches for it; no signature is asked for."""
    return load_manifest(store, manifest)
