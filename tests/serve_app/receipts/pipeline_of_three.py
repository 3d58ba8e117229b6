"""A whole honest exchange between three stages, a Head and a client, with real keys, small enough to take apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from serve_app.messages.request import GenerationRequest, RequestId, Sampling
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.commitment import request_hash, sampling_key
from serve_app.receipts.drawn import Drawn, asked_hash
from serve_app.receipts.identity import NodeIdentity, RegisteredNode, Registry, Session
from serve_app.receipts.issue import issue
from serve_app.receipts.rows import Boundary, RowTree, ids_root
from serve_app.receipts.statement import StageStatement, StatementChain
from shard_tools.cid import Cid, Codec
from shard_tools.signing import Envelope, Signer

NOW_S = 1_790_000_000
MANIFEST = Cid.of(Codec.DAG_CBOR, b"a model of six layers")
SPANS = ((0, 2), (2, 5), (5, 6))
NONCE = hashlib.sha256(b"client").digest()
SALT = hashlib.sha256(b"salt").digest()
NODE_NONCE = hashlib.sha256(b"node").digest()
OUT_IDS = (40, 41, 2)


def a_request(**changes: Any) -> GenerationRequest:
    """A request that ends at token 2, with a nonce of the client."""
    request = GenerationRequest(
        RequestId("r1"), MANIFEST, (5, 6, 7, 8), 16, Sampling(top_k=20), (2,), client_nonce=NONCE, salt=SALT
    )
    return replace(request, **changes)


@dataclass
class Cluster:
    """Operator, nodes and open sessions. Operator and node keys come from a seed, session keys are fresh."""

    seed: bytes = b"cluster"
    spans: Sequence[tuple[int, int]] = SPANS
    epoch: int = 4
    now_s: int = NOW_S
    registry_lifetime_s: int = 86_400
    session_lifetime_s: int = 3_600
    version: int = 7
    shards_of: Callable[[int, int], tuple[Cid, ...]] = lambda start, stop: tuple(
        Cid.of(Codec.DAG_PB, b"layer %d" % layer) for layer in range(start, stop)
    )
    nodes: list[NodeIdentity] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.operator = self._signer("operator")
        self.nodes = [NodeIdentity(self._signer(f"node{i}")) for i in range(len(self.spans))]
        self.registry = self.seal_registry(range(len(self.nodes)))
        self.head = self.session(0, "head")
        self.stages = [self.session(i, "stage") for i in range(len(self.nodes))]
        self.chains = [StatementChain(session) for session in self.stages]

    def _signer(self, name: str) -> Signer:
        return Signer.from_seed(hashlib.sha256(self.seed + name.encode()).digest())

    def session(self, node: int, role: Any, now_s: int | None = None) -> Session:
        return self.nodes[node].open_session(role, self.epoch, now_s or self.now_s, self.session_lifetime_s)

    def seal_registry(self, listed: Sequence[int]) -> Envelope:
        nodes = [RegisteredNode(self.nodes[i].key, f"host-{i}") for i in listed]
        return Registry.of(nodes, self.version, self.now_s, self.registry_lifetime_s).seal(self.operator)

    def statements(self, request: GenerationRequest, out_ids: Sequence[int] = OUT_IDS) -> list[StageStatement]:
        """What honest stages say: hidden rows of 8 values, the same on both sides of each boundary."""
        fed = request.prompt_ids + tuple(out_ids[:-1])
        roots = [ids_root(request.manifest, fed)]
        for _, stop in self.spans:
            tree = RowTree(Boundary(request.manifest, stop, "float32", 8))
            for position, token in enumerate(fed):
                tree.append(position, hashlib.sha256(b"%d %d" % (stop, token)).digest())
            roots.append(tree.root())
        prompt, key = request.prompt_ids, sampling_key(request, NODE_NONCE)
        drawn = Drawn(
            len(prompt),
            ids_root(request.manifest, out_ids, len(prompt)),
            asked_hash(request.manifest, key, request.sampling, prompt, len(prompt)),
        )
        return [
            StageStatement(
                request_hash=request_hash(request),
                attempt=0,
                stage=i,
                n_stages=len(self.spans),
                start=start,
                stop=stop,
                manifest=request.manifest,
                shards=self.shards_of(start, stop),
                profile="cpu float32",
                in_root=roots[i],
                out_root=roots[i + 1],
                n_rows=len(fed),
                started_ms=self.now_s * 1000 + 100,
                ended_ms=self.now_s * 1000 + 900,
                drawn=drawn if i == len(self.spans) - 1 else None,
            )
            for i, (start, stop) in enumerate(self.spans)
        ]

    def bundle(
        self,
        request: GenerationRequest | None = None,
        out_ids: Sequence[int] = OUT_IDS,
        alter: Callable[[list[StageStatement]], list[StageStatement]] = lambda statements: statements,
        **changes: Any,
    ) -> Bundle:
        """An issued bundle; alter changes what the stages say before they sign."""
        request = request or a_request()
        said = alter(self.statements(request, out_ids))
        arguments: dict[str, Any] = {
            "statements": [self.chains[s.stage % len(self.chains)].sign(s) for s in said],
            "certificates": [session.certificate for session in self.stages],
            "registry": self.registry,
            "session": self.head,
            "node_nonce": NODE_NONCE,
            "now_ms": self.now_s * 1000 + 1000,
        }
        return issue(request, out_ids, changes.pop("finish_reason", "stop"), **(arguments | changes))
