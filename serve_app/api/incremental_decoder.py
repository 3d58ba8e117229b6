"""Text from token ids as they come, never taken back.

Law: the pieces of any split of `ids` into pushes, and finish(), joined, are decode(ids).
Why that takes care: a character's bytes may lie in several tokens, the first word of a text loses its leading
space, and one bad byte spoils a whole run of byte tokens. So text is held back while a later token could change
it, and each piece is the growth of a short window's text, whose first tokens are context and already out.
Knows no tokenizer: it is given the function that decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not, or not yet, a character
_WINDOW_TOKENS = 16  # trimmed above this: decoding 16 ids costs about as much as decoding 2


class IncrementalDecoder:
    """Decodes one completion.

    decode: all of a list of ids. is_silent: ids that decode skips (special or unknown ones).
    is_open: ids whose text may still change with the next one (single bytes of a byte-fallback vocabulary).
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_silent: Callable[[int], bool],
        is_open: Callable[[int], bool],
    ) -> None:
        self._decode, self._is_silent, self._is_open = decode, is_silent, is_open
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that are out
        self._cut = 0  # the window's tokens before this one made whole characters when they came

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now and was not before; often empty."""
        fresh = [token for token in ids if not self._is_silent(token)]
        self._window += fresh
        if not fresh or self._is_open(fresh[-1]):
            return ""
        return self._advance(final=False)

    def finish(self) -> str:
        """What was held back; nothing may be pushed after."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        text = self._decode(self._window)
        # A character cut short at the end is one replacement mark; whatever stands before it cannot change.
        whole = final or not text.endswith(_REPLACEMENT)
        stable = len(text) if whole else len(text) - 1
        piece = text[self._shown : stable]
        self._shown = max(self._shown, stable)
        if whole and not final:
            self._trim()
        return piece

    def _trim(self) -> None:
        """Forget all but the latest tokens; they keep being decoded so that their neighbours know their left."""
        if len(self._window) > _WINDOW_TOKENS:
            tail = self._window[self._cut :]
            tail_text = self._decode(tail)
            if tail_text:  # else the next token would look like the first of the text
                self._window, self._shown = tail, len(tail_text)
        self._cut = len(self._window)
