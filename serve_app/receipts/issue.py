"""How the Head turns the stages' statements into what the client gets.

Nothing is signed unless the statements account for every row, so a client never sees a receipt that the Head
could have known to be worthless.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.errors import ReceiptError
from serve_app.messages.request import GenerationRequest
from serve_app.receipts.bundle import Bundle, Opening
from serve_app.receipts.chain import require_whole
from serve_app.receipts.commitment import freshness_of, request_hash
from serve_app.receipts.identity import Certificate, Session
from serve_app.receipts.receipt import Receipt, ReceiptFinish
from serve_app.receipts.rows import ids_root
from serve_app.receipts.statement import STATEMENT_TYPE, StageStatement, envelope_cid
from shard_tools.errors import IntegrityError
from shard_tools.signing import Envelope, PublicKey


def issue(
    request: GenerationRequest,
    out_ids: Sequence[int],
    finish_reason: ReceiptFinish,
    *,
    statements: Sequence[Envelope],
    certificates: Sequence[Envelope],
    registry: Envelope,
    session: Session,
    node_nonce: bytes,
    now_ms: int,
    attempt: int = 0,
) -> Bundle:
    """The bundle of an answered request, the receipt in it signed by the Head's session.

    statements: in the order of stages; certificates: of the stages' sessions, each once, in any order; the Head's
    own is added here. The Head opened certificates and registry when the stages joined; here the statements are
    verified against those sessions and each other. Raises ReceiptError naming the stage at fault.
    """
    sessions = frozenset(Certificate.decode(envelope.payload).session for envelope in certificates)
    said = tuple(_open(i, envelope, sessions) for i, envelope in enumerate(statements))
    receipt = Receipt(
        request_hash=request_hash(request),
        attempt=attempt,
        manifest=request.manifest,
        sampling=request.sampling,
        max_tokens=request.max_tokens,
        stop_ids=request.stop_ids,
        n_prompt=len(request.prompt_ids),
        out_ids=tuple(out_ids),
        out_root=ids_root(request.manifest, out_ids, len(request.prompt_ids)),
        finish_reason=finish_reason,
        freshness=freshness_of(request.client_nonce, request.sampling),
        node_nonce=node_nonce,
        statements=tuple(envelope_cid(envelope) for envelope in statements),
        node=session.node,
        epoch=session.epoch,
        issued_ms=now_ms,
        assurance=request.assurance,
    )
    opening = Opening(request.prompt_ids, request.salt, request.client_nonce)
    require_whole(receipt, said, opening)
    needed = {session.certificate.payload: session.certificate}
    needed.update({envelope.payload: envelope for envelope in certificates})
    return Bundle(
        receipt=session.seal(receipt.payload_type, receipt.encode()),
        statements=tuple(statements),
        certificates=tuple(needed[payload] for payload in sorted(needed)),
        registry=registry,
        opening=opening,
    )


def _open(stage: int, envelope: Envelope, sessions: frozenset[PublicKey]) -> StageStatement:
    try:
        payload = envelope.open(STATEMENT_TYPE, sessions, "a certified session of this pipeline")
        return StageStatement.decode(payload)
    except IntegrityError as e:
        raise ReceiptError(f"statement {stage}: {e}") from e
