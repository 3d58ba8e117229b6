"""The Head's side of audits: what is set aside for requests that are to be audited, and which answers are drawn.

An answer's receipt is noted here when all stages have signed; the auditor logs the notes and says its log's head; only
then does the draw (draw.py) say which of them are audited and in which stage, so none can know it while it computes.
The secret in it is committed to in an earlier call than the first receipt that it decides about, and told when another
has taken its place. Lives in the Head's event loop and calls nobody; whoever speaks to the auditor takes what is
`outgoing` and brings back what it said. No clock and no I/O of its own.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from serve_app.audit.draw import SECRET_BYTES, draw, secret_commitment
from serve_app.audit.exactness import NOT_FIXED, UNKNOWN, Exactness, exactness
from serve_app.errors import OverloadedError, RequestError
from serve_app.messages.request import GenerationRequest
from shard_tools.canonical import Value
from shard_tools.cid import Cid, Codec

_log = logging.getLogger(__name__)
MAX_WAITING_BYTES = 64 << 20  # of receipts that wait for an auditor
MAX_BATCH = 256  # notes that go out in one call
RETIRE_AFTER = 1024  # notes that one secret decides about
SETTLED_S = 120.0  # after the answer: the 60 s in which a verdict is due, and as many for an auditor that was restarted
_RETRY_S = 5
_LEVEL = "llmd.assurance"


@dataclass(frozen=True, slots=True)
class Terms:
    """What audits of one pipeline cost and may take."""

    rate_micro: int  # of a million answers, how many are audited
    n_stages: int
    page_size: int  # tokens
    row_bytes: int  # of one position, in and out, at the stage where that is most
    retain_bytes: int  # that each stage may keep
    busy_bytes: int  # of them, what the rows of all that may run at once take
    on_request: bool = True  # whether clients may ask for audited answers
    fixed: bool = False  # whether a row's bits depend on nothing beside it, so that they can be asked for
    problem: str | None = None  # why nothing can be audited here at all

    def bytes_of(self, request: GenerationRequest) -> int:
        """What its rows take in a stage, at most."""
        tokens = len(request.prompt_ids) + request.max_tokens
        return -(-tokens // self.page_size) * self.page_size * self.row_bytes

    @property
    def room(self) -> int:
        """Bytes that can be promised to requests."""
        return max(0, self.retain_bytes - self.busy_bytes)


@dataclass(frozen=True, slots=True)
class Note:
    """An answer that was signed for."""

    id: str
    receipt: bytes  # its bundle
    certain: bool  # the client was promised an audit
    commitment: bytes  # to the secret that decides about it; empty: none was committed to yet
    exact: bool = False  # and that the stage is held to its bits

    @property
    def cid(self) -> Cid:
        """Of the bundle."""
        return Cid.of(Codec.DAG_CBOR, self.receipt)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One call to the auditor. commitment: to a new secret, or empty; told: secrets that decide about nothing more."""

    notes: tuple[Note, ...]
    commitment: bytes
    told: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    """This stage of this answer is to be audited."""

    id: str
    receipt: Cid
    stage: int
    certain: bool


@dataclass(slots=True)
class _Promise:
    size: int
    over_s: float | None = None  # when the answer was there


