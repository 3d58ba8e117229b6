"""One stage of a finished request computed again in its own profile, and held to the very bits.

Where a stage computes in windows of one shape (pipeline.deterministic), a row's bits do not depend on what ran beside
it, in which batch, cut, slot, attempt or process. So every row is canonical: an auditor of the same profile gets the
same bytes, or the stage did not compute what it signed for. No calibration, no limit, no honest error to hide in.
What "the same profile" takes, and how it is tried, is fixed_windows.py's business. Knows nothing of verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np

from serve_app.audit.redraw import ExactHead
from serve_app.audit.replay import REPLAY_PAGE, opened, through_layer
from serve_app.engine.load import LoadOptions, load_head, load_layers
from serve_app.engine.output_head import head_profile
from serve_app.errors import AuditError
from serve_app.messages.record import StageRecord
from serve_app.receipts.statement import StageStatement
from shard_tools.manifest import Manifest
from shard_tools.store.block_store import BlockStore


class ExactReplay:
    """Computes stages of one model as deterministic ones do."""

    def __init__(self, store: BlockStore, manifest: Manifest, options: LoadOptions) -> None:
        """options: those of the stages, page size aside, which changes no bit."""
        assert options.deterministic, "without it bits depend on the batch"
        self._store, self._manifest, self._options = store, manifest, options

    @cached_property
    def profile(self) -> str:
        """As statements of stages name it that compute like this. Raises NotFoundError, CorruptBlockError."""
        return load_layers(self._store, self._manifest, 0, 1, self._options).profile.description

    def head(self) -> ExactHead:
        """What draws again, to the bit, what last stages of this profile drew."""
        load = partial(load_head, self._store, self._manifest, self._options)
        return ExactHead(self.profile, head_profile(self.profile), load)

    def first_unequal(self, said: StageStatement, record: StageRecord) -> int | None:
        """The first position whose row is not what the stage's layers give, to the bit; None if there is none.

        Raises ForgedRecordError, AuditError as `opened` and `computed` do, and AuditError for a stage that signed for
        another profile: its bits may differ, and nothing follows from that.
        """
        dtype, _ = opened(said, record, self._manifest)
        if said.profile != self.profile:
            raise AuditError(
                f"stage {said.stage} signed for bits of {said.profile!r}, and those of {self.profile!r} are known here"
            )
        if dtype != self._options.dtype:
            return 0  # its profile says otherwise
        (sent,), profile = computed(
            self._store, self._manifest, (said.start, said.stop), [record.received], self._options
        )
        if profile != self.profile:
            raise AuditError(f"layers [{said.start}, {said.stop}) are computed by {profile!r} here, not as layer 0")
        unequal = np.frombuffer(sent, np.uint8) != np.frombuffer(record.sent, np.uint8)
        rows = np.flatnonzero(unequal.reshape(said.n_rows, -1).any(1))
        return int(rows[0]) if len(rows) else None


def computed(
    store: BlockStore, manifest: Manifest, span: tuple[int, int], received: Sequence[bytes], options: LoadOptions
) -> tuple[list[bytes], str]:
    """What layers [start, stop) make of each record's rows, in bytes, and the profile of whoever computed them.

    Layers are loaded anew each time: that sets the number of threads, on which bits depend, and which other replays of
    this process change. received: ids for layer 0, else rows of options.dtype. Raises
    NotFoundError, CorruptBlockError; AuditError for rows that cannot be, and where layers are not computed alike.
    """
    start, stop = span
    rows, profiles = list(received), set[str]()
    for layer in range(start, stop):
        engine = load_layers(store, manifest, layer, layer + 1, replace(options, page_size=REPLAY_PAGE))
        rows = through_layer(engine, layer, rows)
        profiles.add(engine.profile.description)
    if len(profiles) > 1:
        raise AuditError(f"layers [{start}, {stop}) are not computed alike here: {' and '.join(sorted(profiles))}")
    return rows, profiles.pop()
