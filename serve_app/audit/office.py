"""What an auditor keeps: the log of receipts and verdicts, the answers it may be asked about, what it found of each.

Receipts lie in memory, the latest of them; the log, every verdict and what was found of the latest answers lie on disk.
Fetching rows is another's business: `judge` takes what a stage showed. Knows neither Ray nor HTTP.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.audit.answer_file import AnswerFile, append_whole
from serve_app.audit.case import WAITING, Case, Look, client_id, verdict_value
from serve_app.audit.desk import Drawn, Note
from serve_app.audit.draw import secret_commitment
from serve_app.audit.showing import Shown
from serve_app.audit.stories import Stories
from serve_app.audit.verdict import Verdict
from serve_app.errors import ForgedRecordError, ReceiptError
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.check import CheckedReceipt, check
from serve_app.receipts.identity import Registry
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
    from serve_app.audit.redraw import Redrawer

_log = logging.getLogger(__name__)
MAX_KEPT_BYTES = 64 << 20  # of receipts and what was found: of some 10,000 answers
MAX_ANSWERS_BYTES = 8 << 20  # of what was found, on disk, twice: of some 4,000 answers each
_CASE_BYTES = 4 << 10  # that a case takes in memory, beside its receipt
MAX_NEWS = 4096
MAX_DESKS = 256  # of Heads that are gone, some lists are never asked for
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class News:
    """What came of rows that a stage was to show, for whoever keeps standings.

    verdict: of either kind, sealed and encoded; empty: there is none. proof: what convicts the node by its
    own signatures, encoded (receipts/misquote.py); such news has nothing to do with rows, nor its stage any meaning.
    """

    number: int
    node: PublicKey
    stage: int
    verdict: bytes
    why: str
    refused: bool  # the stage was bound to have the rows, and did not show them
    proof: bytes = b""


class AuditOffice:
    """One auditor's. `judge` may run in another thread than the rest, one call at a time."""

    def __init__(
        self,
        folder: Path,
        signer: Signer,
        operator: PublicKey,
        auditor: Callable[[], Auditor],
        redrawer: Callable[[], Redrawer],
    ) -> None:
        """auditor, redrawer: made when the first rows are judged.

        Raises InputError, ReceiptError for a folder of no use.
        """
        self._folder, self._signer, self._operator = folder, signer, operator
        self._auditor, self._redrawer = cache(auditor), cache(redrawer)
        self._log = LogFile(folder, signer)
        self._answers = AnswerFile(folder, signer.public, MAX_ANSWERS_BYTES)
        self._cases: OrderedDict[str, Case] = OrderedDict()  # by the id that the client knows
        self._kept_bytes = 0
        self._secrets = {secret_commitment(secret): secret for secret in self._answers.secrets()}  # once told
        self._numbers = int(time.time_ns() // 1000)  # of news; an office that is opened anew goes on above
        self.news: list[News] = []
        self._settled: OrderedDict[str, list[str]] = OrderedDict()  # by desk, since it asked last
        self._judged = self._redrawn = self._samplers = 0
        self._last_sampler: str | None = None  # the answer
        self._stories = Stories()
        self._convicted = 0
        self._lock = threading.Lock()  # on the log
        for case in self._answers.cases():
            self._keep(case)
            if case.draws.state in ("sampler", "unequal"):  # as loud as before
                self._samplers, self._last_sampler = self._samplers + 1, case.client_id

    def note(self, notes: Sequence[Note], commitment: bytes, told: Sequence[bytes], desk: str = "") -> bytes:
        """All of it is in the log, whose root is returned. Raises InputError if the log cannot be kept.

        desk: of which Head; each of several pipelines has one.
        """
        entries = [note.cid for note in notes]
        if commitment:
            entries.insert(0, Cid.of(Codec.RAW, commitment))
        self._secrets.update({secret_commitment(secret): secret for secret in told})
        self._answers.tell(told)
        with self._lock:
            if entries or self._log.sealed is None:
                self._append(entries)
            root = self._log.log.root()
        for note in notes:
            self._keep(Case.of(note, root, desk))
            self._listen(note)
        return root

    def settled(self, desk: str) -> list[str]:
        """Of what it noted, those answers whose rows are not needed any more. Each is said once."""
        return self._settled.pop(desk, [])

    def begin(self, drawn: Drawn) -> tuple[StageStatement, ...]:
        """The statements whose rows are wanted, of a receipt that verifies: the drawn stage's, and the last stage's.


        From the last one's the tokens are drawn again, of every answer that is drawn. None, if it has begun already: a
        Head asks again where it was not answered. Raises ReceiptError.
        """
        case = self._case(drawn)
        if case.stage is not None:
            return ()
        case.stage, case.layers, case.draws = drawn.stage, WAITING, WAITING
        try:
            checked = check(Bundle.decode(case.receipt), self._operator, now_s=int(time.time()))
            last = len(checked.statements) - 1
            if not 0 <= drawn.stage <= last:
                raise ReceiptError(f"it has {last + 1} stages, and stage {drawn.stage} was drawn")
        except LlmdError as e:
            why = f"its receipt does not verify: {e}"
            case.give_up(why, layers=True, draws=True)
            raise ReceiptError(why) from e
        case.awaited = {drawn.stage, last}
        return tuple(checked.statements[i] for i in sorted(case.awaited))

    def judge(self, drawn: Drawn, stage: int, shown: bytes) -> None:
        """The rows that this stage showed are looked at: what comes of it is signed, logged and news."""
        case = self._case(drawn)
        bundle = Bundle.decode(case.receipt)
        checked = check(bundle, self._operator, now_s=int(time.time()))
        statement, envelope = checked.statements[stage], bundle.statements[stage]
        try:
            opened = Shown.open(shown, statement, checked.registry, int(time.time()))
        except LlmdError as e:
            self.gave_nothing(drawn, statement, f"what was shown is not its rows: {e}", refused=True)
            return
        if stage == drawn.stage:
            self._compute_again(case, checked, envelope, opened, shown)
        if stage == len(checked.statements) - 1:
            self._draw_again(case, checked, envelope, opened, shown)
        self._looked_at(case, stage)

    def gave_nothing(self, drawn: Drawn, said: StageStatement, why: str, *, refused: bool) -> None:
        """There is no verdict of this stage's rows, and why. refused: it was bound to show them."""
        case = self._case(drawn)
        if said.stage not in case.awaited:
            return
        _log.warning("stage %d of %s is not audited: %s", said.stage, drawn.id, why)
        case.give_up(why, layers=said.stage == drawn.stage, draws=said.stage == said.n_stages - 1)
        self._tell(said.node, said.stage, b"", why, refused=refused)
        self._looked_at(case, said.stage)

    def lookup(self, id: str) -> dict[str, Value] | None:
        """All that is known of an answer, as GET /v1/receipts/{id} shows it; None if its receipt is not here."""
        case = self._cases.get(id)
        if case is None:
            return None
        with self._lock:
            proofs = self._proofs(case)
        return {
            "id": id,
            "receipt": case.receipt or None,  # the auditor was started anew: the client has its own
            "receipt_cid": str(case.cid),
            "assurance": "exact" if case.exact else "audited" if case.certain else "signed",
            "audit": {
                "state": case.layers.state,
                "why": case.layers.why,
                "stage": case.stage,
                "verdict": verdict_value(case.layers.verdict),
                "draws": {
                    "state": case.draws.state,
                    "why": case.draws.why,
                    "verdict": verdict_value(case.draws.verdict),
                },
                "auditor": key_text(self._signer.public),
                "independent": False,  # it is the operator's, as the stages are
                "log_root": case.root,
                "commitment": case.commitment,
                "secret": self._secrets.get(case.commitment),
            },
            "log": proofs,
        }

    def prove(self, entries: Sequence[Cid]) -> dict[str, Value]:
        """Where these stand in the log, with proofs, under its head: what is not there has none."""
        with self._lock:
            sealed = self._log.sealed
            head = b"" if sealed is None else canonical.encode(sealed.to_value())
            return {"head": head, "size": len(self._log.log), "proofs": [self._proof(cid) for cid in entries]}

    def status(self) -> dict[str, Value]:
        """For people. samplers: answers whose tokens are not what their rows and their sampling give.

        convicted: sessions whose signatures contradict each other.
        """
        return {
            "log_entries": len(self._log.log),
            "receipts": len(self._cases),
            "judged": self._judged,
            "redrawn": self._redrawn,
            "samplers": self._samplers,
            "last_sampler": self._last_sampler,
            "convicted": self._convicted,
            "waiting": sum(bool(case.awaited) for case in list(self._cases.values())),
        }

    def close(self) -> None:
        """The log is left as it is."""
        self._log.close()

    def _listen(self, note: Note) -> None:
        """Whether a receipt contradicts itself or an earlier one. What proves it is kept, and news."""
        try:
            bundle = Bundle.decode(note.receipt)
            proofs = self._stories.heard(bundle)
            if not proofs:
                return
            issued_ms = Receipt.decode(bundle.receipt.payload).issued_ms
            names = Registry.open(bundle.registry, self._operator, issued_ms // 1000)
        except LlmdError as e:
            _log.warning("the receipt of %s says nothing of its sessions: %s", note.id, e)
            return
        for proof in proofs:
            node = proof.convicted()
            if names.name_of(node) is None:
                continue
            _log.error("node %s: %s: %s", key_text(node), proof.what, proof.cid)
            try:
                folder = self._folder / "proofs"
                folder.mkdir(exist_ok=True)
                (folder / str(proof.cid)).write_bytes(proof.encode())
            except OSError as e:  # who keeps standings is told all the same
                _log.error("the proof cannot be kept: %s", e)
            with self._lock:
                self._append([proof.cid])
            self._convicted += 1
            self._tell(node, 0, b"", proof.what, refused=False, proof=proof.encode())

    def _compute_again(
        self, case: Case, checked: CheckedReceipt, envelope: Envelope, opened: Shown, shown: bytes
    ) -> None:
        try:
            exactly = checked.receipt.assurance == "exact"
            found = self._auditor().audit(envelope, opened.record, opened.node, _now_ms(), exactly=exactly)
        except LlmdError as e:
            _log.warning("a stage of %s is not audited: %s", case.id, e)
            case.give_up(str(e), layers=True, draws=False)
            return
        if found.verdict.finding == "forged":
            self._keep_proof(envelope_cid(found.envelope), checked, shown)
        case.layers = self._publish(found.envelope, found.verdict.finding, opened.node, found.verdict.stage)
        self._judged += 1

    def _draw_again(self, case: Case, checked: CheckedReceipt, envelope: Envelope, opened: Shown, shown: bytes) -> None:
        said = checked.statements[-1]
        try:
            found = self._redrawer().audit(checked, opened.record, _now_ms())
        except ForgedRecordError as e:
            if case.layers.state == "forged" and case.stage == said.stage:
                case.draws = Look("forged", str(e), case.layers.verdict)  # these very rows were judged already
                return
            forged = Verdict.without(
                "forged",
                statement=envelope_cid(envelope),
                said=said,
                node=opened.node,
                auditor=self._signer.public,
                at_ms=_now_ms(),
            ).seal(self._signer)
            self._keep_proof(envelope_cid(forged), checked, shown)
            case.draws = self._publish(forged, "forged", opened.node, said.stage, str(e))
            return
        except LlmdError as e:
            _log.warning("%s is not drawn again: %s", case.id, e)
            case.give_up(str(e), layers=False, draws=True)
            return
        case.draws = self._publish(found.envelope, found.verdict.finding, opened.node, said.stage)
        self._redrawn += 1
        if found.verdict.accuses:
            self._samplers, self._last_sampler = self._samplers + 1, case.client_id
            _log.error("the tokens of %s, drawn again: %s", case.id, found.verdict.summary)

    def _publish(self, sealed: Envelope, finding: str, node: PublicKey, stage: int, why: str = "") -> Look:
        encoded = canonical.encode(sealed.to_value())
        self._save(encoded)
        with self._lock:
            self._append([envelope_cid(sealed)])
        self._tell(node, stage, encoded, why, refused=False)
        return Look(finding, why, sealed)

    def _looked_at(self, case: Case, stage: int) -> None:
        case.awaited.discard(stage)
        if not case.awaited:
            # A new list: `settled` may be asked meanwhile, in another thread, and then says some twice and loses none.
            self._settled[case.desk] = [*self._settled.get(case.desk, ()), case.id][-MAX_NEWS:]
            while len(self._settled) > MAX_DESKS:
                self._settled.popitem(last=False)
            self._answers.add(case)

    def _tell(
        self, node: PublicKey, stage: int, verdict: bytes, why: str, *, refused: bool, proof: bytes = b""
    ) -> None:
        with self._lock:
            self._numbers += 1
            self.news.append(News(self._numbers, node, stage, verdict, why, refused, proof))
            del self.news[:-MAX_NEWS]

    def _case(self, drawn: Drawn) -> Case:
        case = self._cases.get(client_id(drawn.id))
        if case is None or case.cid != drawn.receipt or not case.receipt:
            raise ReceiptError(f"the receipt of {drawn.id} is not here any more")
        return case

    def _keep(self, case: Case) -> None:
        before = self._cases.pop(case.client_id, None)
        self._kept_bytes += _size(case) - (_size(before) if before else 0)
        self._cases[case.client_id] = case
        while self._kept_bytes > MAX_KEPT_BYTES and len(self._cases) > 1:
            _, old = self._cases.popitem(last=False)
            self._kept_bytes -= _size(old)

    def _append(self, entries: Sequence[Cid]) -> None:
        try:
            self._log.append(entries, time.time_ns() // 1_000_000)
        except InputError:
            # What a full disk left half-written is cut off before anything is written behind it.
            self._log.close()
            self._log = LogFile(self._folder, self._signer)
            raise

    def _save(self, sealed: bytes) -> None:
        path = self._folder / "verdicts"
        try:
            append_whole(path, _LENGTH.pack(len(sealed)) + sealed)
        except OSError as e:
            raise InputError(f"cannot keep the verdict in {path}: {e.strerror}. Make room on its disk") from e

    def _keep_proof(self, verdict: Cid, checked: CheckedReceipt, shown: bytes) -> None:
        folder = self._folder / "forged"
        folder.mkdir(exist_ok=True)
        (folder / f"{verdict}.shown").write_bytes(shown)
        (folder / f"{verdict}.receipt").write_text(f"{checked.cid}\n")

    def _proofs(self, case: Case) -> Value:
        sealed = self._log.sealed
        index = self._log.index.get(bytes(case.cid))
        if sealed is None or index is None:
            return None
        return {
            "head": canonical.encode(sealed.to_value()),
            "size": len(self._log.log),
            "receipt": self._proof(case.cid),
            "verdict": self._proof_of(case.layers.verdict),
            "draws": self._proof_of(case.draws.verdict),
        }

    def _proof_of(self, verdict: Envelope | None) -> Value:
        return None if verdict is None else self._proof(envelope_cid(verdict))

    def _proof(self, cid: Cid) -> Value:
        index = self._log.index.get(bytes(cid))
        return None if index is None else {"index": index, "path": list(self._log.log.inclusion(index))}


def _size(case: Case) -> int:
    return len(case.receipt) + _CASE_BYTES


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
