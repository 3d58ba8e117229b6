"""Requests whose undisturbed greedy answers are known, and what is to be said of an answer that was disturbed.

Written against what a client sees: text, counts, the end, the receipt. Of how a server recovers it knows nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks import http_client
from benchmarks.http_client import Reply
from benchmarks.workload import Arrival
from serve_app.api.text import TextCodec
from serve_app.client import fresh_nonce
from serve_app.receipt_text import check_response
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.check import CheckedReceipt, Expected, check
from serve_app.transcript import GotResponse
from shard_tools.errors import LlmdError
from shard_tools.signing import PublicKey

REFUSALS = (429, 503)  # a server that says it cannot now; everything else that is no answer is a failure

Verdict = Literal["correct", "parted", "wrong", "failed", "refused"]


@dataclass(frozen=True, slots=True)
class Question:
    """A request without its nonce, and where it goes."""

    path: str
    body: Mapping[str, Any]

    @classmethod
    def of(cls, model: str, arrival: Arrival, chat: bool, whole: bool = False) -> Question:
        """The arrival's prompt, greedily. whole: the answer goes on past its end, to the last of its tokens."""
        asked = {"messages": [{"role": "user", "content": arrival.prompt}]} if chat else {"prompt": arrival.prompt}
        body = asked | {"model": model, "max_tokens": arrival.answer_tokens, "temperature": 0}
        body |= {"logit_bias": {"2": -100}} if whole else {}  # 2 ends a turn in both models of benchmarks/models.py
        return cls(f"/v1/{'chat/' if chat else ''}completions", body)


@dataclass(frozen=True, slots=True)
class Known:
    """A question and its undisturbed answer."""

    question: Question
    text: str
    finish: str
    prompt_ids: tuple[int, ...]
    out_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer. attempt: of its receipt, None without one; parting: the first token that is another, or None."""

    verdict: Verdict
    why: str = ""
    attempt: int | None = None
    out_ids: tuple[int, ...] = ()
    parting: int | None = None


@dataclass(frozen=True, slots=True)
class Asker:
    """One server, its model's text, and the key that its receipts rest on."""

    url: str
    codec: TextCodec
    operator: PublicKey

    async def ask(
        self,
        question: Question,
        timeout_s: float,
        heard: Callable[[Reply], None] = lambda reply: None,
        nonce: str | None = None,
    ) -> tuple[Reply, str]:
        """What came, and the nonce that was sent, in hex. nonce: of a request that this one repeats."""
        llmd = fresh_nonce() if nonce is None else {"nonce": nonce}
        body = {**question.body, "stream": True, "stream_options": {"include_usage": True}, "llmd": llmd}
        headers = {"Idempotency-Key": llmd["nonce"]}
        reply = await http_client.ask(self.url, question.path, body, headers=headers, heard=heard, timeout_s=timeout_s)
        return reply, llmd["nonce"]

    async def learn(self, question: Question, timeout_s: float) -> Known:
        """Its answer now, while nothing disturbs the server. Raises RuntimeError if there is none."""
        reply, nonce = await self.ask(question, timeout_s)
        if reply.error is not None or reply.finish is None:
            raise RuntimeError(f"no reference answer: {reply.error or 'no finish reason'}")
        try:
            receipt = self._checked(reply, nonce)
        except LlmdError as e:
            raise RuntimeError(f"no reference answer: {e}") from e
        return Known(question, reply.text, reply.finish, receipt.opening.prompt_ids, receipt.receipt.out_ids)

    def judge(self, known: Known, reply: Reply, nonce: str) -> Judged:
        """What the answer is worth. "parted": whole, but with other tokens; only a margin says whether it may be."""
        if reply.error is not None:
            return Judged("refused" if reply.status in REFUSALS else "failed", reply.error)
        try:
            receipt = self._checked(reply, nonce, known.prompt_ids)
        except LlmdError as e:
            return Judged("wrong", f"its receipt is missing or does not verify: {e}")
        attempt, ids = receipt.receipt.attempt, receipt.receipt.out_ids
        if len(ids) != reply.completion_tokens:
            why = f"{reply.completion_tokens} tokens are counted, the receipt is of {len(ids)}"
            return Judged("wrong", why, attempt, ids)
        if ids != known.out_ids:
            pairs = zip(ids, known.out_ids, strict=False)
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(known.out_ids)))
            return Judged("parted", f"from token {place} on it is another", attempt, ids, place)
        if (reply.text, reply.finish) != (known.text, known.finish):
            return Judged("wrong", f"right tokens, wrong text or end ({reply.finish})", attempt, ids)
        return Judged("correct", "", attempt, ids)

    def _checked(self, reply: Reply, nonce: str, prompt_ids: tuple[int, ...] | None = None) -> CheckedReceipt:
        """The receipt, of this request and this text. Raises LlmdError."""
        expected = Expected(client_nonce=bytes.fromhex(nonce), prompt_ids=prompt_ids)
        bundle = Bundle.from_text(reply.receipt or "")
        checked = check(bundle, self.operator, now_s=int(time.time()), request=expected)
        check_response(checked, GotResponse(reply.text, reply.finish, None), (), self.codec)
        return checked
