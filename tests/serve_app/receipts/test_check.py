"""An honest bundle passes the client's check, and nothing else does."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import ReceiptError
from serve_app.messages.request import Sampling
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.check import Expected, check
from serve_app.receipts.identity import NodeIdentity
from serve_app.receipts.receipt import RECEIPT_TYPE, Receipt
from serve_app.receipts.statement import StageStatement, envelope_cid
from shard_tools import canonical
from shard_tools.cid import Cid, Codec
from shard_tools.signing import Envelope, PublicKey, Signer
from tests.serve_app.receipts.pipeline_of_three import MANIFEST, NONCE, NOW_S, OUT_IDS, SPANS, Cluster, a_request

Statements = list[StageStatement]

CLUSTER = Cluster()
HONEST = CLUSTER.bundle()
DATA = HONEST.encode()
OPERATOR = CLUSTER.operator.public
LATER_S = NOW_S + 60


def resign(bundle: Bundle, cluster: Cluster = CLUSTER, **changes: Any) -> Bundle:
    """The bundle with a receipt that a lying Head changed and signed again, properly."""
    changes.setdefault("statements", tuple(envelope_cid(envelope) for envelope in bundle.statements))
    receipt = replace(Receipt.decode(bundle.receipt.payload), **changes)
    return replace(bundle, receipt=cluster.head.seal(receipt.payload_type, receipt.encode()))


def with_statements(change: Callable[[Statements], Statements]) -> Bundle:
    """The bundle with statements that lying stages signed, properly, and a Head that went along."""
    said = change([StageStatement.decode(envelope.payload) for envelope in HONEST.statements])
    signed = tuple(s.sign(CLUSTER.stages[s.stage % len(SPANS)]) for s in said)
    return resign(replace(HONEST, statements=signed))


def changed(stage: int, **changes: Any) -> Callable[[Statements], Statements]:
    """Statements of which one differs."""
    return lambda said: [replace(s, **changes) if s.stage == stage else s for s in said]


def refused(bundle: Bundle | bytes, match: str | None, operator: PublicKey = OPERATOR, **arguments: Any) -> None:
    with pytest.raises(ReceiptError, match=match):
        check(bundle, operator, **({"now_s": LATER_S} | arguments))


def test_an_honest_bundle_passes_and_says_who_did_what() -> None:
    """check(issue(...)) returns the tokens, the nodes' names and the spans; years later too."""
    expected = Expected(MANIFEST, (5, 6, 7, 8), OUT_IDS, NONCE, Sampling(top_k=20), 16, 3600, 7)
    checked = check(DATA, OPERATOR, now_s=LATER_S, request=expected)
    assert checked.receipt.out_ids == OUT_IDS
    assert (checked.head_name, checked.stage_names) == ("host-0", ("host-0", "host-1", "host-2"))
    assert [(s.start, s.stop) for s in checked.statements] == list(SPANS)
    assert checked.receipt.freshness == "client-nonce"
    assert check(HONEST, OPERATOR, now_s=NOW_S + 10**9) == check(DATA, OPERATOR, now_s=LATER_S)


def test_bundle_forms_round_trip() -> None:
    """decode(encode(b)) == b and from_text(to_text(b)) == b."""
    assert Bundle.decode(DATA) == HONEST
    assert Bundle.from_text(HONEST.to_text() + "\n") == HONEST


