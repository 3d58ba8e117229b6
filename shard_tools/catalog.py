"""From a name to a model that trusted publishers signed, in the newest release that was ever seen here."""

from __future__ import annotations

from shard_tools.cid import Cid
from shard_tools.errors import FormatError, SignatureError
from shard_tools.fetch import load_manifest
from shard_tools.index.model_index import ModelRecord, NameSource
from shard_tools.index.seen import SeenVersions
from shard_tools.manifest import Manifest
from shard_tools.release import Release, SignedRelease
from shard_tools.store.block_store import BlockSource
from shard_tools.trust import TrustPolicy


def find_model(
    name: str, index: NameSource, store: BlockSource, trusted: TrustPolicy, now_s: int, seen: SeenVersions | None
) -> tuple[ModelRecord, Manifest]:
    """What `name` points at, once its publishers are known to have signed it, for now, and nothing newer was seen.

    seen: remembers it; None forgets, so that an old release which has not expired passes for new.
    Raises NotFoundError, SignatureError, ExpiredError, RollbackError, and what reading a manifest raises.
    """
    record = index.resolve(name)
    manifest = accept_record(record, index.label, store, trusted, now_s, seen)
    if manifest.name != name:
        raise FormatError(f"{index.label} answers {name!r} with a release of {manifest.name!r}: a name was re-pointed")
    return record, manifest


def open_model(
    name: str, index: NameSource, store: BlockSource, trusted: TrustPolicy, now_s: int, seen: SeenVersions | None
) -> Manifest:
    """As find_model; the manifest alone."""
    return find_model(name, index, store, trusted, now_s, seen)[1]


def accept_record(
    record: ModelRecord, who: str, store: BlockSource, trusted: TrustPolicy, now_s: int, seen: SeenVersions | None
) -> Manifest:
    """The manifest of a record that `who` gave, as find_model accepts it under the name that was signed."""
    release = _release(record, store, trusted)
    release.check_fresh(now_s)
    if seen is not None:
        seen.check(release.name, release.version, release.manifest, who)
    return _manifest(release, store)


def open_record(record: ModelRecord, store: BlockSource, trusted: TrustPolicy) -> Manifest:
    """The manifest of a record, its signature checked before anything of it is parsed.

    Says nothing of whether it is the newest, or has expired: whoever resolved the name has asked that.
    """
    return _manifest(_release(record, store, trusted), store)


def open_cid(manifest: Cid, store: BlockSource) -> Manifest:
    """The manifest of this CID. Whoever wrote the CID down vouches for it; no signature is asked for."""
    return load_manifest(store, manifest)


def _release(record: ModelRecord, store: BlockSource, trusted: TrustPolicy) -> Release:
    release = SignedRelease.decode(store.get(record.signature)).check(trusted)
    if release.manifest != record.manifest:
        raise SignatureError(f"this signature is over the manifest {release.manifest}, not the one it came with")
    return release


def _manifest(release: Release, store: BlockSource) -> Manifest:
    manifest = load_manifest(store, release.manifest)
    if manifest.name != release.name:
        raise FormatError(f"a release of {release.name!r} means a manifest of {manifest.name!r}: a name was re-pointed")
    return manifest