@dataclass(slots=True)
class AuditDesk:
    """Implements pipeline/assurance.py's Audits."""

    terms: Terms
    clock: Callable[[], float]
    problem: str | None = "no auditor has answered yet"  # why nothing is audited now
    exactness: Exactness = UNKNOWN
    watched: frozenset[int] = frozenset()  # stages of which every answer is audited: those of suspects
    drawn: int = 0
    unaudited: int = 0  # answers that no draw decided about: no auditor was there
    _promises: dict[str, _Promise] = field(default_factory=dict)
    _waiting: list[Note] = field(default_factory=list)
    _waiting_bytes: int = 0
    _secrets: dict[bytes, bytes] = field(default_factory=dict)  # commitment -> secret, those that were not told yet
    _current: bytes = b""  # commitment that the auditor has logged, under which answers are noted
    _proposed: bytes = b""  # commitment that it is to log next
    _decided: int = 0
    _wanted_bytes: int = 0  # that each stage is to keep

    def __post_init__(self) -> None:
        self._wanted_bytes = self.terms.retain_bytes
        self._propose()

    def admit(self, request: GenerationRequest, *, resumed: bool) -> None:
        """As Audits. What is resumed was promised before, and is kept to as far as rows are there."""
        if request.assurance == "signed":
            return
        problem = self.terms.problem if self.terms.on_request else "its operator does not offer them (audit.on_request)"
        if problem is not None:
            raise RequestError(f"This pipeline gives no audited answers: {problem}.", _LEVEL)
        if request.assurance == "exact" and not resumed:
            (self.exactness if self.terms.fixed else NOT_FIXED).require()
        size, room = self.terms.bytes_of(request), self.terms.room
        if size > room:
            raise RequestError(
                f"The rows of an audited answer to this need {size} bytes in every stage, and {room} can be promised: "
                f"ask for fewer tokens, or have audit.retain_bytes raised.",
                _LEVEL,
            )
        self._let_go()
        if not resumed:
            if self.problem is not None:
                raise OverloadedError(f"No answer can be audited now: {self.problem}.", _RETRY_S)
            taken = sum(promise.size for promise in self._promises.values())
            if taken + size > room:
                raise OverloadedError(
                    f"{taken} of {room} bytes for rows of audited answers are taken; this one needs {size}.",
                    _RETRY_S,
                )
        self._promises[request.id] = _Promise(size)

    def ended(self, request: GenerationRequest, receipt: bytes) -> None:
        """As Audits."""
        certain = request.assurance != "signed"
        if not receipt:
            self._promises.pop(request.id, None)
            return
        if request.id in self._promises:
            self._promises[request.id].over_s = self.clock()
        if self.terms.problem is not None:
            return
        self._waiting.append(Note(request.id, receipt, certain, self._current, request.assurance == "exact"))
        self._waiting_bytes += len(receipt)
        while self._waiting_bytes > MAX_WAITING_BYTES:
            # An answer that was promised an audit goes last, and the auditor's lookup then says that it had none.
            victim = next((n for n in self._waiting if not n.certain), self._waiting[0])
            self._waiting.remove(victim)
            self._waiting_bytes -= len(victim.receipt)
            self.unaudited += 1

    def outgoing(self) -> Outgoing:
        """What the auditor is to be told next; the same until `said` or `failed`."""
        batch = tuple(self._waiting[:MAX_BATCH])
        needed = {note.commitment for note in self._waiting} | {self._current, self._proposed}
        told = tuple(secret for commitment, secret in self._secrets.items() if commitment not in needed)
        return Outgoing(batch, self._proposed, told)

    def said(self, outgoing: Outgoing, log_head: bytes, settled: Sequence[str]) -> list[Drawn]:
        """The auditor has logged all of that, and its log has this root. Returns what it is to audit.

        settled: answers whose rows it does not need any more.
        """
        self.problem = None
        sent = set(map(id, outgoing.notes))
        self._waiting = [note for note in self._waiting if id(note) not in sent]
        self._waiting_bytes -= sum(len(note.receipt) for note in outgoing.notes)
        for secret in outgoing.told:
            del self._secrets[secret_commitment(secret)]
        if outgoing.commitment:
            self._current, self._proposed, self._decided = outgoing.commitment, b"", 0
        for answer in settled:
            self._promises.pop(answer, None)
        self._let_go()
        chosen = [one for note in outgoing.notes if (one := self._draw(note, log_head)) is not None]
        self.drawn += len(chosen)
        return chosen

    def failed(self, why: str) -> None:
        """The auditor does not answer. Nothing is audited; all else goes on."""
        if self.problem is None:
            _log.error("nothing is audited from now on: %s", why)
        self.problem = why

    def learn(self, stages: Sequence[Value], audits: Mapping[str, Value]) -> None:
        """What stages say of themselves, and which of them every answer is to be audited of."""
        silent = [s["stage"] for s in stages if isinstance(s, dict) and s.get("retains") is False]
        problem = None
        if silent:
            problem = f"stage {silent[0]!r} keeps no rows: its engine cannot, or its own operator gives them no room"
        # One of another operator may keep fewer than was wanted, and what is promised must fit into every stage.
        room = [s["retain_bytes"] for s in stages if isinstance(s, dict) and isinstance(s.get("retain_bytes"), int)]
        kept = min([self._wanted_bytes, *(n for n in room if isinstance(n, int))])
        self.terms = replace(self.terms, problem=problem, retain_bytes=kept)
        self.exactness = exactness(stages, audits)
        watched = audits.get("watched")
        self.watched = frozenset(i for i in watched if isinstance(i, int)) if isinstance(watched, list) else frozenset()

    def status(self) -> dict[str, Value]:
        """For people."""
        return {
            "problem": self.terms.problem or self.problem,
            "rate_micro": self.terms.rate_micro,
            "on_request": self.terms.on_request,
            "exact": self.terms.fixed and self.exactness == Exactness(None),
            "promised_bytes": sum(promise.size for promise in self._promises.values()),
            "room_bytes": self.terms.room,
            "drawn": self.drawn,
            "unaudited": self.unaudited,
            "waiting": len(self._waiting),
            "watched": list(sorted(self.watched)),
        }

    def _draw(self, note: Note, log_head: bytes) -> Drawn | None:
        # A promise that a new Head took over may be kept by a secret that came late: better than no audit.
        commitment = note.commitment or (self._current if note.certain else b"")
        if not commitment:
            self.unaudited += 1
            return None
        self._decided += 1
        if self._decided >= RETIRE_AFTER and not self._proposed:
            self._propose()
        value = draw(note.cid, self._secrets[commitment], commitment, log_head)
        if note.certain or value.audits(self.terms.rate_micro):
            return Drawn(note.id, note.cid, value.stage(self.terms.n_stages), note.certain)
        stages = sorted(stage for stage in self.watched if stage < self.terms.n_stages)
        if not stages:
            return None
        return Drawn(note.id, note.cid, stages[value.stage(len(stages))], False)

    def _propose(self) -> None:
        secret = secrets.token_bytes(SECRET_BYTES)
        self._proposed = secret_commitment(secret)
        self._secrets[self._proposed] = secret

    def _let_go(self) -> None:
        """Of promises whose time is over."""
        now = self.clock()
        late = [a for a, p in self._promises.items() if p.over_s is not None and now - p.over_s > SETTLED_S]
        for answer in late:
            del self._promises[answer]