@settings(max_examples=1500, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_any_flipped_byte_is_refused(position: int, mask: int) -> None:
    """No byte of a bundle can be changed: each is signed, or opens something that is."""
    data = bytearray(DATA)
    data[position] ^= mask
    refused(bytes(data), None)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cut_grown_or_spliced_bytes_are_refused(data: st.DataObject) -> None:
    """Bytes taken out, put in or moved are refused, never a crash of another kind."""
    start = data.draw(st.integers(0, len(DATA)))
    stop = data.draw(st.integers(start, min(len(DATA), start + 200)))
    middle = data.draw(st.binary(max_size=40))
    spliced = DATA[:start] + middle + DATA[stop:]
    if spliced != DATA:
        refused(spliced, None)


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    """Any bytes at all give ReceiptError."""
    refused(data, "bundle")


def test_a_bundle_signed_wholly_with_fresh_keys_is_refused() -> None:
    """Everything may be consistent: the operator is not the one the client trusts."""
    other = Cluster(seed=b"somebody else")
    assert check(other.bundle(), other.operator.public, now_s=LATER_S)
    refused(other.bundle(), "registry.*not the operator")


def test_nodes_the_registry_does_not_list_are_refused() -> None:
    """A revoked stage or head: absent from the registry that came with the receipt."""
    refused(replace(HONEST, registry=CLUSTER.seal_registry([0, 1])), "statement 2.*not in registry")
    refused(replace(HONEST, registry=CLUSTER.seal_registry([1, 2])), "receipt.*not in registry")


def test_a_node_cannot_certify_for_another() -> None:
    """A certificate that names a listed node and is signed by an outsider, or by another listed node."""
    for signer in (Signer.from_seed(bytes(32)), CLUSTER.nodes[1]._signer):
        forged = CLUSTER.stages[2].terms.seal(signer)
        certificates = [e for e in HONEST.certificates if e.payload != forged.payload] + [forged]
        bundle = replace(HONEST, certificates=tuple(sorted(certificates, key=lambda e: e.payload)))
        refused(bundle, "statement 2: certificate: (node .* is not in registry|it speaks for)")


def test_roles_are_kept_apart() -> None:
    """A stage's session cannot sign receipts, nor a head's session statements."""
    payload = HONEST.receipt.payload
    refused(replace(HONEST, receipt=CLUSTER.stages[0].seal(RECEIPT_TYPE, payload)), "role stage.*used as head")
    statement = StageStatement.decode(HONEST.statements[0].payload)
    signed = (statement.sign(CLUSTER.head), *HONEST.statements[1:])
    refused(resign(replace(HONEST, statements=signed)), "role head.*used as stage")


def test_keys_must_be_valid_when_the_receipt_is_issued() -> None:
    """An expired registry, an expired session, a clock turned back, a receipt from the future."""
    refused(CLUSTER.bundle(now_ms=(NOW_S + 90_000) * 1000), "registry: expired", now_s=NOW_S + 90_001)
    refused(CLUSTER.bundle(now_ms=(NOW_S + 3_600) * 1000), "session: expired", now_s=NOW_S + 3_700)
    refused(resign(HONEST, issued_ms=(NOW_S - 1000) * 1000), "registry: begins")
    refused(CLUSTER.bundle(now_ms=(NOW_S + 2000) * 1000), "future")
    late = Cluster(registry_lifetime_s=10**6, session_lifetime_s=10**6)
    bundle = late.bundle()
    old = late.session(1, "stage", NOW_S - 2 * 10**6)
    signed = StageStatement.decode(bundle.statements[1].payload).sign(old)
    certificates = {e.payload: e for e in (*bundle.certificates, old.certificate)}
    del certificates[late.stages[1].certificate.payload]
    bundle = replace(
        bundle,
        statements=(bundle.statements[0], signed, bundle.statements[2]),
        certificates=tuple(certificates[payload] for payload in sorted(certificates)),
    )
    refused(resign(bundle, late), "statement 1: session: expired", late.operator.public)


@pytest.mark.parametrize(
    ("expected", "match"),
    [
        (Expected(client_nonce=bytes(32)), "opening.nonce: this receipt belongs to another request"),
        (Expected(prompt_ids=(5, 6, 7)), "opening.prompt_ids: this receipt belongs to another"),
        (Expected(out_ids=(40, 41)), "receipt.out_ids"),
        (Expected(manifest=Cid.of(Codec.DAG_CBOR, b"other")), "receipt.manifest"),
        (Expected(sampling=Sampling(top_k=21)), "receipt.sampling"),
        (Expected(max_tokens=17), "receipt.max"),
        (Expected(min_registry_version=8), "registry: version 7"),
        (Expected(max_age_s=10), "receipt.issued_ms"),
    ],
)
def test_a_receipt_of_another_request_is_refused(expected: Expected, match: str) -> None:
    """An honest receipt proves nothing to a client who asked something else."""
    refused(HONEST, match, request=expected)


def test_a_receipt_cannot_be_opened_as_another_request() -> None:
    """A changed system prompt, an inserted token, another nonce or salt, with the Head's help."""
    opening = HONEST.opening
    refused(replace(HONEST, opening=replace(opening, prompt_ids=(5, 6, 7, 9))), "receipt.request")
    refused(replace(HONEST, opening=replace(opening, prompt_ids=(5, 6, 7, 8, 9))), "receipt.n_prompt")
    refused(resign(replace(HONEST, opening=replace(opening, client_nonce=b""))), "receipt.request")
    refused(replace(HONEST, opening=replace(opening, salt=bytes(32))), "receipt.request")
    for bundle in (
        resign(HONEST, sampling=Sampling()),
        resign(HONEST, max_tokens=17),
        resign(HONEST, stop_ids=(2, 3)),
    ):
        refused(bundle, "receipt.request")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"out_ids": (40, 41, 3)}, "receipt.out_root"),
        ({"out_ids": (41, 40, 2)}, "receipt.out_root"),
        ({"out_ids": (40, 41)}, "receipt.out_root"),
        ({"out_ids": ()}, "receipt.out_ids: 0 tokens"),
        ({"out_ids": (40, 2, 41)}, "go on after token 2"),
        ({"finish_reason": "length"}, "'length' after 3 tokens"),
        ({"freshness": "none"}, "receipt.freshness"),
        ({"n_prompt": 5}, "receipt.n_prompt"),
        ({"attempt": 1}, "statement 0: its attempt"),
        ({"epoch": 5}, "receipt: its node or epoch"),
        ({"node": CLUSTER.nodes[1].key}, "receipt: its node or epoch"),
        ({"statements": ()}, "receipt.statements"),
        ({"manifest": Cid.of(Codec.DAG_CBOR, b"other")}, "receipt.request"),
        ({"manifest": Cid.of(Codec.RAW, b"other")}, "receipt: manifest: .* a manifest is dag_cbor"),
    ],
)
def test_a_lying_head_is_refused(changes: dict[str, Any], match: str) -> None:
    """The Head signs its lie properly; what the client or the stages bound contradicts it."""
    refused(resign(HONEST, **changes), match)


