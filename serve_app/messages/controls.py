"""How a sequence that opens departs from plain sampling: what a step plan carries beside OPEN, for the few that ask.

Penalties count tokens, and the last stage of a pipeline sees no ids: so the ids that are known when a sequence opens
come along (its prompt; for one opened again, what it drew as well), and those it draws later it counts itself.
Laws: decode(encode(x)) == x; what says nothing is not written. Byte layout: PROTOCOL.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.errors import ProtocolError
from serve_app.messages.request import (
    MAX_BIAS_MICRO,
    MAX_BIASES,
    MAX_PENALTY_MICRO,
    MAX_REPETITION_MICRO,
    MAX_TOKENS,
    MAX_VOCAB,
    MICRO,
    MIN_REPETITION_MICRO,
    Sampling,
)

CONTROL = np.dtype(
    [
        ("seq", "<u8"),
        ("min_p_micro", "<u4"),
        ("presence_micro", "<i4"),
        ("frequency_micro", "<i4"),
        ("repetition_micro", "<u4"),
        ("n_prompt", "<u4"),  # how many of the ids are the prompt's
        ("n_ids", "<u4"),  # how many of `ids` are this sequence's: 0 unless a penalty needs them
        ("n_biases", "<u4"),  # how many of `biases`
    ]
)
BIAS = np.dtype([("id", "<u4"), ("micro", "<i4")])

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class SequenceControls:
    """Those of one sequence."""

    seq: int
    min_p_micro: int
    presence_micro: int
    frequency_micro: int
    repetition_micro: int
    n_prompt: int
    ids: Array  # uint32, from position 0 on
    biases: Array  # BIAS, by rising id

    @property
    def counts(self) -> bool:
        """Whether what the sequence holds matters."""
        return bool(self.presence_micro or self.frequency_micro or self.repetition_micro != MICRO)


@dataclass(frozen=True, slots=True, eq=False)
class Controls:
    """Those of all sequences of one plan that have any; ids and biases lie in the order of rows."""

    rows: Array  # CONTROL
    ids: Array  # uint32
    biases: Array  # BIAS

    @classmethod
    def of(cls, opening: Iterable[tuple[int, Sampling, Sequence[int], int]]) -> Controls:
        """opening: seq, sampling, all its tokens so far, how many of these are its prompt."""
        rows: list[tuple[int, ...]] = []
        ids: list[int] = []
        biases: list[tuple[int, int]] = []
        for seq, s, tokens, n_prompt in opening:
            if not s.plain:
                known = tokens if s.penalises else ()
                penalties = s.presence_micro, s.frequency_micro, s.repetition_micro
                rows.append((seq, s.min_p_micro, *penalties, n_prompt if known else 0, len(known), len(s.logit_bias)))
                ids += known
                biases += s.logit_bias
        return cls(np.array(rows, CONTROL), np.array(ids, "<u4"), np.array(biases, BIAS)) if rows else NO_CONTROLS

    def __iter__(self) -> Iterator[SequenceControls]:
        id, bias = 0, 0
        for row in self.rows.tolist():
            seq, min_p, presence, frequency, repetition, n_prompt, n_ids, n_biases = row
            own = self.ids[id : id + n_ids], self.biases[bias : bias + n_biases]
            yield SequenceControls(seq, min_p, presence, frequency, repetition, n_prompt, *own)
            id, bias = id + n_ids, bias + n_biases

    def encode(self) -> bytes:
        """Three arrays, one after another."""
        return b"".join(array.tobytes() for array in (self.rows, self.ids, self.biases))

    @classmethod
    def decode(cls, data: memoryview, n_rows: int, opens: Array) -> tuple[Controls, memoryview]:
        """Read n_rows rows and what is theirs; returns what follows. opens: the plan's. Raises ProtocolError."""
        if not n_rows:
            return NO_CONTROLS, data
        rows, data = _taken(data, CONTROL, n_rows)
        ids, data = _taken(data, np.dtype("<u4"), int(rows["n_ids"].sum(dtype=np.int64)))
        biases, data = _taken(data, BIAS, int(rows["n_biases"].sum(dtype=np.int64)))
        controls = cls(rows, ids, biases)
        seqs = rows["seq"]
        if len(np.unique(seqs)) != len(seqs) or not np.isin(seqs, opens["seq"]).all():
            raise ProtocolError("controls of a sequence that does not open in this step, or twice of one that does")
        for one in controls:
            _check(one)
        return controls, data


NO_CONTROLS = Controls(np.zeros(0, CONTROL), np.zeros(0, "<u4"), np.zeros(0, BIAS))


def _taken(data: memoryview, dtype: np.dtype[Any], count: int) -> tuple[Array, memoryview]:
    size = count * dtype.itemsize
    if size > len(data):
        raise ProtocolError("a step message was cut short in its controls")
    return np.frombuffer(data[:size], dtype), data[size:]


def _check(one: SequenceControls) -> None:
    """Raises ProtocolError unless these are what a Sampling can say, in the one way to say it."""
    ids, biases = one.ids, one.biases
    bias_ids, micro = biases["id"].astype(np.int64), np.abs(biases["micro"].astype(np.int64))
    for wrong in (
        one.min_p_micro > MICRO,
        max(abs(one.presence_micro), abs(one.frequency_micro)) > MAX_PENALTY_MICRO,
        not MIN_REPETITION_MICRO <= one.repetition_micro <= MAX_REPETITION_MICRO,
        len(ids) > 2 * MAX_TOKENS,
        one.counts != bool(len(ids)),
        not min(len(ids), 1) <= one.n_prompt <= len(ids),
        len(ids) and int(ids.max()) >= MAX_VOCAB,
        len(biases) > MAX_BIASES,
        len(biases) and int(bias_ids.max()) >= MAX_VOCAB,
        (np.diff(bias_ids) <= 0).any(),
        (micro == 0).any() or (micro > MAX_BIAS_MICRO).any(),
        not (one.min_p_micro or one.counts or len(biases)),
    ):
        if wrong:
            raise ProtocolError(f"the controls of sequence {one.seq} are out of range or say nothing")
