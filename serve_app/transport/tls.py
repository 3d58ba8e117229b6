"""TLS 1.3 between two nodes, each of which must show the one key it is expected to have. No names, no authorities."""

from __future__ import annotations

import os
import ssl

from serve_app.errors import PipelineError
from shard_tools.errors import SignatureError
from shard_tools.signing import PublicKey, tls_anchor, tls_issuer


def tls_context(credentials: bytes, peers: frozenset[PublicKey], *, listens: bool) -> ssl.SSLContext:
    """Shows `credentials` (Signer.certify_tls), and lets in who shows a certificate by one of `peers`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if listens else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a host is known by its key
    context.verify_mode = ssl.CERT_REQUIRED
    if listens:
        context.num_tickets = 0  # every connection is a full handshake, and nothing but rows follows it
    # The ssl module reads keys from files only; this one never reaches a disk.
    fd = os.memfd_create("llmd-tls", os.MFD_CLOEXEC)
    try:
        os.write(fd, credentials)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    for key in peers:
        context.load_verify_locations(cadata=tls_anchor(key))
    return context


def peer_of(connection: ssl.SSLSocket | ssl.SSLObject, peers: frozenset[PublicKey]) -> PublicKey:
    """The node at the other end of a finished handshake. Raises PipelineError if it is none of `peers`."""
    certificate = connection.getpeercert(binary_form=True)
    if certificate is None:
        raise PipelineError("the peer showed no certificate")
    try:
        return tls_issuer(certificate, peers)
    except SignatureError as e:
        raise PipelineError(str(e)) from e
