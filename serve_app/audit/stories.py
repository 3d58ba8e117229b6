"""Remembers what every session has signed lately, so that one that tells two stories shows, whoever heard them.

Statements come as receipts bring them, their signatures unchecked: that they contradict is rare, and is checked then.
So is that a receipt contradicts the statement it names.
"""

from __future__ import annotations

from collections import OrderedDict

from serve_app.receipts.bundle import Bundle
from serve_app.receipts.equivocation import Equivocation
from serve_app.receipts.identity import Certificate
from serve_app.receipts.misquote import Misquote
from serve_app.receipts.statement import STATEMENT_TYPE, StageStatement
from shard_tools.errors import LlmdError
from shard_tools.signing import Envelope, PublicKey

MAX_STORIES_BYTES = 16 << 20  # of statements: those of some 10,000 answers of two stages
_ENTRY_BYTES = 512  # what one takes beside its payload
_MAX_CONVICTED = 4096  # sessions that are remembered, so that each is told of once


class Stories:
    """The latest statements, by session and number; one thread at a time."""

    def __init__(self, max_bytes: int = MAX_STORIES_BYTES) -> None:
        self._max_bytes = max_bytes
        self._by_number: OrderedDict[tuple[PublicKey, int], Envelope] = OrderedDict()
        self._convicted: OrderedDict[PublicKey, None] = OrderedDict()
        self.bytes = 0

    def heard(self, bundle: Bundle) -> list[Equivocation | Misquote]:
        """Take in the statements of a receipt; what they and those before them prove, of each session the first proof.

        Raises LlmdError for nonsense.
        """
        found: list[Equivocation | Misquote] = []
        misquote = Misquote.of(bundle) if bundle.receipt.key not in self._convicted else None
        if misquote is not None and _convicts(misquote):
            found.append(misquote)
            self._convict(bundle.receipt.key)
        certificates = {Certificate.decode(c.payload).session: c for c in bundle.certificates}
        for envelope in bundle.statements:
            certificate = certificates.get(envelope.key)
            if certificate is None or envelope.payload_type != STATEMENT_TYPE or envelope.key in self._convicted:
                continue
            seq = StageStatement.decode(envelope.payload).seq
            proofs = (self._against(certificate, envelope, n) for n in (seq - 1, seq, seq + 1))
            proof = next((p for p in proofs if p is not None), None)
            if proof is None:
                self._remember((envelope.key, seq), envelope)
                continue
            found.append(proof)
            self._convict(envelope.key)
        return found

    def _convict(self, session: PublicKey) -> None:
        self._convicted[session] = None
        if len(self._convicted) > _MAX_CONVICTED:
            self._convicted.popitem(last=False)

    def _against(self, certificate: Envelope, envelope: Envelope, seq: int) -> Equivocation | None:
        """What it proves together with statement number seq of its session, if that is here."""
        known = self._by_number.get((envelope.key, seq))
        proof = None if known is None else Equivocation.of(certificate, known, envelope)
        if known is None or proof is None:
            return None
        if not _convicts(proof):
            # One of them is nobody's word. If it is the one that was here, it must not keep a true one out.
            if not _signed(known):
                self._forget((envelope.key, seq))
            return None
        return proof

    def _remember(self, key: tuple[PublicKey, int], envelope: Envelope) -> None:
        if key in self._by_number:  # the same again, or one that nobody signed and that is not to displace it
            return
        self._by_number[key] = envelope
        self.bytes += len(envelope.payload) + _ENTRY_BYTES
        while self.bytes > self._max_bytes:
            self._forget(next(iter(self._by_number)))

    def _forget(self, key: tuple[PublicKey, int]) -> None:
        gone = self._by_number.pop(key, None)
        if gone is not None:
            self.bytes -= len(gone.payload) + _ENTRY_BYTES


def _convicts(proof: Equivocation | Misquote) -> bool:
    try:
        proof.convicted()
    except LlmdError:
        return False
    return True


def _signed(envelope: Envelope) -> bool:
    try:
        envelope.open(STATEMENT_TYPE, frozenset((envelope.key,)), "its session")
    except LlmdError:
        return False
    return True
