"""Who may sign: nodes known to the operator, and the sessions they vouch for.

    operator --registry--> node key --certificate--> session key --> statements and receipts

A node key lives in a 0600 file of its host and signs only certificates. An actor signs with a session key that
never leaves its memory, ends soon, and is good for one role in one epoch of a pipeline. Standing belongs to
the node key. Time is passed in. Law: `Registry.open(registry.seal(op), op.public, t) == registry`, while it is
valid at t. Bytes: PROTOCOL.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from serve_app.errors import ReceiptError
from shard_tools import canonical
from shard_tools.canonical import Fields
from shard_tools.signing import KEY_BYTES, Envelope, PublicKey, Signer, key_text

Role = Literal["stage", "head"]
_ROLES = ("stage", "head")

REGISTRY_TYPE = "application/vnd.llmd.registry.v1+dag-cbor"
CERTIFICATE_TYPE = "application/vnd.llmd.certificate.v1+dag-cbor"

CLOCK_SKEW_S = 300  # a host's clock may lag the one that signed by this much; expiry is never stretched
MAX_NODES = 1024
MAX_REGISTRY_BYTES = 256 << 10  # 1024 nodes of 32 bytes of key and 100 of name, with room to spare
MAX_CERTIFICATE_BYTES = 1 << 10
MAX_TIME = 1 << 53  # of seconds or milliseconds: exact in any JSON reader
MAX_EPOCH = 1 << 48
_MAX_NAME = 100  # characters


@dataclass(frozen=True, slots=True)
class RegisteredNode:
    """One host the operator answers for."""

    key: PublicKey
    name: str


@dataclass(frozen=True, slots=True)
class Registry:
    """The nodes an operator answers for, from issued_at until expires_at (seconds since 1970)."""

    version: int  # grows with every change, so that an old list cannot pass for the new one
    issued_at: int
    expires_at: int
    nodes: tuple[RegisteredNode, ...]  # sorted by key, each key once

    def __post_init__(self) -> None:
        keys = [node.key for node in self.nodes]
        if keys != sorted(set(keys)):
            raise ReceiptError("registry: its nodes are not sorted by key, or one is there twice")
        if not self.issued_at < self.expires_at:
            raise ReceiptError(f"registry: it expires at {self.expires_at}, before it begins at {self.issued_at}")

    @classmethod
    def of(cls, nodes: Iterable[RegisteredNode], version: int, issued_at: int, lifetime_s: int) -> Registry:
        """A registry of these nodes, in whatever order they come."""
        return cls(version, issued_at, issued_at + lifetime_s, tuple(sorted(nodes, key=lambda node: node.key)))

    def name_of(self, key: PublicKey) -> str | None:
        """What the operator calls the node of this key, or None if it is not listed."""
        return next((node.name for node in self.nodes if node.key == key), None)

    def seal(self, operator: Signer) -> Envelope:
        """The registry as the operator signs it."""
        payload = canonical.encode(
            {
                "v": 1,
                "version": self.version,
                "issued_at": self.issued_at,
                "expires_at": self.expires_at,
                "nodes": [{"key": node.key, "name": node.name} for node in self.nodes],
            }
        )
        return Envelope.seal(operator, REGISTRY_TYPE, payload)

    @classmethod
    def open(cls, envelope: Envelope, operators: PublicKey | frozenset[PublicKey], now_s: int) -> Registry:
        """The registry, signed by an operator and valid at now_s.

        Raises SignatureError, FormatError; ReceiptError if it has expired or not begun.
        """
        trusted = operators if isinstance(operators, frozenset) else frozenset((operators,))
        payload = envelope.open(REGISTRY_TYPE, trusted, "the operator")
        with Fields(canonical.decode(payload, max_bytes=MAX_REGISTRY_BYTES), "registry") as f:
            f.integer("v", 1, 1)
            version = f.integer("version", 0, MAX_TIME)
            issued_at, expires_at = f.integer("issued_at", 0, MAX_TIME), f.integer("expires_at", 0, MAX_TIME)
            nodes = []
            for item in f.items("nodes", MAX_NODES):
                with Fields(item, "registry.nodes") as n:
                    nodes.append(
                        RegisteredNode(PublicKey(n.data("key", KEY_BYTES, KEY_BYTES)), n.text("name", _MAX_NAME))
                    )
        registry = cls(version, issued_at, expires_at, tuple(nodes))
        _require_valid("registry", issued_at, expires_at, now_s, "Ask the operator for a new one.")
        return registry


@dataclass(frozen=True, slots=True)
class Certificate:
    """A node's word that a session key acts for it, in one role, for one epoch, for a while (seconds)."""

    node: PublicKey
    session: PublicKey
    role: Role
    epoch: int
    not_before: int
    not_after: int
    nonce: bytes  # 16 random bytes: no two certificates are the same

    def seal(self, node: Signer) -> Envelope:
        """The certificate as the node signs it."""
        payload = canonical.encode(
            {
                "v": 1,
                "node": self.node,
                "session": self.session,
                "role": self.role,
                "epoch": self.epoch,
                "not_before": self.not_before,
                "not_after": self.not_after,
                "nonce": self.nonce,
            }
        )
        return Envelope.seal(node, CERTIFICATE_TYPE, payload)

    @classmethod
    def open(cls, envelope: Envelope, registry: Registry, role: Role, now_s: int) -> Certificate:
        """The certificate, signed by a registered node for this role and valid at now_s.

        Raises SignatureError, FormatError; ReceiptError if the node is unknown, or role or time do not fit.
        """
        if registry.name_of(envelope.key) is None:
            raise ReceiptError(
                f"certificate: node {key_text(envelope.key)} is not in registry version {registry.version}. "
                f"Only the operator can add it."
            )
        payload = envelope.open(CERTIFICATE_TYPE, frozenset((envelope.key,)), "a registered node")
        certificate = cls.decode(payload)
        if certificate.node != envelope.key:
            raise ReceiptError(
                f"certificate: it speaks for {key_text(certificate.node)} and is signed by {key_text(envelope.key)}"
            )
        if certificate.role != role:
            raise ReceiptError(f"certificate: it is for the role {certificate.role}, and was used as {role}")
        _require_valid("session", certificate.not_before, certificate.not_after, now_s, "Its node must open another.")
        return certificate

    @classmethod
    def decode(cls, payload: bytes) -> Certificate:
        """Read a payload without asking who signed it; `open` asks. Raises FormatError, ReceiptError."""
        with Fields(canonical.decode(payload, max_bytes=MAX_CERTIFICATE_BYTES), "certificate") as f:
            f.integer("v", 1, 1)
            role = f.text("role", 10)
            if role not in _ROLES:
                raise ReceiptError(f"certificate: unknown role {role!r}")
            return cls(
                PublicKey(f.data("node", KEY_BYTES, KEY_BYTES)),
                PublicKey(f.data("session", KEY_BYTES, KEY_BYTES)),
                cast(Role, role),
                f.integer("epoch", 0, MAX_EPOCH),
                f.integer("not_before", 0, MAX_TIME),
                f.integer("not_after", 0, MAX_TIME),
                f.data("nonce", 16, 16),
            )


