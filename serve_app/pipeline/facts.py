"""What a Head must know of the pipeline it leads."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from serve_app.errors import ContextLengthError, RequestError
from serve_app.messages.events import Begun
from serve_app.messages.request import GenerationRequest
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


def require_servable(facts: PipelineFacts, request: GenerationRequest, begun: Begun | None) -> None:
    """Raises RequestError for what this pipeline can never do; begun: what was drawn of it elsewhere."""
    prompt, limit = len(request.prompt_ids), facts.context_length
    if request.manifest != facts.manifest:
        raise RequestError(f"this pipeline serves {facts.manifest}, not {request.manifest}", "model")
    if prompt == 0:
        raise RequestError("the prompt is empty", "prompt")
    if prompt + request.max_tokens > limit:
        raise ContextLengthError(limit, prompt, request.max_tokens)
    drawn = () if begun is None else begun.drawn
    if len(drawn) > request.max_tokens:
        raise RequestError(f"{len(drawn)} tokens were drawn of {request.max_tokens}", "begun")
    if max(*request.prompt_ids, *drawn, 0) >= facts.vocab_size:
        raise RequestError(f"token id {max(*request.prompt_ids, *drawn, 0)} is not in the vocabulary", "prompt")
    beyond = next((id for id, _ in request.sampling.logit_bias if id >= facts.vocab_size), None)
    if beyond is not None:
        raise RequestError(f"token id {beyond} is not in the vocabulary", "logit_bias")
