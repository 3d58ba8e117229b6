"""What is kept on a disk that fills up: an error says so and what to do, nothing is spoiled, and it goes on after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.audit.answer_file import AnswerFile
from serve_app.audit.book import StandingBook
from serve_app.audit.case import Case, Look
from serve_app.audit.desk import Drawn, Note
from serve_app.audit.office import AuditOffice
from serve_app.audit.showing import shown_bytes
from serve_app.audit.standing import State
from serve_app.cluster.enrol import enrol
from serve_app.errors import ConfigError
from serve_app.receipts.identity import NodeIdentity, Registry
from serve_app.receipts.log_file import LogFile
from shard_tools.cid import Cid, Codec
from shard_tools.errors import InputError
from shard_tools.secret_file import create
from shard_tools.signing import Signer, read_public_key
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.memory import MemoryStore
from shard_tools.store.tiered import TieredStore
from tests.full_disk import Full, a_disk, files_of_at_most
from tests.serve_app.audit.redrawn import band, redrawer_of
from tests.serve_app.audit.rehearsed import AUDITOR, OTHER, auditor, whole_house

NODE = OTHER.public
ENTRIES = [Cid.of(Codec.RAW, b"%d" % i) for i in range(200)]
LOOK = Look("unaudited", "because")

Disk = tuple[Path, Full]


@pytest.fixture(params=["limit", "mounted"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    with a_disk(request.param, tmp_path) as disk:
        yield disk


def case(i: int) -> Case:
    return Case(f"r{i}~2", ENTRIES[0], b"", True, b"c" * 32, bytes(32), "", 1, LOOK, LOOK)


def test_a_model_is_read_through_a_cache_that_is_full(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    """Each block comes, right, though none is kept; that is said; what was kept before stays whole."""
    folder, full = disk
    source, blocks = MemoryStore(), [b"%d" % i * 5000 for i in range(20)]
    cids = [source.put(Codec.RAW, block) for block in blocks]
    near = DirectoryStore(folder / "store")
    store = TieredStore(near, folder / "lock", lambda _: [source])
    kept = store.get(cids[0])
    with full():
        assert [store.get(cid) for cid in cids] == blocks
        assert [*near.cids()] == [cids[0]] and near.get(cids[0]) == kept
        assert caplog.text.count("until they can be kept") == 1
    assert [store.get(cid) for cid in cids] == blocks
    assert {*near.cids()} == {*cids} and [*(folder / "store" / "tmp").iterdir()] == []


def test_a_log_takes_nothing_in_or_all_and_grows_on_when_there_is_room(disk: Disk) -> None:
    """Whether the process is started anew meanwhile or not, what was signed for is there."""
    folder, full = disk
    log = LogFile(folder, AUDITOR)
    log.append(ENTRIES[:3], 1)
    with full():
        with pytest.raises(InputError, match=r"cannot write the log .*: .*\. Make room"):
            log.append(ENTRIES[3:], 2)
        log.close()
        log = LogFile(folder, AUDITOR)
        assert log.sealed is not None and log.log.head(1).size >= 3
    assert log.append(ENTRIES, 3).size == len(ENTRIES)
    log.close()
    again = LogFile(folder, AUDITOR)
    assert len(again.log) == len(ENTRIES) and [*again.index] == [bytes(entry) for entry in ENTRIES]
    again.close()


@pytest.mark.parametrize("left", range(36 * 3, 36 * 5, 7))
def test_a_log_that_was_cut_in_the_middle_of_an_entry_goes_on_at_its_beginning(tmp_path: Path, left: int) -> None:
    log = LogFile(tmp_path, AUDITOR)
    log.append(ENTRIES[:3], 1)
    with files_of_at_most(left), pytest.raises(InputError):
        log.append(ENTRIES[3:9], 2)
    log.close()
    log = LogFile(tmp_path, AUDITOR)
    assert log.append(ENTRIES[3:9], 3).size == 9
    log.close()
    assert (tmp_path / "log").read_bytes() == b"".join(map(bytes, ENTRIES[:9]))


def test_of_answers_those_that_found_no_room_are_lost_and_no_others(disk: Disk) -> None:
    folder, full = disk
    kept = AnswerFile(folder, AUDITOR.public, 1 << 20)
    kept.add(case(1))
    kept.tell([b"a" * 32])
    with full():
        for i in range(2, 200):  # until what is left of a page is full too
            kept.add(case(i))
            kept.tell([b"b" * 32])
    kept.add(case(1000))
    kept.tell([b"c" * 32])
    found = [one.id for one in AnswerFile(folder, AUDITOR.public, 1 << 20).cases()]
    assert found[0] == "r1~2" and found[-1] == "r1000~2" and len(found) < 200
    assert kept.secrets()[0] == b"a" * 32 and kept.secrets()[-1] == b"c" * 32


@pytest.mark.parametrize("more", [0, 1, 4, 5, 40])
def test_half_an_answer_is_cut_off_before_another_is_written_behind_it(tmp_path: Path, more: int) -> None:
    kept = AnswerFile(tmp_path, AUDITOR.public, 1 << 20)
    kept.add(case(1))
    kept.tell([b"a" * 32])
    with files_of_at_most((tmp_path / "answers").stat().st_size + more):
        kept.add(case(2))
    with files_of_at_most(32 + more % 32):
        kept.tell([b"b" * 32])
    kept.add(case(3))
    kept.tell([b"c" * 32])
    assert [one.id for one in kept.cases()] == ["r1~2", "r3~2"]
    assert kept.secrets() == [b"a" * 32, b"c" * 32]


def test_an_office_refuses_what_it_cannot_log_and_takes_it_when_there_is_room(disk: Disk) -> None:
    """A verdict that cannot be kept is none; the answer's rows judged again later give it."""
    folder, full = disk
    house = whole_house()
    office = AuditOffice(folder, AUDITOR, house.operator, auditor, lambda: redrawer_of((band(),)))
    note = Note("r0~1", house.answers[0].bundle, True, b"c" * 32)
    drawn = Drawn(note.id, note.cid, 1, note.certain)
    with full():
        with pytest.raises(InputError, match="Make room"):
            for i in range(200):  # a page may have had some room
                office.note([note], b"%032d" % i, ())
        with pytest.raises(InputError, match="Make room"):
            office.note([note], b"d" * 32, ())
    office.note([note], b"c" * 32, ())
    (said,) = office.begin(drawn)
    shown = shown_bytes(said.request_hash, said.attempt, 1, house.answers[0].records[1], house.sessions[0])
    with full(), pytest.raises(InputError, match="Make room"):
        for _ in range(200):
            office.judge(drawn, 1, shown)
    office.judge(drawn, 1, shown)
    found = office.lookup("r0")
    assert found is not None and isinstance(audit := found["audit"], dict) and audit["state"] == "pass"
    office.close()
    again = AuditOffice(folder, AUDITOR, house.operator, auditor, lambda: redrawer_of((band(),)))
    found = again.lookup("r0")
    assert found is not None and isinstance(audit := found["audit"], dict) and audit["state"] == "pass"
    again.close()


