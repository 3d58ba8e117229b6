"""What is promised, and which answers are drawn: a Head's desk, whose auditor is told by the test what to say."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from serve_app.audit import desk as desks
from serve_app.audit.desk import AuditDesk, Drawn, Terms
from serve_app.audit.draw import draw, secret_commitment
from serve_app.errors import OverloadedError, RequestError
from serve_app.messages.request import GenerationRequest, RequestId, Sampling
from shard_tools.cid import Cid, Codec

MODEL = Cid.of(Codec.DAG_CBOR, b"a model")
TERMS = Terms(rate_micro=200_000, n_stages=4, page_size=16, row_bytes=10, retain_bytes=2000, busy_bytes=400)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def request(name: str = "r", level: Any = "audited", tokens: int = 30) -> GenerationRequest:
    return GenerationRequest(RequestId(name), MODEL, (1, 2), tokens, Sampling(0), (), b"", bytes(32), assurance=level)


def working(**changes: Any) -> tuple[AuditDesk, Clock]:
    """One whose auditor has answered once, and so holds a commitment."""
    clock = Clock()
    desk = AuditDesk(Terms(**({f: getattr(TERMS, f) for f in Terms.__slots__} | changes)), clock)
    desk.said(desk.outgoing(), bytes(32), ())
    return desk, clock


def test_a_level_that_can_never_be_given_is_refused_for_good_and_one_that_cannot_now_is_for_now() -> None:
    desk, _ = working(problem="the rows never leave the GPU")
    with pytest.raises(RequestError, match="never leave the GPU"):
        desk.admit(request(), resumed=False)
    desk.admit(request(level="signed"), resumed=False)
    desk, _ = working()
    with pytest.raises(RequestError, match=r"audit\.retain_bytes"):
        desk.admit(request(tokens=200), resumed=False)
    desk = AuditDesk(TERMS, Clock())
    with pytest.raises(OverloadedError, match="no auditor has answered"):
        desk.admit(request(), resumed=False)


def test_a_stage_that_keeps_less_than_was_wanted_bounds_what_is_promised() -> None:
    """One of another operator says how much; when it says more again, it is as was wanted."""
    desk, _ = working()
    for told, room in ((1000, 600), (100, 0), (10**9, 1600)):
        stages: Any = [{"stage": 0, "retains": True, "retain_bytes": 2000}, {"stage": 1, "retain_bytes": told}]
        desk.learn(stages, {})
        assert desk.status()["room_bytes"] == room
    desk.learn([{"stage": 1, "retains": False, "retain_bytes": 0}], {})
    with pytest.raises(RequestError, match="keeps no rows"):
        desk.admit(request(), resumed=False)


def test_exact_answers_are_promised_by_what_stages_and_auditor_say_they_compute_by() -> None:
    """And kept to for one that another Head had promised, of which the auditor then says what is so."""
    stages: Any = [{"stage": 0, "retains": True, "profile": "p"}, {"stage": 1, "retains": True, "profile": "p"}]
    desk, _ = working(fixed=True)
    with pytest.raises(OverloadedError, match="has not said yet"):
        desk.admit(request(level="exact"), resumed=False)
    desk.learn(stages, {"auditor": {"exact_profile": "p"}})
    desk.admit(request(level="exact"), resumed=False)
    assert desk.status()["exact"] is True
    desk.learn([*stages[:1], stages[1] | {"profile": "q"}], {"auditor": {"exact_profile": "p"}})
    with pytest.raises(RequestError, match="computes by 'q'") as refused:
        desk.admit(request("late", "exact"), resumed=False)
    assert refused.value.param == "llmd.assurance" and desk.status()["exact"] is False
    desk.admit(request("kept", "exact"), resumed=True)
    desk.admit(request("other"), resumed=False)
    desk.ended(request(level="exact"), b"receipt")
    assert [one.certain for one in desk.said(desk.outgoing(), bytes(32), ())] == [True]
    desk, _ = working()
    desk.learn(stages, {"auditor": {"exact_profile": "p"}})
    with pytest.raises(RequestError, match=r"pipeline\.deterministic"):
        desk.admit(request(level="exact"), resumed=False)


def test_only_so_much_is_promised_as_can_be_kept_and_what_is_settled_is_free_again() -> None:
    """1600 bytes hold five answers of two pages; one without receipt, settled or long over gives its place back."""
    desk, clock = working()
    for i in range(5):
        desk.admit(request(str(i)), resumed=False)
    with pytest.raises(OverloadedError) as refused:
        desk.admit(request("late"), resumed=False)
    assert refused.value.retry_after_s > 0
    desk.ended(request("0"), b"")
    desk.admit(request("5"), resumed=False)
    desk.ended(request("1"), b"receipt")
    with pytest.raises(OverloadedError):
        desk.admit(request("6"), resumed=False)
    desk.said(desk.outgoing(), bytes(32), ["1"])
    desk.admit(request("6"), resumed=False)
    desk.ended(request("2"), b"receipt")
    clock.now += desks.SETTLED_S + 1
    desk.admit(request("7"), resumed=False)
    desk.admit(request("8"), resumed=True)  # promised by another Head: kept, whatever there is
    assert desk.status()["promised_bytes"] == 6 * 320


def test_the_draw_follows_from_secret_and_head_and_every_promise_is_kept() -> None:
    """As anybody can repeat it once the secret is told; about as many as the rate says; all that were promised."""
    desk, _ = working()
    drawn: list[Drawn] = []
    told: list[bytes] = []
    heads: dict[Cid, bytes] = {}
    commitments: list[bytes] = []
    for i in range(3000):
        desk.ended(request(str(i), "audited" if i % 100 == 0 else "signed"), b"%d" % i)
        if i % 10 == 9:
            outgoing, head = desk.outgoing(), hashlib.sha256(b"%d" % i).digest()
            heads |= {note.cid: head for note in outgoing.notes}
            told += outgoing.told
            commitments += [outgoing.commitment] * bool(outgoing.commitment)
            drawn += desk.said(outgoing, head, ())
    by_id = {one.id: one for one in drawn}
    assert all(by_id[str(i)].certain for i in range(0, 3000, 100))
    assert abs(len(drawn) - 30 - 0.2 * 2970) < 4 * (2970 * 0.16) ** 0.5
    assert {one.stage for one in drawn} == {0, 1, 2, 3}
    assert len(told) >= 1 and len(commitments) >= 2 and secret_commitment(told[0]) not in commitments[1:]
    for i in range(1000):  # those that the first secret decided about
        cid = Cid.of(Codec.DAG_CBOR, b"%d" % i)
        value = draw(cid, told[0], secret_commitment(told[0]), heads[cid])
        assert (str(i) in by_id) == (i % 100 == 0 or value.audits(200_000))
        assert str(i) not in by_id or by_id[str(i)].stage == value.stage(4)


def test_every_answer_of_a_watched_stage_is_drawn() -> None:
    desk, _ = working(rate_micro=0)
    desk.watched = frozenset({2})
    for i in range(20):
        desk.ended(request(str(i), "signed"), b"%d" % i)
    assert [one.stage for one in desk.said(desk.outgoing(), bytes(32), ())] == [2] * 20


def test_without_an_auditor_answers_go_on_and_are_counted_as_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is bounded, promises last; what was signed before a commitment is decided about by none."""
    monkeypatch.setattr(desks, "MAX_WAITING_BYTES", 100)
    desk = AuditDesk(TERMS, Clock())
    for i in range(30):
        desk.ended(request(str(i), "signed"), b"%9d" % i)
    assert desk.unaudited == 19 and len(desk.outgoing().notes) == 11
    desk.failed("it died")
    assert desk.status()["problem"] == "it died"
    assert desk.said(desk.outgoing(), bytes(32), ()) == [] and desk.unaudited == 30
    assert desk.status()["problem"] is None and desk.outgoing().notes == ()
