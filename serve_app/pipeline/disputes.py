"""What a Head makes of two stages that disagree about the rows of a request: whom it names, and what it shows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from serve_app.messages.step import Refused, Roots
from serve_app.receipts.evidence import Evidence
from serve_app.receipts.transit import Side, TransitProof, decide
from shard_tools.errors import LlmdError
from shard_tools.signing import Envelope


def of_roots(request_hash: bytes, wrong: str, chain: Sequence[Roots], certificates: Sequence[Envelope]) -> Evidence:
    """Of stages whose roots are not those of one chain, as `wrong` says; certificates: of all stages."""
    for before, after in itertools.pairwise(chain):
        if before.out_root == after.in_root:
            continue
        sender = Side(before.stage, certificates[before.stage], before.rows, before.out_root, before.sent)
        receiver = Side(after.stage, certificates[after.stage], after.rows, after.in_root, after.received)
        blame = decide(before.seq, sender, receiver)
        if blame is None:
            break
        error = f"{wrong}; stage {blame.stage} is at fault: {blame.why}"
        return Evidence(request_hash, error, b"", blame.proof.encode() if blame.proof is not None else b"")
    return Evidence(request_hash, wrong)


def of_refusal(request_hash: bytes, said: Refused) -> Evidence:
    """Of a stage that refuses what came: by its word alone, unless it shows a proof."""
    error = f"stage {said.stage} refuses the rows of stage {said.stage - 1}: {said.message}"
    proof = said.proof
    try:
        if proof:
            TransitProof.decode(proof).convicted()
    except LlmdError as e:
        error, proof = f"{error} (what it shows proves nothing: {e})", b""
    return Evidence(request_hash, error, said.delivery, proof)
