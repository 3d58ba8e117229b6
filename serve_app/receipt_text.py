"""Whether a receipt's token ids are the words that the client sent and got.

`check` binds ids; a person reads text. Here the template and the tokenizer, taken from blocks that the receipt's
manifest names, are run again: the request must give the receipt's prompt ids, and its answer's ids must give the
text. With this the Head cannot slip a sentence into the prompt, nor words into the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from serve_app.api.text import TextCodec
from serve_app.errors import ReceiptError
from serve_app.receipts.check import CheckedReceipt, Expected, require_expected
from serve_app.transcript import GotResponse, SentRequest


def check_request(checked: CheckedReceipt, sent: SentRequest, codec: TextCodec, now_s: int) -> None:
    """Returns if this receipt is of the request that was sent. Raises ReceiptError naming what differs.

    codec: from the files of the receipt's manifest.
    """
    receipt = checked.receipt
    require_expected(
        checked,
        Expected(client_nonce=sent.nonce, sampling=sent.sampling, max_tokens=sent.max_tokens, assurance=sent.assurance),
        now_s,
    )
    if receipt.stop_ids != codec.stop_ids:
        raise ReceiptError(f"receipt.stop: it says {receipt.stop_ids}, the model's files {codec.stop_ids}")
    ids: tuple[int, ...] = ()
    for clock in _clocks(checked):
        ids = _prompt_ids(sent, codec, clock)
        if ids == checked.opening.prompt_ids:
            return
    place = next((i for i, (a, b) in enumerate(zip(ids, checked.opening.prompt_ids, strict=False)) if a != b), None)
    where = f"first at token {place}" if place is not None else "in length"
    raise ReceiptError(
        f"opening.prompt_ids: the request that was sent gives {len(ids)} tokens, the receipt is of "
        f"{len(checked.opening.prompt_ids)}; they differ {where}"
    )


def check_response(checked: CheckedReceipt, got: GotResponse, stops: Sequence[str], codec: TextCodec) -> None:
    """Returns if the receipt's tokens are the text that came. Raises ReceiptError.

    stops: the stop strings of the request; the text ends before the first of them.
    """
    text, stopped = cut_at_stop(codec.decode(checked.receipt.out_ids), stops)
    if text != got.text:
        place = next((i for i, (a, b) in enumerate(zip(text, got.text, strict=False)) if a != b), None)
        place = min(len(text), len(got.text)) if place is None else place
        raise ReceiptError(
            f"receipt.out_ids: they read {text[place : place + 40]!r} from character {place} on, "
            f"where the response has {got.text[place : place + 40]!r}"
        )
    reason = "stop" if stopped else checked.receipt.finish_reason
    if got.finish_reason is not None and got.finish_reason != reason:
        raise ReceiptError(f"receipt.finish: it says {reason!r}, the response {got.finish_reason!r}")


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first (of several, the longest), and whether there is one."""
    found = [(at + len(stop), at) for stop in stops if stop and (at := text.find(stop)) >= 0]
    return (text[: min(found)[1]], True) if found else (text, False)


def _prompt_ids(sent: SentRequest, codec: TextCodec, clock: Callable[[], datetime]) -> tuple[int, ...]:
    if sent.messages is not None:
        return codec.encode_chat(sent.messages, clock)
    if sent.prompt is not None:
        return codec.encode(sent.prompt, add_special_tokens=True)
    return sent.prompt_ids or ()


def _clocks(checked: CheckedReceipt) -> list[Callable[[], datetime]]:
    """The times at which the server may have rendered a template that prints the date, here and in UTC."""
    times = {checked.statements[0].started_ms // 1000, checked.receipt.issued_ms // 1000}
    moments = [datetime.fromtimestamp(s, zone) for zone in (None, UTC) for s in sorted(times)]
    return [lambda moment=moment: moment for moment in moments]  # type: ignore[misc]
