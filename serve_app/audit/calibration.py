"""How far honest stages of one kind lie from an auditor of one kind: a file that is named by its content.

A calibration is for layers [start, stop) of one model, loaded from these shards, computed by an execution profile and
replayed by another: all five are in it, and it is used for nothing else. Integers only, so it has one spelling and one
CID, which every verdict names. Law: `Calibration.decode(c.encode()) == c`. Bytes: PROTOCOL.md.
Made of honest pairs (`llmd audit calibrate`), never of rows of a node that is under suspicion.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from serve_app.audit.error import Floats, Rows, channel_sizes, eased, whitened_errors, window_means
from serve_app.audit.tail import DECILES, MAX_PICO, MICRO, MIN_SAMPLES, PICO, Tail, fit
from serve_app.errors import AuditError
from serve_app.receipts.statement import MAX_LAYERS, StageStatement, manifest_link
from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid, Codec
from shard_tools.errors import FormatError

if TYPE_CHECKING:  # it brings torch along, and who reads verdicts and calibrations needs none
    from serve_app.audit.replay import Replayed

MAX_CALIBRATION_BYTES = 1 << 20  # 4 bytes a channel, and some hundred of the rest
TOKENS = (1, 4, 16, 64)  # window lengths: one altered row shows in the first, a slow drift in the last
_MAX_SHARDS, _MAX_PROFILE, _MAX_WIDTH = 4098, 200, 1 << 17
_UNIT = (1 << 32) - 1  # the largest channel's size; only ratios of sizes matter


@dataclass(frozen=True)
class Calibration:
    """One honest pair of profiles at one span of layers."""

    manifest: Cid
    start: int
    stop: int
    shards: tuple[Cid, ...]
    prover: str  # StageStatement.profile
    auditor: str  # Replayed.profile
    sizes: tuple[int, ...]  # of the channels, relative to the largest
    nudged_pico: int  # how far the last bit of its rows moves the usual row; 0: nothing moves
    tails: tuple[Tail, ...]  # by rising window length, the first of 1

    def errors(self, recorded: Rows, replayed: Replayed) -> Floats:
        """[rows]: how far each lies from its replay, in the measure that the tails are of."""
        return _errors(recorded, replayed, np.array(self.sizes, np.float64), self.nudged_pico / PICO)

    @cached_property
    def cid(self) -> Cid:
        """The name of this file."""
        return Cid.of(Codec.DAG_CBOR, self.encode())

    def require_for(self, statement: StageStatement, auditor: str) -> None:
        """Returns if it is about what this stage and this auditor did. Raises AuditError."""
        for what, own, found in (
            ("model", self.manifest, statement.manifest),
            ("layers", (self.start, self.stop), (statement.start, statement.stop)),
            ("shards", self.shards, statement.shards),
            ("profile of the stage", self.prover, statement.profile),
            ("profile of the auditor", self.auditor, auditor),
        ):
            if own != found:
                raise AuditError(f"calibration {self.cid}: its {what} is {str(own)[:100]!r}, not {str(found)[:100]!r}")

    def encode(self) -> bytes:
        """The bytes of the file."""
        tails: list[Value] = [
            [t.tokens, t.samples, list(t.deciles_pico), t.scale_pico, t.shape_micro, t.largest_pico] for t in self.tails
        ]
        return canonical.encode(
            {
                "v": 2,
                "manifest": self.manifest,
                "start": self.start,
                "stop": self.stop,
                "shards": list(self.shards),
                "prover": self.prover,
                "auditor": self.auditor,
                "sizes": struct.pack(f"<{len(self.sizes)}I", *self.sizes),
                "nudged": self.nudged_pico,
                "tails": tails,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Calibration:
        """Read a file. Raises FormatError."""
        with Fields(canonical.decode(data, max_bytes=MAX_CALIBRATION_BYTES), "calibration") as f:
            f.integer("v", 2, 2)
            sizes = f.data("sizes", 4, 4 * _MAX_WIDTH)
            if len(sizes) % 4:
                raise FormatError(f"calibration.sizes: {len(sizes)} bytes are no whole number of uint32")
            return cls(
                manifest_link(f),
                f.integer("start", 0, MAX_LAYERS),
                f.integer("stop", 1, MAX_LAYERS),
                tuple(_link(item) for item in f.items("shards", _MAX_SHARDS)),
                f.text("prover", _MAX_PROFILE),
                f.text("auditor", _MAX_PROFILE),
                _sizes(struct.unpack(f"<{len(sizes) // 4}I", sizes)),
                f.integer("nudged", 0, MAX_PICO),
                _tails(f.items("tails", len(TOKENS))),
            )


def calibrate(
    statements: Sequence[StageStatement], recorded: Sequence[Rows], replays: Sequence[Replayed]
) -> Calibration:
    """The calibration of honest records of one stage, each with its replay. recorded: floats of the rows sent.

    Raises AuditError if they are of unequal kind, or too few for a tail.
    """
    first, auditor = statements[0], replays[0].profile
    sizes = channel_sizes([replay.rows for replay in replays])
    scaled = np.maximum(np.round(sizes / sizes.max() * _UNIT), 1)
    moved = [whitened_errors(r.nudged, r.rows, scaled) for r in replays if r.nudged is not None]
    nudged_pico = min(math.ceil(float(np.median(np.concatenate(moved))) * PICO), MAX_PICO) if moved else 0
    tails = fit_tails(
        _errors(rows, replay, scaled, nudged_pico / PICO) for rows, replay in zip(recorded, replays, strict=True)
    )
    if not tails:
        raise AuditError(f"{sum(map(len, recorded))} rows are too few to calibrate by: {MIN_SAMPLES} are the least")
    made = Calibration(
        first.manifest,
        first.start,
        first.stop,
        first.shards,
        first.profile,
        auditor,
        tuple(scaled.astype(np.int64).tolist()),
        nudged_pico,
        tails,
    )
    for statement, replay in zip(statements, replays, strict=True):
        made.require_for(statement, replay.profile)
    return made


def _errors(recorded: Rows, replayed: Replayed, sizes: Floats, usual: float) -> Floats:
    errors = whitened_errors(recorded, replayed.rows, sizes)
    if usual == 0 or replayed.nudged is None:
        return errors
    return eased(errors, whitened_errors(replayed.nudged, replayed.rows, sizes), usual)


def fit_tails(errors: Iterable[Floats]) -> tuple[Tail, ...]:
    """The tail for each window length of which there are enough windows. errors: of the rows of each request."""
    every = list(errors)
    out = []
    for tokens in TOKENS:
        means = np.concatenate([window_means(e, tokens) for e in every]) if every else np.zeros(0)
        if len(means) < MIN_SAMPLES:
            break
        if not np.isfinite(means).all():
            raise AuditError("an honest record holds what is no number, so nothing can be calibrated by it")
        out.append(fit(tokens, means))
    return tuple(out)


def _sizes(values: tuple[int, ...]) -> tuple[int, ...]:
    if not min(values):
        raise FormatError("calibration.sizes: a channel of size 0 would be divided by")
    return values


def _tails(items: Sequence[Value]) -> tuple[Tail, ...]:
    tails = tuple(_tail(item) for item in items)
    lengths = [t.tokens for t in tails]
    if not lengths or lengths != list(TOKENS[: len(lengths)]):
        raise FormatError(f"calibration.tails: windows of {lengths}, expected the first of {list(TOKENS)}")
    return tails


def _tail(item: Value) -> Tail:
    if isinstance(item, list) and len(item) == 6:
        deciles = item.pop(2)
        if isinstance(deciles, list) and len(deciles) == DECILES and _in_range([*item, *deciles]):
            tokens, samples, scale, shape, largest = _integers(item)
            tail = Tail(tokens, samples, tuple(_integers(deciles)), scale, shape, largest)
            rising = list(tail.deciles_pico) == sorted(tail.deciles_pico)
            if rising and samples >= MIN_SAMPLES and scale >= 1 and shape <= MICRO // 2:
                return tail
    raise FormatError(f"calibration.tails: {str(item)[:200]} is no tail of honest errors")


def _in_range(values: Sequence[Value]) -> bool:
    return all(type(v) is int and 0 <= v <= MAX_PICO for v in values)


def _integers(values: Sequence[Value]) -> list[int]:
    return [v for v in values if isinstance(v, int)]


def _link(item: Value) -> Cid:
    if not isinstance(item, Cid):
        raise FormatError(f"calibration.shards: expected a link, found {type(item).__name__}")
    return item
