"""The standing of every node that was ever judged, on disk: who is trusted outlives who keeps the book.

What a verdict comes to is for standing.py to say. Evidence is written in thousandths, up to 2^53 of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from serve_app.audit.draw_verdict import DrawVerdict
from serve_app.audit.standing import (
    Standing,
    State,
    after_draws,
    after_proof,
    after_refusal,
    after_verdict,
    readmitted,
)
from serve_app.audit.verdict import Verdict
from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.errors import FormatError, InputError
from shard_tools.signing import KEY_BYTES, PublicKey, key_text

MAX_BOOK_BYTES = 4 << 20
MAX_NODES = 4096
_MILLI, _MOST = 1000, 1 << 53
_READMIT = "readmit"
_STATES = {state.value: state for state in State}


class StandingBook:
    """One process writes it."""

    def __init__(self, path: Path) -> None:
        """Raises InputError for a file that cannot be read, FormatError for one that is no such book."""
        self._path = path
        self._standings: dict[PublicKey, Standing] = {}
        self.read_to = 0  # number of the last news that it holds
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as e:
            raise InputError(f"cannot read the standings in {path}: {e.strerror}") from e
        if data:
            self._standings, self.read_to = _decode(data)

    def of(self, node: PublicKey) -> Standing:
        """Of a node that nobody has judged: ACTIVE."""
        return self._standings.get(node, Standing())

    def judged(self, verdict: Verdict, owner: str) -> Standing:
        """The node's standing now that an auditor of this owner has said this. Raises InputError if it is not saved."""
        if verdict.finding == "forged":
            what = f"stage {verdict.stage} showed rows that it did not sign for, by its own signatures"
            return self.proven(verdict.node, what)
        return self._change(verdict.node, lambda now: after_verdict(now, verdict, owner))

    def drew(self, verdict: DrawVerdict, owner: str) -> Standing:
        """As `judged`, of the tokens that it signed for drawing."""
        return self._change(verdict.node, lambda now: after_draws(now, verdict, owner))

    def refused(self, node: PublicKey, what: str) -> Standing:
        """It did not show rows that it was bound to keep."""
        return self._change(node, lambda now: after_refusal(now, what[:100]))

    def proven(self, node: PublicKey, what: str) -> Standing:
        """What anybody can check convicts it."""
        return self._change(node, lambda now: after_proof(now, what))

    def readmit(self, node: PublicKey) -> Standing:
        """The operator has looked at a quarantined node; nothing happens to another."""
        return self._change(node, lambda now: readmitted(now) if now.state is State.QUARANTINED else now)

    def read(self, number: int) -> None:
        """What was told as this number is in the book, and is not to be counted again."""
        self.read_to = number
        self._save()

    def quarantined(self) -> frozenset[PublicKey]:
        """Nodes that get no requests."""
        return frozenset(node for node, standing in self._standings.items() if not standing.serves)

    def state(self) -> list[Value]:
        """For people: nodes of which there is something to say."""
        return [
            {"node": key_text(node), "state": s.state.value, "passes": s.passes, "strikes": s.strikes, "why": s.reason}
            for node, s in self._standings.items()
        ]

    def _change(self, node: PublicKey, change: Callable[[Standing], Standing]) -> Standing:
        before = self.of(node)
        after = change(before)
        if after != before:
            self._standings[node] = after
            self._save()
        return after

    def _save(self) -> None:
        beside = self._path.with_name(self._path.name + ".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            beside.write_bytes(_encode(self._standings, self.read_to))
            beside.replace(self._path)
        except OSError as e:
            raise InputError(f"cannot keep the standings in {self._path}: {e.strerror}") from e


def ask_to_readmit(folder: Path, node: PublicKey) -> None:
    """Whoever keeps the book in this folder is asked to: a file there, which takes the right to write it.

    Raises InputError if there is no such folder.
    """
    try:
        (folder / _READMIT).mkdir(exist_ok=True, mode=0o700)
        (folder / _READMIT / node.hex()).touch()
    except OSError as e:
        raise InputError(f"cannot ask in {folder}: {e.strerror}. Is identity.state_dir on this host?") from e


def asked_to_readmit(folder: Path) -> list[PublicKey]:
    """Nodes that were asked for since the last call. Raises InputError."""
    found = []
    try:
        for file in sorted((folder / _READMIT).glob("*")):
            file.unlink()
            if len(file.name) == 2 * KEY_BYTES and set(file.name) <= set("0123456789abcdef"):
                found.append(PublicKey(bytes.fromhex(file.name)))
    except OSError as e:
        raise InputError(f"cannot read who is to be readmitted in {folder}: {e.strerror}") from e
    return found


def _encode(standings: dict[PublicKey, Standing], read_to: int) -> bytes:
    nodes: list[Value] = [
        {
            "node": node,
            "state": s.state.value,
            "evidence": {owner: min(_MOST, round(e * _MILLI)) for owner, e in s.evidence.items()},
            "accusers": list(sorted(s.accusers)),
            "passes": s.passes,
            "strikes": s.strikes,
            "reason": s.reason,
        }
        for node, s in sorted(standings.items())
    ]
    return canonical.encode({"v": 1, "nodes": nodes, "read_to": read_to})


def _decode(data: bytes) -> tuple[dict[PublicKey, Standing], int]:
    out: dict[PublicKey, Standing] = {}
    with Fields(canonical.decode(data, max_bytes=MAX_BOOK_BYTES), "standings") as f:
        f.integer("v", 1, 1)
        read_to = f.integer("read_to", 0, 1 << 53)
        for item in f.items("nodes", MAX_NODES):
            with Fields(item, "standings.nodes") as n:
                node = PublicKey(n.data("node", KEY_BYTES, KEY_BYTES))
                state, evidence = n.text("state", 20), n.any("evidence")
                if state not in _STATES or not isinstance(evidence, dict):
                    raise FormatError(f"standings: {state!r} is no state, or its evidence is no map")
                accusers = frozenset(str(owner) for owner in n.items("accusers", MAX_NODES))
                out[node] = Standing(
                    _STATES[state],
                    {owner: float(e) / _MILLI for owner, e in evidence.items() if isinstance(e, int)},
                    accusers,
                    n.integer("passes", 0, 1 << 53),
                    n.integer("strikes", 0, 1 << 53),
                    n.text("reason", 400),
                )
    return out, read_to
