"""What a last stage says of its draws: which tokens, from which position on, and by what it was asked to draw them.

Without the last of these a wrong token would convict nobody: the Head tells the last stage key, sampling and, for
penalties, the tokens so far, and a stage that draws faithfully by what it was told wrongly has drawn wrong tokens. With
it, tokens that a receipt's sampling does not give are the stage's own doing, and a receipt that says other tokens or
another sampling than the stage signed for is its Head's. Bytes: PROTOCOL.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.messages.request import Sampling
from serve_app.receipts.rows import ids_root
from shard_tools import canonical
from shard_tools.canonical import Fields, Value
from shard_tools.cid import Cid

_HASH_BYTES = 32
_MAX_POSITION = 1 << 21
_ASKED_TAG = b"llmd.draws.v1\0"


@dataclass(frozen=True, slots=True)
class Drawn:
    """root: over the ids drawn in this attempt, as ids_root; asked: asked_hash of what they were drawn by."""

    first: int  # position of the first; a further attempt begins behind what earlier ones drew
    root: bytes
    asked: bytes

    def to_value(self) -> Value:
        return {"first": self.first, "root": self.root, "asked": self.asked}

    @classmethod
    def from_value(cls, value: Value) -> Drawn:
        """Raises FormatError."""
        with Fields(value, "statement.drawn") as f:
            return cls(
                f.integer("first", 1, _MAX_POSITION),
                f.data("root", _HASH_BYTES, _HASH_BYTES),
                f.data("asked", _HASH_BYTES, _HASH_BYTES),
            )


def asked_hash(manifest: Cid, key: bytes, sampling: Sampling, known: Sequence[int], n_prompt: int) -> bytes:
    """32 bytes. key: of the noise. known: all tokens before the first draw, of which so many are the prompt's.

    Tokens are said only where they matter, to penalties: the last stage of a pipeline sees no others. The seed is in
    the key.
    """
    value = sampling.to_value()
    assert isinstance(value, dict)
    said: dict[str, Value] = {**value, "seed": None, "key": key}
    if sampling.penalises:
        said |= {"known": ids_root(manifest, known), "n_prompt": n_prompt}
    return hashlib.sha256(_ASKED_TAG + canonical.encode(said)).digest()
