"""What an auditor keeps: the log of receipts and verdicts, the answers it may be asked about, what it found of each.

Receipts lie in memory, the latest of them; the log and every verdict lie on disk. Fetching rows is another's business:
`judge` takes what a stage showed. Knows neither Ray nor HTTP.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.audit.desk import Drawn, Note
from serve_app.audit.draw import secret_commitment
from serve_app.audit.showing import Shown
from serve_app.audit.verdict import Verdict
from serve_app.errors import ReceiptError
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.check import CheckedReceipt, check
from serve_app.receipts.log_file import LogFile
from serve_app.receipts.receipt import Receipt
from serve_app.receipts.statement import StageStatement, envelope_cid
from shard_tools import canonical
from shard_tools.canonical import Value
from shard_tools.cid import Cid, Codec
from shard_tools.errors import InputError, LlmdError
from shard_tools.signing import Envelope, PublicKey, Signer, key_text

if TYPE_CHECKING:  # it brings torch along, of which only who replays has any use
    from serve_app.audit.auditor import Auditor

_log = logging.getLogger(__name__)
MAX_KEPT_BYTES = 64 << 20  # of receipts: those of some 10,000 answers
MAX_NEWS = 4096
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class News:
    """What came of one audit, for whoever keeps standings. verdict: sealed and encoded; empty: there is none."""

    number: int
    node: PublicKey
    stage: int
    verdict: bytes
    why: str
    refused: bool  # the stage was bound to have the rows, and did not show them


@dataclass(slots=True)
class _Case:
    note: Note
    root: bytes  # of the log when the receipt was in it
    state: str = "not drawn"
    why: str = ""
    stage: int | None = None
    verdict: Verdict | None = None
    envelope: Envelope | None = None


class AuditOffice:
    """One auditor's. `judge` may run in another thread than the rest, one call at a time."""

    def __init__(self, folder: Path, signer: Signer, operator: PublicKey, auditor: Callable[[], Auditor]) -> None:
        """auditor: made when the first rows are judged. Raises InputError, ReceiptError for a folder of no use."""
        self._folder, self._signer, self._operator, self._make = folder, signer, operator, auditor
        self._log = LogFile(folder, signer)
        self._auditor: Auditor | None = None
        self._cases: OrderedDict[str, _Case] = OrderedDict()  # by the id that the client knows
        self._kept_bytes = 0
        self._secrets: dict[bytes, bytes] = {}  # commitment -> secret, once told
        self._numbers = int(time.time_ns() // 1000)  # of news; an office that is opened anew goes on above
        self.news: list[News] = []
        self.settled: list[str] = []  # answers whose rows are not needed any more, since they were asked for
        self.judged = 0
        self._lock = threading.Lock()  # on the log

    def note(self, notes: Sequence[Note], commitment: bytes, told: Sequence[bytes]) -> bytes:
        """All of it is in the log, whose root is returned. Raises InputError if the log cannot be kept."""
        entries = [note.cid for note in notes]
        if commitment:
            entries.insert(0, Cid.of(Codec.RAW, commitment))
        self._secrets.update({secret_commitment(secret): secret for secret in told})
        with self._lock:
            if entries or self._log.sealed is None:
                self._append(entries)
            root = self._log.log.root()
        for note in notes:
            self._keep(_Case(note, root))
        return root

    def begin(self, drawn: Drawn) -> StageStatement:
        """The statement that is to be audited, of a receipt that verifies. Raises ReceiptError."""
        case = self._case(drawn)
        case.state, case.stage = "waiting", drawn.stage
        try:
            checked = check(Bundle.decode(case.note.receipt), self._operator, now_s=int(time.time()))
        except LlmdError as e:
            case.state, case.why = "unaudited", f"its receipt does not verify: {e}"
            raise ReceiptError(case.why) from e
        return checked.statements[drawn.stage]

    def judge(self, drawn: Drawn, shown: bytes) -> None:
        """What the stage showed is compared with what its layers give; the verdict is signed, logged and news."""
        case = self._case(drawn)
        bundle = Bundle.decode(case.note.receipt)
        checked = check(bundle, self._operator, now_s=int(time.time()))
        statement, envelope = checked.statements[drawn.stage], bundle.statements[drawn.stage]
        try:
            opened = Shown.open(shown, statement, checked.registry, int(time.time()))
        except LlmdError as e:
            self.gave_nothing(drawn, statement.node, f"what was shown is not its rows: {e}", refused=True)
            return
        try:
            if self._auditor is None:
                self._auditor = self._make()
            exactly = checked.receipt.assurance == "exact"
            now_ms = time.time_ns() // 1_000_000
            found = self._auditor.audit(envelope, opened.record, opened.node, now_ms, exactly=exactly)
        except LlmdError as e:
            self.gave_nothing(drawn, statement.node, str(e), refused=False)
            return
        sealed = canonical.encode(found.envelope.to_value())
        if found.verdict.finding == "forged":
            self._keep_proof(envelope_cid(found.envelope), checked, shown)
        self._save(sealed)
        with self._lock:
            self._append([envelope_cid(found.envelope)])
        case.state, case.verdict, case.envelope = found.verdict.finding, found.verdict, found.envelope
        self.judged += 1
        self._tell(drawn, opened.node, sealed, "", refused=False)

    def gave_nothing(self, drawn: Drawn, node: PublicKey, why: str, *, refused: bool) -> None:
        """There is no verdict, and why. refused: the stage was bound to show the rows."""
        case = self._case(drawn)
        case.state, case.why = "unaudited", why
        _log.warning("stage %d of %s is not audited: %s", drawn.stage, drawn.id, why)
        self._tell(drawn, node, b"", why, refused=refused)

    def lookup(self, id: str) -> dict[str, Value] | None:
        """All that is known of an answer, as GET /v1/receipts/{id} shows it; None if its receipt is not here."""
        case = self._cases.get(id)
        if case is None:
            return None
        with self._lock:
            proofs = self._proofs(case)
        return {
            "id": id,
            "receipt": case.note.receipt,
            "assurance": Receipt.decode(Bundle.decode(case.note.receipt).receipt.payload).assurance,
            "audit": {
                "state": case.state,
                "why": case.why,
                "stage": case.stage,
                "verdict": _verdict_value(case),
                "auditor": key_text(self._signer.public),
                "independent": False,  # it is the operator's, as the stages are
                "log_root": case.root,
                "commitment": case.note.commitment,
                "secret": self._secrets.get(case.note.commitment),
            },
            "log": proofs,
        }

    def status(self) -> dict[str, Value]:
        """For people."""
        return {
            "log_entries": len(self._log.log),
            "receipts": len(self._cases),
            "judged": self.judged,
            "waiting": sum(case.state == "waiting" for case in self._cases.values()),
        }

    def close(self) -> None:
        """The log is left as it is."""
        self._log.close()

    def _case(self, drawn: Drawn) -> _Case:
        case = self._cases.get(client_id(drawn.id))
        if case is None or case.note.cid != drawn.receipt:
            raise ReceiptError(f"the receipt of {drawn.id} is not here any more")
        return case

    def _keep(self, case: _Case) -> None:
        key = client_id(case.note.id)
        before = self._cases.pop(key, None)
        self._kept_bytes += len(case.note.receipt) - (len(before.note.receipt) if before else 0)
        self._cases[key] = case
        while self._kept_bytes > MAX_KEPT_BYTES and len(self._cases) > 1:
            _, old = self._cases.popitem(last=False)
            self._kept_bytes -= len(old.note.receipt)

    def _append(self, entries: Sequence[Cid]) -> None:
        try:
            self._log.append(entries, time.time_ns() // 1_000_000)
        except InputError:
            # What a full disk left half-written is cut off before anything is written behind it.
            self._log.close()
            self._log = LogFile(self._folder, self._signer)
            raise

    def _save(self, sealed: bytes) -> None:
        with (self._folder / "verdicts").open("ab") as f:
            f.write(_LENGTH.pack(len(sealed)) + sealed)

    def _keep_proof(self, verdict: Cid, checked: CheckedReceipt, shown: bytes) -> None:
        folder = self._folder / "forged"
        folder.mkdir(exist_ok=True)
        (folder / f"{verdict}.shown").write_bytes(shown)
        (folder / f"{verdict}.receipt").write_text(f"{checked.cid}\n")

    def _tell(self, drawn: Drawn, node: PublicKey, verdict: bytes, why: str, *, refused: bool) -> None:
        self._numbers += 1
        self.news.append(News(self._numbers, node, drawn.stage, verdict, why, refused))
        del self.news[:-MAX_NEWS]
        self.settled.append(drawn.id)

    def _proofs(self, case: _Case) -> Value:
        sealed = self._log.sealed
        index = self._log.index.get(bytes(case.note.cid))
        if sealed is None or index is None:
            return None
        return {
            "head": canonical.encode(sealed.to_value()),
            "size": len(self._log.log),
            "receipt": self._proof(case.note.cid),
            "verdict": None if case.envelope is None else self._proof(envelope_cid(case.envelope)),
        }

    def _proof(self, cid: Cid) -> Value:
        index = self._log.index.get(bytes(cid))
        return None if index is None else {"index": index, "path": list(self._log.log.inclusion(index))}


def client_id(id: str) -> str:
    """The id under which the client knows the answer: an ingress that turns to another Head adds to it."""
    return id.partition("~")[0]


def _verdict_value(case: _Case) -> Value:
    v = case.verdict
    if v is None or case.envelope is None:
        return None
    return {
        "finding": v.finding,
        "stage": v.stage,
        "node": key_text(v.node),
        "p_pico": v.p_pico,
        "window": [v.first, v.tokens],
        "error_pico": v.error_pico,
        "limit_pico": v.limit_pico,
        "rows": v.rows,
        "calibration": None if v.calibration is None else str(v.calibration),
        "at_ms": v.at_ms,
        "signed": canonical.encode(case.envelope.to_value()),
    }