def test_standings_that_cannot_be_saved_are_those_of_before_on_disk_and_saved_later(disk: Disk) -> None:
    folder, full = disk
    book = StandingBook(folder / "standing")
    book.proven(NODE, "two stories")
    with full(), pytest.raises(InputError, match="cannot keep the standings"):
        for i in range(200):
            book.proven(Signer.from_seed(b"%032d" % i).public, "x" * 100)
    assert StandingBook(folder / "standing").of(NODE).state is State.QUARANTINED
    book.read(7)
    assert StandingBook(folder / "standing").read_to == 7


def test_a_repair_needs_no_room_and_spoils_no_key(disk: Disk) -> None:
    """Each repair vouches for its nodes anew; the operator's key that clients read is not written for it."""
    folder, full = disk
    enrol({NODE: "a"}, state_dir=folder, operator_key=None, registry=None)
    operator = read_public_key(folder / "operator.pub")
    with full():
        envelope = enrol({NODE: "a", OTHER.public: "b"}, state_dir=folder, operator_key=None, registry=None)
    assert Registry.open(envelope, operator, int(time.time())).name_of(NODE)
    assert read_public_key(folder / "operator.pub") == operator


def test_a_key_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    """At a first start on a full disk: an error, and nothing that would be in the way of the next."""
    with files_of_at_most(20):
        with pytest.raises(InputError, match="Make room"):
            NodeIdentity.load_or_create(tmp_path / "node.key")
        with pytest.raises(InputError, match="Make room"):
            create(tmp_path / "secret", "key of the cluster", "x" * 64)
        with pytest.raises(InputError, match="Make room"):
            enrol({NODE: "a"}, state_dir=tmp_path, operator_key=None, registry=None)
    assert [*tmp_path.iterdir()] == []
    key = Signer.load_or_create(tmp_path / "operator.key").public
    with files_of_at_most(20), pytest.raises(ConfigError, match="Make room"):
        enrol({NODE: "a"}, state_dir=tmp_path, operator_key=None, registry=None)
    enrol({NODE: "a"}, state_dir=tmp_path, operator_key=None, registry=None)
    assert read_public_key(tmp_path / "operator.pub") == key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["operator.key", "operator.pub"]
