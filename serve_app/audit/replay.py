"""One stage of a finished request computed again, from its recorded input, in one parallel pass.

A stage's keys and values follow from its inputs alone, so a causal forward over the rows of positions 0 .. n-1 repeats
every one of its outputs. Noise cannot build up over stages, and who differs is the one that is blamed.
One layer at a time is loaded from the shards' blocks, and all records pass through it before the next: the memory is
that of a layer and the activations. Layers are computed by the plain engine, which is transformers' own modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from serve_app.audit.error import Rows, floats_of
from serve_app.engine.engine import ActivationDtype
from serve_app.engine.load import LoadOptions, load_layers, shards_of
from serve_app.engine.torch_engine import TorchEngine
from serve_app.errors import AuditError, ForgedRecordError, ProtocolError
from serve_app.messages.record import StageRecord
from serve_app.messages.step import passing_plan
from serve_app.receipts.rows import Boundary, RowTree, ids_boundary
from serve_app.receipts.statement import StageStatement
from shard_tools.manifest import Manifest
from shard_tools.store.block_store import BlockStore

_DTYPES: tuple[ActivationDtype, ...] = ("bfloat16", "float16", "float32")
_SPARE_BITS = {"bfloat16": 16, "float16": 13, "float32": 0}  # of a float32's 23 of mantissa
REPLAY_PAGE = 64  # positions; a replay has its pages to itself, so their size matters to nobody
# Of several records that go through a layer together: what a GPU wants to be busy. One that is longer goes alone.
PASS_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a stage should have sent. profile: of whoever computed it, as calibrations name it.

    nudged: the same from rows whose values, before each layer, differ in the last bit of the dtype they are sent in;
    where ids come in, those of the embedding do. None if it was not asked for. So far do these rows carry rounding.
    """

    rows: Rows
    profile: str
    nudged: Rows | None = None


def opened(statement: StageStatement, record: StageRecord, manifest: Manifest) -> tuple[ActivationDtype, Rows]:
    """The rows that the stage signed for having sent, and their dtype, once the record is known to be of them.

    Roots are hashed anew from the bytes, so nothing is compared that was not signed. Raises ForgedRecordError for bytes
    that are not those of in_root and out_root; AuditError for a statement that is about another model or span.
    """
    if statement.manifest != manifest.cid or not 0 <= statement.start < statement.stop <= manifest.n_layers:
        raise AuditError(f"stage {statement.stage} speaks of layers or a model that are not in {manifest.name}")
    if set(statement.shards) != set(shards_of(manifest, statement.start, statement.stop)):
        raise AuditError(
            f"stage {statement.stage} loaded other shards than layers [{statement.start}, {statement.stop})"
        )
    width, n = manifest.hidden_size, statement.n_rows
    if n > manifest.context_length:  # nobody is kept busy by a pass over more than the model can have run
        raise AuditError(f"stage {statement.stage} speaks of {n} rows in a context of {manifest.context_length}")
    for dtype in _DTYPES:
        outlet = Boundary(manifest.cid, statement.stop, dtype, width)
        if len(record.sent) == n * outlet.row_bytes and _root(outlet, record.sent) == statement.out_root:
            break
    else:
        raise ForgedRecordError(
            f"the rows shown as sent by stage {statement.stage} are not those of its out_root", "sent"
        )
    inlet = replace(outlet, layer=statement.start) if statement.start else ids_boundary(manifest.cid)
    if len(record.received) != n * inlet.row_bytes or _root(inlet, record.received) != statement.in_root:
        what = f"the rows shown as received by stage {statement.stage} are not those of its in_root"
        raise ForgedRecordError(what, "received")
    if statement.start and not np.isfinite(floats_of(record.received, dtype, width)).all():
        # What honest layers make of it is no number either; the stage before is found by its own audit.
        raise AuditError(f"stage {statement.stage} received rows that are no numbers: its neighbour is at fault")
    return dtype, floats_of(record.sent, dtype, width)


