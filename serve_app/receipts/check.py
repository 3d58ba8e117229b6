"""The client's check of an answer: offline, with the operator's public key and nothing else.

What holds after `check` returned: a Head and stages that the operator answers for signed, for this very request,
that these tokens came of it, and that the stages, which cover every layer once, saw the same bytes at every
boundary between them. What does not: that the computation was right (PROTOCOL.md, "What is not proved").
Needs no torch, Ray, transformers or numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from serve_app.errors import ReceiptError
from serve_app.messages.request import Assurance, Sampling
from serve_app.receipts.bundle import Bundle, Opening
from serve_app.receipts.chain import require_whole
from serve_app.receipts.identity import CLOCK_SKEW_S, Certificate, Registry, Role
from serve_app.receipts.receipt import Receipt
from serve_app.receipts.statement import STATEMENT_TYPE, StageStatement, envelope_cid
from shard_tools.cid import Cid, Codec
from shard_tools.errors import LlmdError
from shard_tools.manifest import Manifest
from shard_tools.signing import Envelope, PublicKey


@dataclass(frozen=True, slots=True)
class Expected:
    """What the client knows of its own request and wants to hold. None: it has no opinion."""

    manifest: Cid | None = None
    prompt_ids: tuple[int, ...] | None = None
    out_ids: tuple[int, ...] | None = None
    client_nonce: bytes | None = None
    sampling: Sampling | None = None
    max_tokens: int | None = None
    max_age_s: int | None = None  # of the receipt
    min_registry_version: int = 0  # the newest the client has seen: a registry never goes back
    assurance: Assurance | None = None


@dataclass(frozen=True, slots=True)
class CheckedReceipt:
    """A receipt that passed; only `check` makes one."""

    receipt: Receipt
    statements: tuple[StageStatement, ...]
    opening: Opening
    registry: Registry
    operator: PublicKey
    head_name: str  # as the operator's registry calls the nodes
    stage_names: tuple[str, ...]
    cid: Cid  # of the whole bundle, as in the x-llmd-receipt header


def check(
    bundle: bytes | Bundle,
    operator: PublicKey | frozenset[PublicKey],
    *,
    now_s: int,
    request: Expected | None = None,
) -> CheckedReceipt:
    """The receipt, once everything about it that can be checked offline was.

    operator: the key, or keys, the client trusts. Raises ReceiptError naming the part at fault.
    """
    with _part("bundle"):
        data = bundle if isinstance(bundle, bytes) else bundle.encode()
        parsed = Bundle.decode(data)
    with _part("receipt"):
        # Read before its signature is checked, for the time at which the keys must have been valid.
        receipt = Receipt.decode(parsed.receipt.payload)
    issued_s = receipt.issued_ms // 1000
    if issued_s > now_s + CLOCK_SKEW_S:
        raise ReceiptError(f"receipt.issued_ms: {receipt.issued_ms} lies in the future of {now_s} s. Check the clock")
    with _part("registry"):
        registry = Registry.open(parsed.registry, operator, issued_s)
    sessions = _Sessions(parsed.certificates, registry, issued_s)
    head = sessions.open(parsed.receipt, receipt.payload_type, "head", "receipt")
    if (receipt.node, receipt.epoch) != (head.node, head.epoch):
        raise ReceiptError("receipt: its node or epoch is not that of the session which signed it")
    if receipt.statements != tuple(envelope_cid(envelope) for envelope in parsed.statements):
        raise ReceiptError("receipt.statements: they are not the statements that came with it, in this order")
    statements, nodes = [], []
    for i, envelope in enumerate(parsed.statements):
        terms = sessions.open(envelope, STATEMENT_TYPE, "stage", f"statement {i}")
        with _part(f"statement {i}"):
            statement = StageStatement.decode(envelope.payload)
        if (statement.node, statement.epoch) != (terms.node, terms.epoch):
            raise ReceiptError(f"statement {i}: its node or epoch is not that of the session which signed it")
        statements.append(statement)
        nodes.append(terms.node)
    sessions.require_all_used()
    _require_one_story(parsed.statements, statements)
    require_whole(receipt, statements, parsed.opening)
    checked = CheckedReceipt(
        receipt=receipt,
        statements=tuple(statements),
        opening=parsed.opening,
        registry=registry,
        operator=parsed.registry.key,
        head_name=registry.name_of(head.node) or "",
        stage_names=tuple(registry.name_of(node) or "" for node in nodes),
        cid=Cid.of(Codec.DAG_CBOR, data),
    )
    if request is not None:
        require_expected(checked, request, now_s)
    return checked


def check_against_manifest(checked: CheckedReceipt, manifest: Manifest) -> None:
    """Returns if the stages cover this model's layers, and name the shards that hold them.

    Raises ReceiptError naming the stage at fault.
    """
    if manifest.cid != checked.receipt.manifest:
        raise ReceiptError(f"receipt.manifest: it is {checked.receipt.manifest}, this manifest is {manifest.cid}")
    last = checked.statements[-1]
    if last.stop != manifest.n_layers:
        raise ReceiptError(
            f"statement {last.stage}: the stages end at layer {last.stop}, the model has {manifest.n_layers}"
        )
    for s in checked.statements:
        units = manifest.units_of(s.start, s.stop)
        needed = {manifest.shards[ref.shard].cid for unit in units for ref in unit.tensors}
        if set(s.shards) != needed or len(s.shards) != len(needed):
            raise ReceiptError(
                f"statement {s.stage}: it loaded {len(s.shards)} shards, which are not the {len(needed)} "
                f"of layers [{s.start}, {s.stop}) of this model"
            )
    wrong = next((t for t in checked.receipt.out_ids if t >= manifest.vocab_size), None)
    if wrong is not None:
        raise ReceiptError(f"receipt.out_ids: {wrong} is no token of a vocabulary of {manifest.vocab_size}")


def require_expected(checked: CheckedReceipt, request: Expected, now_s: int) -> None:
    """Returns if the receipt is what the client expects. Raises ReceiptError naming what differs."""
    receipt, opening = checked.receipt, checked.opening
    for name, wanted, got in (
        ("receipt.manifest", request.manifest, receipt.manifest),
        ("opening.nonce", request.client_nonce, opening.client_nonce),
        ("opening.prompt_ids", request.prompt_ids, opening.prompt_ids),
        ("receipt.sampling", request.sampling, receipt.sampling),
        ("receipt.max", request.max_tokens, receipt.max_tokens),
        ("receipt.out_ids", request.out_ids, receipt.out_ids),
        ("receipt.assurance", request.assurance, receipt.assurance),
    ):
        if wanted is not None and wanted != got:
            raise ReceiptError(f"{name}: this receipt belongs to another request: {_said(got)} is not {_said(wanted)}")
    if checked.registry.version < request.min_registry_version:
        raise ReceiptError(
            f"registry: version {checked.registry.version}, where {request.min_registry_version} was seen before"
        )
    age_s = now_s - receipt.issued_ms // 1000
    if request.max_age_s is not None and age_s > request.max_age_s:
        raise ReceiptError(f"receipt.issued_ms: {age_s} s ago, where at most {request.max_age_s} are accepted")


class _Sessions:
    """The certificates of a bundle, each opened for the role in which its session first signs."""

    def __init__(self, certificates: Sequence[Envelope], registry: Registry, issued_s: int) -> None:
        payloads = [envelope.payload for envelope in certificates]
        if payloads != sorted(set(payloads)):
            raise ReceiptError("certificates: they are not sorted, or one is there twice")
        self._by_session: dict[PublicKey, Envelope] = {}
        for i, envelope in enumerate(certificates):
            with _part(f"certificate {i}"):
                session = Certificate.decode(envelope.payload).session
            if session in self._by_session:
                raise ReceiptError(f"certificate {i}: its session has two certificates")
            self._by_session[session] = envelope
        self._registry, self._issued_s = registry, issued_s
        self._opened: dict[tuple[PublicKey, Role], Certificate] = {}

    def open(self, signed: Envelope, payload_type: str, role: Role, what: str) -> Certificate:
        """The terms of the session that signed, once its certificate and its signature were verified."""
        certificate = self._by_session.get(signed.key)
        if certificate is None:
            raise ReceiptError(f"{what}: no certificate came for the session that signed it")
        with _part(what):
            terms = self._opened.get((signed.key, role))
            if terms is None:
                terms = Certificate.open(certificate, self._registry, role, self._issued_s)
                self._opened[signed.key, role] = terms
            signed.open(payload_type, frozenset((terms.session,)), "the certified session")
        return terms

    def require_all_used(self) -> None:
        """Raises ReceiptError if a certificate came that nothing rests on."""
        if len(self._opened) != len(self._by_session):
            raise ReceiptError("certificates: one came that signed nothing here")


def _require_one_story(envelopes: Sequence[Envelope], statements: Sequence[StageStatement]) -> None:
    seen: set[tuple[PublicKey, int]] = set()
    for i, (envelope, statement) in enumerate(zip(envelopes, statements, strict=True)):
        if (envelope.key, statement.seq) in seen:
            raise ReceiptError(f"statement {i}: its session signed two statements as number {statement.seq}")
        seen.add((envelope.key, statement.seq))


def _said(value: object) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= 100 else text[:97] + "..."


@contextmanager
def _part(name: str) -> Iterator[None]:
    """Whatever is refused inside is refused as a ReceiptError that names this part."""
    try:
        yield
    except LlmdError as e:
        message = str(e)
        raise ReceiptError(message if message.startswith(name) else f"{name}: {message}") from e
