"""A Text without a model's files: one token per byte, and one that ends a turn."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

END = 256


class BytesText:
    """Ids 0..255 are bytes, 256 ends a turn. A conversation's prompt is its last message and the end of the turn."""

    stop_ids = (END,)
    vocab_size = 257

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        return (*messages[-1]["content"].encode(), END)

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < END).decode(errors="replace")

    def decoder(self) -> BytesDecoder:
        return BytesDecoder()


class BytesDecoder:
    """UTF-8, with unfinished characters kept back."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(bytes(i for i in ids if i < END))

    def finish(self) -> str:
        return self._utf8.decode(b"", True)