def test_a_lying_head_cannot_edit_the_answer_even_with_its_root() -> None:
    """All but the last token are stage 0's input, so its signed root contradicts an edited answer."""
    from serve_app.receipts.rows import ids_root

    for out_ids in ((40, 43, 2), (41, 40, 2)):
        root = ids_root(MANIFEST, out_ids, 4)
        refused(resign(HONEST, out_ids=out_ids, out_root=root), "statement 0: its in_root")
    refused(resign(HONEST, out_ids=(40, 41), out_root=ids_root(MANIFEST, (40, 41), 4)), "statement 0: it covers 6 rows")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (changed(1, out_root=bytes(32)), "statement 2: its in_root"),
        (changed(1, in_root=bytes(32)), "statement 1: its in_root"),
        (changed(0, in_root=bytes(32)), "statement 0: its in_root"),
        (changed(1, n_rows=5), "statement 1: it covers 5 rows"),
        (changed(2, start=4), "statement 2: it covers layers"),
        (changed(0, start=1), "statement 0: it covers layers"),
        (changed(2, stop=5), "statement 2: it covers layers"),
        (changed(1, request_hash=bytes(32)), "statement 1: its request"),
        (changed(1, attempt=1), "statement 1: its attempt"),
        (changed(1, manifest=Cid.of(Codec.DAG_CBOR, b"other")), "statement 1: its manifest"),
        (changed(1, manifest=Cid.of(Codec.RAW, b"other")), "statement 1: manifest: .* a manifest is dag_cbor"),
        (changed(1, epoch=3), "statement 1: its node or epoch"),
        (changed(1, node=CLUSTER.nodes[0].key), "statement 1: its node or epoch"),
        (changed(1, ended_ms=NOW_S * 1000), "statement 1: from"),
        (changed(1, ended_ms=NOW_S * 1000 + 10**6), "statement 1: from"),
        (lambda said: said[:2], "statement 0: it is of stage 0 of 3"),
        (lambda said: [said[0], said[2]], "it is of stage 0 of 3"),
        (lambda said: [said[1], said[0], said[2]], "it is of stage 1 of 3, where 0 of 3"),
        (lambda said: [said[0], said[1], said[1], said[2]], "signed two statements"),
        (lambda said: [said[0], said[1], replace(said[1], seq=9), said[2]], "it is of stage 0 of 3, where 0 of 4"),
    ],
)
def test_statements_that_do_not_fit_are_refused(change: Callable[[Statements], Statements], match: str) -> None:
    """Chain, tiling, counts, slot: each lie signed by the stage itself and covered by the Head."""
    bundle = with_statements(change)
    used = {envelope.key for envelope in (bundle.receipt, *bundle.statements)}
    sessions = {s.certificate.payload: s.key for s in (CLUSTER.head, *CLUSTER.stages)}
    kept = tuple(e for e in bundle.certificates if sessions[e.payload] in used)
    refused(replace(bundle, certificates=kept), match)


