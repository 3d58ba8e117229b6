"""What a Head must know of the pipeline it leads."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from serve_app.receipts.rows import PAGE_ROWS
from shard_tools.cid import Cid
from shard_tools.signing import Envelope

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PipelineFacts:
    """What a Head must know of the pipeline it leads."""

    epoch: int
    manifest: Cid
    n_stages: int
    context_length: int  # tokens
    vocab_size: int
    max_flights: int  # steps on their way at a time
    step_timeout_s: float  # a step that takes longer has died: 60 s is ten times a 512-row step on two CPU cores
    certificates: tuple[Envelope, ...]  # of the stages' sessions
    registry: Envelope
    expires_s: int  # Unix time: when the first of registry and session keys runs out
    repair_s: float = 0.0  # how long requests wait for stages that replace lost ones; 0: nobody replaces any


def can_reuse_pages(page_size: int) -> bool:
    """Whether the rows of KV pages of this size can be accounted for without running again; says so if not."""
    if page_size % PAGE_ROWS:
        _log.warning(
            "KV pages of %d tokens are no whole pages of %d hashed rows, so shared prefixes are computed anew: "
            "make pipeline.page_size a multiple of %d",
            page_size,
            PAGE_ROWS,
            PAGE_ROWS,
        )
    return page_size % PAGE_ROWS == 0
