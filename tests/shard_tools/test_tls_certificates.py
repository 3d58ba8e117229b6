"""Certificates by which a node key vouches for a TLS key. Handshakes with them: contracts/test_edge.py."""

from __future__ import annotations

import ssl

import pytest

from shard_tools.errors import SignatureError
from shard_tools.signing import PublicKey, Signer, key_text, tls_issuer

NODE, OTHER = Signer.from_seed(bytes(32)), Signer.from_seed(b"\1" * 32)


def certificate(signer: Signer) -> bytes:
    pem = signer.certify_tls(1_700_000_000, 3600).decode()
    return ssl.PEM_cert_to_DER_cert(pem[: pem.index("-----BEGIN PRIVATE KEY")])


def test_the_key_that_made_a_certificate_is_found_among_the_trusted() -> None:
    assert tls_issuer(certificate(NODE), frozenset((NODE.public, OTHER.public))) == NODE.public


def test_a_certificate_by_a_key_that_is_not_trusted_is_refused() -> None:
    with pytest.raises(SignatureError, match="not expected here"):
        tls_issuer(certificate(NODE), frozenset((OTHER.public,)))


def test_a_certificate_that_names_another_issuer_is_refused() -> None:
    """The name alone is nobody's word."""
    forged = certificate(OTHER).replace(OTHER.public.hex().encode(), NODE.public.hex().encode())
    with pytest.raises(SignatureError, match=f"is not by {key_text(NODE.public)}"):
        tls_issuer(forged, frozenset((NODE.public,)))


def test_every_certificate_is_for_a_fresh_key_and_holds_no_private_key_of_the_node() -> None:
    assert NODE.certify_tls(1_700_000_000, 60) != NODE.certify_tls(1_700_000_000, 60)


@pytest.mark.parametrize("data", [b"", b"x" * 300, bytes(40)])
def test_what_is_no_certificate_is_refused(data: bytes) -> None:
    with pytest.raises(SignatureError, match="cannot be read"):
        tls_issuer(data, frozenset((PublicKey(NODE.public),)))
