"""Text to token ids and back, from a model's own small files.

Renders chat templates as transformers' apply_chat_template does (parity is tested) and tokenises with the
`tokenizers` package; needs neither transformers nor torch, so that a client can repeat it when it checks a
receipt. The only home of tokenizers and jinja2. Like transformers, it reads a control token that a user wrote
in a message as that control token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from serve_app.api.incremental_decoder import IncrementalDecoder
from serve_app.errors import RequestError
from shard_tools.canonical import Value
from shard_tools.errors import CheckpointError

MAX_TEXT_CHARS = 8 << 20  # of a prompt, rendered: the API takes bodies of 8 MiB
MAX_MESSAGES = 2048
MAX_FILE_BYTES = 128 << 20  # the largest tokenizer.json known to us has 33 MB
MAX_STOP_IDS = 64  # as many as a GenerationRequest holds

# What transformers passes to a template from tokenizer_config.json.
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class TextCodec:
    """One model's tokenizer and chat template."""

    def __init__(
        self, tokenizer: Tokenizer, template: str | None, special: Mapping[str, str], eos_ids: Sequence[int]
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special = dict(special)
        self._template = None if template is None else _compile(template)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.stop_ids: tuple[int, ...] = tuple(sorted(set(eos_ids)))
        added = tokenizer.get_added_tokens_decoder()
        self._silent = frozenset(token for token, meaning in added.items() if meaning.special)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._known = frozenset(vocabulary.values())
        self._bytes = frozenset(token for text, token in vocabulary.items() if _BYTE_TOKEN.fullmatch(text))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> TextCodec:
        """From a manifest's small files, by path; only tokenizer.json must be there. Raises CheckpointError."""
        for path in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if len(files.get(path, b"")) > MAX_FILE_BYTES:
                raise CheckpointError(f"{path} has {len(files[path])} bytes; at most {MAX_FILE_BYTES} are read")
        if "tokenizer.json" not in files:
            raise CheckpointError(f"a model needs tokenizer.json; it has {', '.join(sorted(files)) or 'no files'}")
        try:
            tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as e:  # tokenizers raises bare Exception
            raise CheckpointError(f"tokenizer.json cannot be read: {e}") from e
        config = _read_json(files, "tokenizer_config.json")
        special = {name: _token_text(config[name]) for name in _SPECIAL_NAMES if config.get(name) is not None}
        eos_ids = _eos_ids(files, "generation_config.json") + _eos_ids(files, "config.json")
        eos = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
        if eos is not None:
            eos_ids.append(eos)
        if len(set(eos_ids)) > MAX_STOP_IDS:
            raise CheckpointError(f"{len(set(eos_ids))} end-of-text ids; at most {MAX_STOP_IDS} are served")
        return cls(tokenizer, _template_text(files, config), special, eos_ids)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Value]],
        add_generation_prompt: bool = True,
        clock: Callable[[], datetime] = datetime.now,
    ) -> str:
        """The conversation as the model reads it; clock: the time, for templates that print a date.

        Raises RequestError if the model has no template, or its template refuses the messages.
        """
        if self._template is None:
            raise RequestError("this model has no chat template: it completes text, at /v1/completions", "messages")
        if not 1 <= len(messages) <= MAX_MESSAGES:
            raise RequestError(f"{len(messages)} messages, where 1 to {MAX_MESSAGES} are accepted", "messages")
        # A null is a key left out, as for transformers: templates crash on None, or print it.
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            text = self._template.render(
                self._special,
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=lambda form: clock().strftime(form),
            )
        except _TEMPLATE_FAULTS as e:
            raise RequestError(f"the model's chat template refuses these messages: {e}", "messages") from e
        return _bounded(text, "messages")

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a text; add_special_tokens: with what the tokenizer puts around one. Raises RequestError."""
        try:
            return tuple(self._tokenizer.encode(_bounded(text, "prompt"), add_special_tokens=add_special_tokens).ids)
        except (TypeError, UnicodeError) as e:  # a lone surrogate, which JSON can say and UTF-8 cannot
            raise RequestError(f"the text is not valid Unicode: {e}", "prompt") from e

    def encode_chat(
        self, messages: Sequence[Mapping[str, Value]], clock: Callable[[], datetime] = datetime.now
    ) -> tuple[int, ...]:
        """Token ids of a conversation that the model is to continue. Raises RequestError."""
        return self.encode(self.render_chat(messages, clock=clock), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special ones skipped."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def decoder(self) -> IncrementalDecoder:
        """A decoder for one completion, fed as tokens come."""
        return IncrementalDecoder(
            self.decode, lambda token: token in self._silent or token not in self._known, self._bytes.__contains__
        )


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only has a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _compile(template: str) -> jinja2.Template:
    # The options and names of transformers' utils/chat_template_utils.py; a template is written against them.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(template)
    except (jinja2.TemplateError, RecursionError) as e:
        raise CheckpointError(f"the chat template cannot be read: {e}") from e


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _bounded(text: str, param: str) -> str:
    if len(text) > MAX_TEXT_CHARS:
        raise RequestError(f"{len(text)} characters, where at most {MAX_TEXT_CHARS} are accepted", param)
    return text


def _read_json(files: Mapping[str, bytes], path: str) -> dict[str, Any]:
    if path not in files:
        return {}
    try:
        value = json.loads(files[path])
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _token_text(value: object) -> str:
    text = value.get("content") if isinstance(value, dict) else value  # an AddedToken, or its text alone
    if not isinstance(text, str):
        raise CheckpointError(f"tokenizer_config.json: {str(value)[:80]} is no token")
    return text


def _template_text(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError as e:
            raise CheckpointError(f"chat_template.jinja is not UTF-8: {e}") from e
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"tokenizer_config.json: chat_template is a {type(template).__name__}, not a text")
    return template


def _eos_ids(files: Mapping[str, bytes], path: str) -> list[int]:
    value = _read_json(files, path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 1 << 24:
            raise CheckpointError(f"{path}: eos_token_id holds {token!r}, which is no token id")
    return ids
