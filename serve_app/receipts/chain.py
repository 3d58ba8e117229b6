"""Whether the statements of one request fit together: the part of the check that needs no key.

The Head asks before it signs and the client asks again, with this same function. Signatures are others' work.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from serve_app.errors import ReceiptError
from serve_app.receipts.bundle import Opening
from serve_app.receipts.commitment import bind, commitment, freshness_of, noise_key
from serve_app.receipts.drawn import asked_hash
from serve_app.receipts.identity import CLOCK_SKEW_S
from serve_app.receipts.receipt import Receipt
from serve_app.receipts.rows import ids_root
from serve_app.receipts.statement import StageStatement


def require_whole(receipt: Receipt, statements: Sequence[StageStatement], opening: Opening) -> None:
    """Returns if the receipt opens to this request and the statements account for every row of it.

    Raises ReceiptError naming the first part that does not fit.
    """
    _require_opening(receipt, opening)
    _require_outcome(receipt)
    _require_tiling(receipt, statements)
    _require_roots(receipt, statements, opening)
    _require_draws(receipt, statements, opening)


def _require_opening(receipt: Receipt, opening: Opening) -> None:
    if len(opening.prompt_ids) != receipt.n_prompt:
        raise ReceiptError(
            f"receipt.n_prompt: it says {receipt.n_prompt} prompt tokens, the opening holds {len(opening.prompt_ids)}"
        )
    committed = commitment(
        receipt.manifest,
        opening.prompt_ids,
        receipt.max_tokens,
        receipt.sampling,
        receipt.stop_ids,
        opening.salt,
        receipt.assurance,
    )
    if bind(opening.client_nonce, committed) != receipt.request_hash:
        raise ReceiptError("receipt.request: it does not open to this prompt, nonce, model, sampling and level")
    expected = freshness_of(opening.client_nonce, receipt.sampling)
    if receipt.freshness != expected:
        raise ReceiptError(f"receipt.freshness: it says {receipt.freshness!r} where {expected!r} is true")


def _require_outcome(receipt: Receipt) -> None:
    n_out, reason = len(receipt.out_ids), receipt.finish_reason
    if not 1 <= n_out <= receipt.max_tokens:
        raise ReceiptError(f"receipt.out_ids: {n_out} tokens, where 1 to {receipt.max_tokens} were asked for")
    if reason == "length" and n_out != receipt.max_tokens:
        raise ReceiptError(
            f"receipt.finish: it says 'length' after {n_out} tokens, where {receipt.max_tokens} were asked for"
        )
    early = set(receipt.stop_ids).intersection(receipt.out_ids[:-1])
    if early:
        raise ReceiptError(f"receipt.out_ids: they go on after token {min(early)}, which ends a completion")
    if ids_root(receipt.manifest, receipt.out_ids, receipt.n_prompt) != receipt.out_root:
        raise ReceiptError("receipt.out_root: it is not the root of receipt.out_ids")


def _require_tiling(receipt: Receipt, statements: Sequence[StageStatement]) -> None:
    if not statements:
        raise ReceiptError("receipt.statements: there are none, so nobody says that it computed anything")
    layer = 0
    for i, s in enumerate(statements):
        if (s.stage, s.n_stages) != (i, len(statements)):
            raise ReceiptError(
                f"statement {i}: it is of stage {s.stage} of {s.n_stages}, where {i} of {len(statements)} comes next"
            )
        if s.start != layer or s.stop <= s.start:
            raise ReceiptError(
                f"statement {i}: it covers layers [{s.start}, {s.stop}), where [{layer}, ...) comes next"
            )
        layer = s.stop
        for name, said, expected in (
            ("request", s.request_hash, receipt.request_hash),
            ("manifest", s.manifest, receipt.manifest),
            ("attempt", s.attempt, receipt.attempt),
            ("epoch", s.epoch, receipt.epoch),
        ):
            if said != expected:
                raise ReceiptError(f"statement {i}: its {name} is {_short(said)}, the receipt's {_short(expected)}")
        if not s.started_ms <= s.ended_ms <= receipt.issued_ms + CLOCK_SKEW_S * 1000:
            raise ReceiptError(
                f"statement {i}: from {s.started_ms} to {s.ended_ms} ms, in a receipt of {receipt.issued_ms}"
            )


def _require_roots(receipt: Receipt, statements: Sequence[StageStatement], opening: Opening) -> None:
    n_rows = receipt.n_prompt + len(receipt.out_ids) - 1  # the last token drawn is never fed back
    for i, s in enumerate(statements):
        if s.n_rows != n_rows:
            raise ReceiptError(
                f"statement {i}: it covers {s.n_rows} rows, where {receipt.n_prompt} prompt tokens and "
                f"{len(receipt.out_ids)} answered ones make {n_rows}"
            )
    if statements[0].in_root != ids_root(receipt.manifest, (*opening.prompt_ids, *receipt.out_ids[:-1])):
        raise ReceiptError("statement 0: its in_root is not that of the prompt's and the answer's token ids")
    for sender, receiver in pairwise(statements):
        if receiver.in_root != sender.out_root:
            raise ReceiptError(
                f"statement {receiver.stage}: its in_root {_short(receiver.in_root)} is not the out_root "
                f"{_short(sender.out_root)} of stage {sender.stage}: the bytes changed between the two"
            )


def _require_draws(receipt: Receipt, statements: Sequence[StageStatement], opening: Opening) -> None:
    """The last stage signed for these tokens, drawn by what this receipt says was asked for; nobody else drew any."""
    *others, last = statements
    early, drawn, n_prompt = next((s for s in others if s.drawn is not None), None), last.drawn, receipt.n_prompt
    if early is not None:
        raise ReceiptError(f"statement {early.stage}: it says that it drew, which the last stage alone does")
    if drawn is None:
        raise ReceiptError(f"statement {last.stage}: the last stage does not say what it drew")
    end = n_prompt + len(receipt.out_ids)
    # Only what was begun anew goes on behind tokens that somebody drew before; all of them if but its receipt lacked.
    if not n_prompt <= drawn.first <= (end if receipt.attempt else n_prompt):
        raise ReceiptError(
            f"statement {last.stage}: it drew from position {drawn.first} on, where attempt {receipt.attempt} at "
            f"positions [{n_prompt}, {end}) cannot have begun"
        )
    if drawn.root != ids_root(receipt.manifest, receipt.out_ids[drawn.first - n_prompt :], drawn.first):
        raise ReceiptError("receipt.out_ids: they are not those that the last stage signed for drawing")
    known = (*opening.prompt_ids, *receipt.out_ids[: drawn.first - n_prompt])
    key = noise_key(receipt.sampling, opening.client_nonce, receipt.node_nonce)
    if drawn.asked != asked_hash(receipt.manifest, key, receipt.sampling, known, n_prompt):
        raise ReceiptError("receipt.sampling: the last stage signed for drawing by another one, or by another nonce")


def _short(value: object) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else str(value)