class Session:
    """A session key in memory, and the certificate that says whose it is."""

    def __init__(self, signer: Signer, certificate: Certificate, envelope: Envelope) -> None:
        self._signer = signer
        self.terms = certificate
        self.certificate = envelope

    @property
    def key(self) -> PublicKey:
        return self._signer.public

    @property
    def node(self) -> PublicKey:
        return self.terms.node

    @property
    def epoch(self) -> int:
        return self.terms.epoch

    def seal(self, payload_type: str, payload: bytes) -> Envelope:
        """The payload signed with the session key."""
        return Envelope.seal(self._signer, payload_type, payload)


class NodeIdentity:
    """A node's long-lived key; it signs certificates, of sessions and of TLS keys, and nothing else."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer

    @classmethod
    def load_or_create(cls, path: Path) -> NodeIdentity:
        """The identity in this 0600 file, made there if absent. Raises InputError."""
        return cls(Signer.load_or_create(path))

    @property
    def key(self) -> PublicKey:
        return self._signer.public

    def open_session(self, role: Role, epoch: int, now_s: int, lifetime_s: int) -> Session:
        """A fresh session key, certified from now_s for lifetime_s seconds."""
        signer = Signer.fresh()
        terms = Certificate(self.key, signer.public, role, epoch, now_s, now_s + lifetime_s, secrets.token_bytes(16))
        return Session(signer, terms, terms.seal(self._signer))

    def certify_tls(self, now_s: int, lifetime_s: int) -> bytes:
        """A fresh TLS key with the node's certificate for it, as PEM."""
        return self._signer.certify_tls(now_s, lifetime_s)


def first_expiry(certificates: Iterable[Envelope], registry: Envelope, now_s: int) -> int:
    """Unix time after which a receipt resting on all of these is refused. Raises as Registry.open does."""
    ends = [Certificate.decode(envelope.payload).not_after for envelope in certificates]
    return min(Registry.open(registry, registry.key, now_s).expires_at, *ends)


def _require_valid(what: str, start: int, stop: int, now_s: int, advice: str) -> None:
    if now_s >= stop:
        raise ReceiptError(f"{what}: expired at {stop}, and it is used at {now_s} (seconds since 1970). {advice}")
    if now_s < start - CLOCK_SKEW_S:
        raise ReceiptError(f"{what}: begins at {start}, and it is used at {now_s} (seconds since 1970). {advice}")
