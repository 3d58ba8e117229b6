"""What a client is shown when two stages disagree, and what anybody reads out of it."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.cli import app
from serve_app.receipts.evidence import Evidence, shown_in, transit_proof
from serve_app.receipts.transit import decide
from shard_tools import canonical
from shard_tools.errors import FormatError
from shard_tools.signing import key_text
from tests.serve_app.receipts.test_transit import CLUSTER, RECEIVER, SEQ, note, opened, part, receiver, sender

BLAME = decide(SEQ, sender(), receiver(b"f" * 32, opened(note(part()))))
assert BLAME is not None and BLAME.proof is not None
PROOF = BLAME.proof.encode()


def test_it_reads_as_it_was_written() -> None:
    for shown in (
        Evidence(bytes(32), "why"),
        Evidence(bytes(32), "why", b"shown"),
        Evidence(bytes(32), "", b"", PROOF),
    ):
        assert Evidence.decode(shown.encode()) == shown
    with pytest.raises(FormatError, match="unknown field"):
        value = canonical.decode(Evidence(bytes(32), "why").encode(), max_bytes=1000)
        assert isinstance(value, dict)
        Evidence.decode(canonical.encode(value | {"more": 1}))


def test_a_proof_is_checked_out_of_what_the_client_got(tmp_path: Path) -> None:
    """By itself, in the envelope, and as the text of `llmd.evidence`; with nothing else, an error says so."""
    sealed = Evidence(bytes(32), "why", b"", PROOF).seal(CLUSTER.head)
    text = base64.urlsafe_b64encode(sealed).rstrip(b"=")
    file = tmp_path / "shown"
    for data in (PROOF, sealed, text, text + b"\n"):
        assert transit_proof(shown_in(data)) == BLAME.proof
        file.write_bytes(data)
        shown = CliRunner().invoke(app, ["audit", "proof", str(file)])
        assert shown.exit_code == 0, shown.output
        assert key_text(RECEIVER.node) in shown.output and "claims rows" in shown.output
    file.write_bytes(Evidence(bytes(32), "stage 1 refuses").seal(CLUSTER.head))
    shown = CliRunner().invoke(app, ["audit", "proof", str(file)])
    assert shown.exit_code == 1 and "only the Head's word: stage 1 refuses" in shown.output
    for junk in (b"", b"junk", PROOF[:-1], sealed[1:], canonical.encode(CLUSTER.registry.to_value())):
        file.write_bytes(junk)
        assert CliRunner().invoke(app, ["audit", "proof", str(file)]).exit_code == 1
