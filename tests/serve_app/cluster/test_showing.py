"""What a stage shows an auditor, and what it lets go of when that was read."""

from __future__ import annotations

import numpy as np

from serve_app.audit.showing import PIECE_BYTES
from serve_app.cluster.showing import Showing
from serve_app.pipeline.retention import Retention
from serve_app.receipts.identity import NodeIdentity
from shard_tools.signing import Signer
from tests.serve_app.pipeline.test_retention import PAGE, begun, run, step, whole

SESSION = NodeIdentity(Signer.from_seed(b"n" * 32)).open_session("stage", 1, 0, 60)


def name(retention: Retention, seq: int) -> bytes:
    """By which the record of this sequence is kept."""
    return next(request for request, _ in retention._closed if np.frombuffer(request, np.uint8).max() == seq)


def test_only_promised_rows_go_when_they_were_read() -> None:
    """Those of others stay while there is room: an answer behind a common beginning is audited by them."""
    retention, _ = begun()
    whole(retention, 1, [0, 1], 8)
    whole(retention, 2, [2], 4)
    showing, first, second = Showing(retention), name(retention, 1), name(retention, 2)
    for request in (first, second):
        piece = showing.piece(request, 0, 0, 0, SESSION)
        assert piece is not None and len(piece) < PIECE_BYTES
    showing.release(first, 0, promised=False)
    showing.release(second, 0, promised=True)
    assert showing.piece(second, 0, 0, 0, SESSION) is None
    run(retention, step([(3, PAGE, 1, [0, 5])], {3: PAGE}, [(3, PAGE + 1, 1)]))
    behind = showing.piece(name(retention, 3), 0, 0, 0, SESSION)
    assert behind is not None and retention.unauditable == 0
    assert showing.piece(first, 0, 0, 0, SESSION) is not None
