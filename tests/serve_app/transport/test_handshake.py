"""The first bytes on an edge."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import PipelineError, ProtocolError
from serve_app.transport.handshake import Hello, accepted, read_answer, refused

HELLOS = st.builds(Hello, st.integers(0, 2**64 - 1), st.text(max_size=25), st.integers(0, 2**32 - 1))


@given(HELLOS)
def test_a_hello_is_read_as_it_was_written(hello: Hello) -> None:
    assert Hello.decode(hello.encode()) == hello


@given(HELLOS, st.data())
def test_a_hello_cut_short_or_lengthened_is_refused(hello: Hello, data: st.DataObject) -> None:
    whole = hello.encode()
    cut = data.draw(st.integers(0, len(whole) - 1))
    for wrong in (whole[:cut], whole + b"x"):
        with pytest.raises(ProtocolError):
            Hello.decode(wrong)


@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Hello.decode(data)


def test_a_refusal_says_why_however_long_or_odd_the_reason_is() -> None:
    for why in ("epoch 3", "", "ü" * 200, "\udc80"):
        with pytest.raises(PipelineError, match="stage 1 refuses the edge: "):
            read_answer(refused(why), "stage 1")


@pytest.mark.parametrize("answer", [b"", b"\1", b"\1\5abc", b"\2\0", b"\0\1", bytes(300)])
def test_an_answer_that_is_none_is_an_error(answer: bytes) -> None:
    assert read_answer(accepted(b"secrets"), "x") == b"secrets"
    with pytest.raises(PipelineError, match="without an answer"):
        read_answer(answer, "x")
