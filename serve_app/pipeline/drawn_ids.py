"""What the last stage has drawn for each open sequence: only what counts, so that it can sign for it.

A guess that was wrong makes what was drawn behind it void: the sequence goes on in its place, and so does its list.
What was drawn behind the end of an answer is cut off when it closes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serve_app.messages.controls import SequenceControls
from serve_app.messages.request import Sampling
from serve_app.messages.step import DRAW_EACH, StepPlan
from serve_app.receipts.drawn import Drawn, asked_hash
from serve_app.receipts.rows import ids_root
from shard_tools.cid import Cid


class DrawnIds:
    """Of one sequence, since it opened."""

    __slots__ = ("_asked", "_first", "_ids")

    def __init__(self, asked: bytes) -> None:
        """asked: asked_hash of what it draws by."""
        self._asked, self._first, self._ids = asked, 0, list[int]()

    def add(self, position: int, token: int) -> None:
        """Drawn at this position: the next one, or one of those drawn before, which is void then with all behind it."""
        place = position - self._first
        if place != len(self._ids):
            if self._ids:
                assert 0 <= place < len(self._ids), f"a draw at {position}, which is no position of this sequence's"
                del self._ids[place:]
            else:
                self._first = position
        self._ids.append(token)

    def sealed(self, manifest: Cid, rows: int) -> Drawn:
        """What counts if so many rows do: the token behind the last of them is the last."""
        count = rows + 1 - self._first if self._ids else 0
        ids = self._ids[: max(count, 0)]
        first = self._first if ids else rows + 1
        assert len(ids) == rows + 1 - first, f"{rows} rows, and {len(ids)} tokens drawn from position {first} on"
        return Drawn(first, ids_root(manifest, ids, first), self._asked)


def opened(manifest: Cid, plan: StepPlan) -> dict[int, DrawnIds]:
    """Of the sequences that a plan opens: nothing is drawn yet. Raises RequestError for what no request can ask."""
    if not len(plan.opens):
        return {}
    controls = {one.seq: one for one in plan.controls}
    found = {}
    for item in plan.opens:
        seq, plain = int(item["seq"]), [int(item[name]) for name in ("temperature_micro", "top_k", "top_p_micro")]
        found[seq] = DrawnIds(_asked(manifest, item["key"].tobytes(), plain, controls.get(seq)))
    return found


def add_draws(plan: StepPlan, owners: Sequence[DrawnIds | None], tokens: Sequence[int]) -> None:
    """A step has drawn these. owners: of its spans; None: nobody counts what that one draws."""
    drawing = np.flatnonzero(plan.spans["sample"]).tolist()
    starts, counts, samples = (plan.spans[name].tolist() for name in ("start", "count", "sample"))
    at = 0
    for i in drawing:
        owner, stop = owners[i], starts[i] + counts[i]
        if samples[i] != DRAW_EACH:
            if owner is not None:
                owner.add(stop, tokens[at])
            at += 1
            continue
        for position in range(starts[i] + 1, stop + 1):
            if owner is not None:
                owner.add(position, tokens[at])
            at += 1


def _asked(manifest: Cid, key: bytes, plain: list[int], controls: SequenceControls | None) -> bytes:
    temperature, top_k, top_p = plain
    if controls is None:
        return asked_hash(manifest, key, Sampling(temperature, top_k, top_p), (), 0)
    sampling = Sampling(
        temperature,
        top_k,
        top_p,
        None,
        controls.min_p_micro,
        controls.presence_micro,
        controls.frequency_micro,
        controls.repetition_micro,
        tuple((id, micro) for id, micro in controls.biases.tolist()),
    )
    return asked_hash(manifest, key, sampling, controls.ids.tolist(), controls.n_prompt)