class Layers:
    """Layers of one model, one at a time, computed by plain torch; as many as fit stay for the next replay."""

    def __init__(self, store: BlockStore, manifest: Manifest, options: LoadOptions, keep_bytes: int = 0) -> None:
        """options.dtype: what is computed in. keep_bytes: of weights that may stay in memory."""
        self.manifest, self.options = manifest, replace(options, page_size=REPLAY_PAGE)
        self._store, self._room = store, keep_bytes
        self._kept: dict[int, TorchEngine] = {}

    def engine(self, layer: int) -> TorchEngine:
        """Raises NotFoundError, CorruptBlockError."""
        engine = self._kept.get(layer)
        if engine is None:
            engine = load_layers(self._store, self.manifest, layer, layer + 1, self.options)
            if engine.profile.parameter_bytes <= self._room:  # the first ones: a pass over all would turn out any other
                self._room -= engine.profile.parameter_bytes
                self._kept[layer] = engine
        return engine


def replay(
    layers: Layers, span: tuple[int, int], dtype: ActivationDtype, received: Sequence[bytes], *, nudge: bool
) -> list[Replayed]:
    """What layers [start, stop) make of the rows that each of some records received: ids for layer 0, else of `dtype`.

    Recorded rows are widened exactly, or computed in their own dtype. nudge: with Replayed.nudged, for twice the work.
    Raises NotFoundError, CorruptBlockError for shards; AuditError for token ids that no vocabulary has.
    """
    manifest, options = layers.manifest, layers.options
    start, stop = span
    assert options.dtype in (dtype, "float32"), "recorded rows are not rounded before they are replayed"
    rows = list(received)
    if start and options.dtype != dtype:
        rows = [floats_of(r, dtype, manifest.hidden_size).astype("<f4").tobytes() for r in rows]
    profile, n = "", len(rows)
    for layer in range(start, stop):
        engine = layers.engine(layer)
        if nudge and layer == 0:
            with engine.embedding_nudged(_last_bit(dtype, options.dtype)):
                others = through_layer(engine, layer, rows)
            rows = through_layer(engine, layer, rows) + others
        else:
            if nudge:
                rows = rows[:n] + [_nudged(r, dtype, options.dtype) for r in rows[-n:]]
            rows = through_layer(engine, layer, rows)
        profile = engine.profile.description
    found = [floats_of(r, options.dtype, manifest.hidden_size) for r in rows]
    nudged: Sequence[Rows | None] = found[n:] if len(found) > n else [None] * n
    return [Replayed(own, profile, other) for own, other in zip(found[:n], nudged, strict=True)]


def through_layer(engine: TorchEngine, layer: int, rows: Sequence[bytes]) -> list[bytes]:
    """What this one layer makes of each record's rows, each from position 0 on. Raises AuditError for what are no rows.

    rows: ids for layer 0, else of the engine's dtype, as what is returned.
    """
    profile = engine.profile
    size = 4 if layer == 0 else profile.hidden_size * (4 if profile.dtype == "float32" else 2)
    out: list[bytes] = [b""] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for several in _passes(by_length, [len(r) // size for r in rows]):
        counts = [len(rows[i]) // size for i in several]
        engine.reserve(sum(-(-count // REPLAY_PAGE) for count in counts), len(counts))
        joined = b"".join(rows[i] for i in several)
        try:
            hidden = engine.run(passing_plan(counts, REPLAY_PAGE), memoryview(joined)).hidden
        except ProtocolError as e:
            raise AuditError(f"the rows that were received cannot be computed from: {e}") from e
        width, at = len(hidden) // sum(counts), 0
        for i, count in zip(several, counts, strict=True):
            out[i] = bytes(hidden[at : at + count * width])
            at += count * width
    return out


def _passes(records: Sequence[int], counts: Sequence[int]) -> Iterator[list[int]]:
    """Which records go through a layer together."""
    several: list[int] = []
    rows = 0
    for i in records:
        if several and rows + counts[i] > PASS_ROWS:
            yield several
            several, rows = [], 0
        several.append(i)
        rows += counts[i]
    if several:
        yield several


def _nudged(rows: bytes, dtype: ActivationDtype, computed_in: ActivationDtype) -> bytes:
    """Each value with the other last bit, as `dtype` writes it: off by some rounding, this way or that."""
    kind = "<u4" if computed_in == "float32" else "<u2"
    return (np.frombuffer(rows, kind) ^ _last_bit(dtype, computed_in)).astype(kind).tobytes()


def _last_bit(dtype: ActivationDtype, computed_in: ActivationDtype) -> int:
    return 1 << _SPARE_BITS[dtype] if computed_in == "float32" else 1


def _root(boundary: Boundary, rows: bytes) -> bytes:
    tree = RowTree(boundary)
    tree.append(0, rows)
    return tree.root()