def test_statements_of_another_receipt_are_refused() -> None:
    """Splicing in a statement of another request, or swapping two envelopes, contradicts receipt.statements."""
    other = Cluster().bundle(a_request(prompt_ids=(5, 6, 7, 9)))
    spliced = (HONEST.statements[0], other.statements[1], HONEST.statements[2])
    refused(replace(HONEST, statements=spliced), "receipt.statements")
    refused(replace(HONEST, statements=HONEST.statements[::-1]), "receipt.statements")


def test_certificates_are_exactly_those_needed() -> None:
    """None missing, none besides, none twice, in one order: a bundle has one form."""
    certificates = HONEST.certificates
    refused(replace(HONEST, certificates=certificates[::-1]), "certificates: they are not sorted")
    refused(replace(HONEST, certificates=certificates + certificates[-1:]), "certificates: they are not sorted")
    refused(replace(HONEST, certificates=certificates[:-1]), "no certificate came|certified")
    extra = sorted((*certificates, CLUSTER.session(1, "stage").certificate), key=lambda e: e.payload)
    refused(replace(HONEST, certificates=tuple(extra)), "signed nothing here")


@pytest.mark.parametrize(
    "payload",
    [
        b"\xa2\x61v\x01\x61v\x01",  # a key twice
        HONEST.receipt.payload + b"\0",  # trailing byte
        b"\xbf" + HONEST.receipt.payload[1:] + b"\xff",  # indefinite length
        b"\xfb" + bytes(8),  # a float
        b"\x81" * 5000 + b"\x80",  # a depth bomb
        b"\x5b" + b"\xff" * 8,  # a length of 2**64 - 1
    ],
)
def test_payloads_in_another_form_are_refused_though_signed(payload: bytes) -> None:
    """One meaning, one spelling: a valid signature over other bytes helps nobody."""
    refused(replace(HONEST, receipt=CLUSTER.head.seal(RECEIPT_TYPE, payload)), "receipt: ")


def test_a_signature_is_good_for_one_type_only() -> None:
    """The same payload under another type is another message; its signature does not carry over."""
    envelope = HONEST.statements[0]
    other = Envelope(RECEIPT_TYPE, envelope.payload, envelope.key, envelope.signature)
    refused(resign(replace(HONEST, statements=(other, *HONEST.statements[1:]))), "statement 0: expected")


def test_a_signature_with_a_shifted_scalar_is_refused() -> None:
    """Ed25519's S + L is the same point; RFC 8032 5.1.7 refuses it, so no second envelope exists."""
    order = 2**252 + 27742317777372353535851937790883648493
    signature = HONEST.receipt.signature
    shifted = int.from_bytes(signature[32:], "little") + order
    forged = replace(HONEST.receipt, signature=signature[:32] + shifted.to_bytes(32, "little"))
    refused(replace(HONEST, receipt=forged), "receipt: the signature")


def test_oversize_is_refused_before_it_is_read() -> None:
    """17 MiB of zeros: the size is looked at first."""
    refused(bytes(17 << 20), "at most")


