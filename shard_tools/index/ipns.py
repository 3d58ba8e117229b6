"""Names in IPNS: a key of an IPFS node points at a catalogue, one block that says what each name means.

IPNS is trusted for nothing: the node's answer about a key, and the catalogue, only lead to releases, whose signatures,
versions and expiry whoever opens a model checks. So a node that lies can hide a model, and an old record is found
out as a roll-back. Its own signature is the node's to check, and the network's.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError, InputError, NotFoundError
from shard_tools.http_client import Patience
from shard_tools.index.model_index import ModelRecord, check_present
from shard_tools.store.ipfs import DEFAULT_API, IpfsNode

MAX_CATALOGUE_BYTES = 1 << 20  # some 7,000 names

_IPNS_NAME = re.compile(r"[A-Za-z0-9]{40,80}")  # k51..., 12D3Koo... or Qm...
_ANSWER_S = 60.0  # a network may take long to find a record


def open_ipns(*, name: str, api: str = DEFAULT_API, key: str = "self") -> IpnsIndex:
    """The index `{kind: ipns, name: k51..., api: multiaddr}` of a config. Raises InputError."""
    return IpnsIndex(IpfsNode(api, Patience(answer_s=_ANSWER_S)), name, key)


class IpnsIndex:
    """A ModelIndex at an IPNS name."""

    def __init__(self, node: IpfsNode, name: str, key: str = "self") -> None:
        """name: what is resolved. key: what the node calls its key, if it is the one that publishes."""
        if not _IPNS_NAME.fullmatch(name):
            raise InputError(f"{name[:100]!r} is no IPNS name: expected k51..., as `ipfs key list -l` shows it")
        self._node, self.name, self._key = node, name, key

    @classmethod
    def of_key(cls, node: IpfsNode, key: str) -> IpnsIndex:
        """The index at the IPNS name of a key that the node has. Raises InputError if it has none of this name."""
        return cls(node, node.name_of(key), key)

    @property
    def label(self) -> str:
        return f"IPNS name {self.name} at {self._node.label}"

    def resolve(self, name: str) -> ModelRecord:
        try:
            records = self._catalogue()
        except NotFoundError as e:
            raise NotFoundError(f"the model {name[:200]!r}", self.label, str(e)) from e
        if name not in records:
            known = ", ".join(sorted(records)[:20]) or "none"
            raise NotFoundError(f"the model {name[:200]!r}", self.label, f"Known: {known}.")
        return records[name]

    def publish(self, name: str, record: ModelRecord, has: Callable[[Cid], bool]) -> None:
        check_present(record, has, self.label)
        records = self._catalogue()
        block = _encode(records | {name: record})
        cid = Cid.of(Codec.DAG_CBOR, block)
        self._node.put([cid], [(cid, block)], pin=False)
        said = self._node.publish_name(cid, self._key)
        if said != self.name:
            raise InputError(f"the node's key {self._key!r} publishes {said}, not {self.name}: name that key instead")

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._catalogue()))

    def _catalogue(self) -> dict[str, ModelRecord]:
        """Empty where the key has published nothing; raises NotFoundError where that cannot be fetched."""
        try:
            cid = self._node.resolve_name(self.name)
        except NotFoundError:
            return {}
        return _decode(self._node.get(cid))


def _encode(records: dict[str, ModelRecord]) -> bytes:
    names: dict[str, Value] = {name: [record.manifest, record.signature] for name, record in records.items()}
    block = canonical.encode({"v": 1, "names": names})
    if len(block) > MAX_CATALOGUE_BYTES:
        raise InputError(
            f"a catalogue of {len(records)} names is larger than {MAX_CATALOGUE_BYTES} bytes: use another key"
        )
    return block


def _decode(block: bytes) -> dict[str, ModelRecord]:
    with Fields(canonical.decode(block, max_bytes=MAX_CATALOGUE_BYTES), "catalogue") as f:
        f.integer("v", 1, 1)
        rows = f.map("names")
    return {name: _record(row) for name, row in rows.items()}


def _record(row: Value) -> ModelRecord:
    match row:
        case [Cid() as manifest, Cid() as signature]:
            return ModelRecord(manifest, signature)
    raise FormatError(f"catalogue.names: {str(row)[:100]} is no record")