VALUES: st.SearchStrategy[canonical.Value] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.text(max_size=9)
    | st.binary(max_size=40)
    | st.builds(Cid, st.sampled_from(Codec), st.binary(min_size=32, max_size=32)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_whatever_a_session_signs_is_judged(data: st.DataObject) -> None:
    """A head or a stage may sign any value in any field: the answer is a refusal, never another error."""
    whose = data.draw(st.sampled_from([HONEST.receipt, *HONEST.statements]))
    said = canonical.decode(whose.payload, max_bytes=1 << 20)
    assert isinstance(said, dict)
    field = data.draw(st.sampled_from(sorted(said)))
    lie = said | {field: data.draw(VALUES)}
    if lie == said:
        return
    if whose is HONEST.receipt:
        refused(replace(HONEST, receipt=CLUSTER.head.seal(RECEIPT_TYPE, canonical.encode(lie))), None)
        return
    i = HONEST.statements.index(whose)
    signed = list(HONEST.statements)
    signed[i] = CLUSTER.stages[i].seal(whose.payload_type, canonical.encode(lie))
    bundle = resign(replace(HONEST, statements=tuple(signed)))
    try:
        check(bundle, OPERATOR, now_s=LATER_S)
    except ReceiptError:
        return
    assert field in {"profile", "shards", "out_root", "started_ms", "ended_ms", "seq", "prev", "stop"}, field


@pytest.mark.parametrize(
    "bomb",
    [b"\x81" * (1 << 17) + b"\x80", b"\xa1\x61a" * (1 << 16) + b"\x80", b"\x9a\x00\x10\x00\x00" + bytes(1 << 20)],
    ids=["deep list", "deep map", "wide list"],
)
def test_bombs_are_refused(bomb: bytes) -> None:
    """100 thousand levels or a million items, alone or in the place of an envelope."""
    refused(bomb, "bundle")
    value = canonical.decode(DATA, max_bytes=1 << 20)
    assert isinstance(value, dict)
    marker = b"marker of 17 byte"
    nested = canonical.encode(value | {"receipt": marker})
    refused(nested.replace(canonical.encode(marker), bomb), "bundle")


def test_unknown_fields_are_refused() -> None:
    """A field this version does not know could mean that something is not checked."""
    value = canonical.decode(DATA, max_bytes=1 << 20)
    assert isinstance(value, dict)
    refused(canonical.encode(value | {"assurance": "exact"}), "unknown field 'assurance'")


def test_issue_refuses_what_the_client_would() -> None:
    """The Head signs nothing that its stages' statements do not carry."""
    for alter, match in (
        (changed(1, out_root=bytes(32)), "statement 2: its in_root"),
        (changed(1, n_rows=7), "statement 1: it covers 7 rows"),
        (lambda said: said[:2], "stage 0 of 3"),
    ):
        with pytest.raises(ReceiptError, match=match):
            Cluster().bundle(alter=alter)
    outsider = NodeIdentity(Signer.from_seed(bytes(32))).open_session("stage", 4, NOW_S, 60)
    cluster = Cluster()
    signed = [s.sign(outsider) for s in cluster.statements(a_request())]
    with pytest.raises(ReceiptError, match=r"statement 0.*not a certified session"):
        cluster.bundle(statements=signed)


def test_one_stage_and_one_token_make_a_receipt() -> None:
    """Boundaries exist with one stage too: token ids in, rows for the final norm out."""
    cluster = Cluster(spans=((0, 6),))
    bundle = cluster.bundle(a_request(client_nonce=b"", max_tokens=1), (9,), finish_reason="length")
    checked = check(bundle, cluster.operator.public, now_s=LATER_S)
    assert (checked.statements[0].n_rows, checked.receipt.freshness) == (4, "none")
    seeded = cluster.bundle(a_request(client_nonce=b"", sampling=Sampling(seed=-1)))
    assert check(seeded, cluster.operator.public, now_s=LATER_S).receipt.freshness == "seed"


def test_a_session_chains_its_statements() -> None:
    """seq counts up from 0 and prev is the hash of the payload before."""
    cluster = Cluster()
    first, second = (cluster.bundle().statements[1] for _ in range(2))
    said = StageStatement.decode(second.payload)
    assert (said.seq, said.prev) == (1, hashlib.sha256(first.payload).digest())
    assert StageStatement.decode(first.payload).prev == bytes(32)


def test_the_check_needs_no_heavy_package(tmp_path: Path) -> None:
    """A client with cryptography and cbor2 alone can run it."""
    bundle = tmp_path / "bundle"
    bundle.write_bytes(DATA)
    program = (
        "import sys, pathlib\n"
        "from serve_app.receipts.check import check\n"
        f"data, operator = pathlib.Path({str(bundle)!r}).read_bytes(), bytes.fromhex({OPERATOR.hex()!r})\n"
        f"checked = check(data, operator, now_s={LATER_S})\n"
        "assert len(checked.statements) == 3\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'tokenizers', 'fastapi', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
