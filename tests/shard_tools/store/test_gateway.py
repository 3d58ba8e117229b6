"""Files from a gateway in streams: what honest gateways give, and what others get away with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from shard_tools.cid import Cid, Codec
from shard_tools.errors import CorruptBlockError, FormatError, UnavailableError, UnreachableError
from shard_tools.fetch import fetch, load_manifest, verify
from shard_tools.http_client import Patience
from shard_tools.index.memory import MemoryIndex
from shard_tools.manifest import Manifest, Shard
from shard_tools.publish import publish
from shard_tools.signing import Signer
from shard_tools.sources import open_tiered
from shard_tools.store.block_store import Dag
from shard_tools.store.car import write_car
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.gateway import CAR, Gateway
from shard_tools.store.memory import MemoryStore
from tests.shard_tools.gateway_double import gateway, walked
from tests.shard_tools.http_doubles import answering, dripping, ok, saying
from tests.tiny_models import write_tiny_checkpoint

STRANGER = b"stranger" * 1000


@pytest.fixture(scope="module")
def origin() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(scope="module")
def model(origin: MemoryStore, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("ck"), layers=3, hidden=128)
    record = publish(folder, origin, MemoryIndex(), "tiny", Signer.from_seed(bytes(32)))
    return load_manifest(origin, record.manifest)


def dag(shard: Shard) -> Dag:
    leaves = {leaf.cid: leaf.size for tensor in shard.tensors for leaf in tensor.leaves}
    return Dag(shard.cid, shard.size, len(shard.leaves), leaves)


def whole(root: Path, model: Manifest) -> bool:
    return verify(DirectoryStore(root), model) == []


def test_a_model_comes_in_a_stream_a_shard_and_small_files_block_by_block(
    origin: MemoryStore, model: Manifest, tmp_path: Path
) -> None:
    """Each byte once; what follows from the manifest is not asked for; a second fetch asks for nothing."""
    said: list[tuple[str, int, int]] = []
    with gateway(origin) as (url, log):
        there = open_tiered(cache=str(tmp_path), gateways=url)
        fetch(there, DirectoryStore(tmp_path), model.cid, progress=lambda *step: said.append(step))
        assert {cid for cid, _, _ in log.cars} <= {str(shard.cid) for shard in model.shards}
        assert log.asked["car"] == sum(len(shard.leaves) > 4 for shard in model.shards) == 3
        single = sum(len(s.leaves) - 1 for s in model.shards if len(s.leaves) <= 4)
        assert log.asked["raw"] == 1 + len(model.shards) + len(model.files) + single
        assert whole(tmp_path, model)
        _, query, accept = log.cars[0]
        assert query == {
            "format": ["car"], "dag-scope": ["entity"], "car-version": ["1"], "car-order": ["dfs"], "car-dups": ["n"]
        }  # fmt: skip
        assert accept == f"{CAR}; version=1; order=dfs; dups=n"
        before = log.asked.total()
        fetch(there, DirectoryStore(tmp_path), model.cid)
        assert log.asked.total() == before
    steps = [done for _, done, _ in said]
    assert steps == sorted(steps) and said[-1][1] == said[-1][2]


def test_a_stage_asks_for_no_stream_of_what_it_does_not_own(
    origin: MemoryStore, model: Manifest, tmp_path: Path
) -> None:
    with gateway(origin) as (url, log):
        fetch(open_tiered(cache=str(tmp_path), gateways=url), DirectoryStore(tmp_path), model.cid, layers=(1, 2))
        assert [cid for cid, _, _ in log.cars] == [str(model.shards[2].cid)]


def test_what_is_here_for_the_most_part_is_made_whole_block_by_block(
    origin: MemoryStore, model: Manifest, tmp_path: Path
) -> None:
    near = DirectoryStore(tmp_path)
    for shard in model.shards:
        for leaf in shard.leaves[2:]:
            near.put(Codec.RAW, origin.get(leaf.cid))
    with gateway(origin) as (url, log):
        fetch(open_tiered(cache=str(tmp_path), gateways=url), near, model.cid)
        assert log.asked["car"] == 0 and whole(tmp_path, model)


def test_a_gateway_that_gives_no_streams_is_asked_once_and_then_for_blocks(
    origin: MemoryStore, model: Manifest, tmp_path: Path
) -> None:
    with gateway(origin, cars=False) as (url, log):
        fetch(open_tiered(cache=str(tmp_path), gateways=url), DirectoryStore(tmp_path), model.cid)
        assert 1 <= log.asked["car"] <= 4 and whole(tmp_path, model)  # four shards are asked for at once
    for answer in (ok(b"<html>", kind="text/html"), ok(b"x"), b"HTTP/1.1 400 No\r\nContent-Length: 0\r\n\r\n"):
        asked: list[int] = []

        def once(connection: Any, answer: bytes = answer, asked: list[int] = asked) -> None:
            asked.append(1)
            connection.sendall(answer)

        with answering(once) as url:
            source = Gateway(url, Patience())
            assert list(source.get_dag(dag(model.shards[1]))) == list(source.get_dag(dag(model.shards[2]))) == []
            assert len(asked) == 1


class Cut:
    """Lets so many bytes through, and then says that the client has gone."""

    def __init__(self, out: BinaryIO, most: int) -> None:
        self._out, self._left = out, most

    def write(self, data: bytes) -> int:
        self._out.write(data[: self._left])
        self._left -= min(self._left, len(data))
        if not self._left:
            self._out.flush()
            raise BrokenPipeError
        return len(data)


def test_a_stream_that_is_cut_short_is_kept_as_far_as_it_came(
    origin: MemoryStore, model: Manifest, tmp_path: Path
) -> None:
    shard = model.shards[1]
    with gateway(origin, cut=lambda out: Cut(out, shard.size // 2)) as (url, log):  # type: ignore[arg-type,return-value]
        there = open_tiered(cache=str(tmp_path), gateways=url)
        brought: list[Cid] = []
        there.bring(dag(shard), brought.append)
        assert 0 < len(brought) < len(shard.leaves) - 1
        assert all(DirectoryStore(tmp_path).get(cid) == origin.get(cid) for cid in brought)
        log.asked.clear()
        fetch(there, DirectoryStore(tmp_path), model.cid)
        assert log.asked["raw"] > 0 and whole(tmp_path, model)


def car(blocks: list[tuple[Cid, bytes]], roots: list[Cid]) -> bytes:
    out = BytesIO()
    write_car(out, roots, blocks)
    return out.getvalue()


def test_strangers_and_doubles_in_a_stream_are_passed_over(origin: MemoryStore, model: Manifest) -> None:
    """Whatever roots it names, in whatever order, without a length."""
    shard = model.shards[1]
    right = list(walked(shard.cid, origin))
    stranger = Cid.of(Codec.RAW, STRANGER), STRANGER
    body = car([right[-1], stranger, *right, *right[:2]], [stranger[0]])
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {CAR};version=1\r\n\r\n".encode()
    with answering(saying(head + body)) as url:
        got = dict(Gateway(url, Patience()).get_dag(dag(shard)))
    assert got == {cid: origin.get(cid) for cid in dag(shard).wanted}


def altered(right: list[tuple[Cid, bytes]]) -> bytes:
    cid, block = right[2]
    return car([*right[:2], (cid, block[:-1] + bytes([block[-1] ^ 1])), *right[3:]], [right[0][0]])


def endless(right: list[tuple[Cid, bytes]]) -> bytes:
    return car([right[1], *([right[0]] * 40_000)], [right[0][0]])


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (altered, CorruptBlockError, "gateway http"),
        (endless, FormatError, "more than the file"),
        (lambda right: car(right[:2], [right[0][0]])[:-5], FormatError, "cut short"),
        (lambda right: b"", FormatError, "is empty"),
        (lambda right: b"\xff" * 100, FormatError, "at most 4096"),
        (lambda right: car(right[:2], [right[0][0]]) + b"\xff\xff\xff\xff\x03" + bytes(9), FormatError, "at most"),
        (lambda right: car(right[:2], [right[0][0]]) + b"\x24" + b"\x12\x20" + bytes(40), FormatError, "CID"),
    ],
    ids=["altered", "endless", "cut", "empty", "header", "1-GiB-block", "cid-v0"],
)
def test_a_stream_that_lies_ends_where_it_does(
    origin: MemoryStore,
    model: Manifest,
    make: Callable[[list[tuple[Cid, bytes]]], bytes],
    error: type[Exception],
    said: str,
) -> None:
    shard = model.shards[1]
    got: dict[Cid, bytes] = {}
    answer = saying(ok(make(list(walked(shard.cid, origin))), kind=CAR))
    with answering(answer) as url, pytest.raises(error, match=said):
        for cid, block in Gateway(url, Patience()).get_dag(dag(shard)):
            got[cid] = block
    assert all(origin.get(cid) == block for cid, block in got.items())


def test_a_stream_that_stalls_costs_its_pause_and_the_rest_comes_otherwise(
    origin: MemoryStore, model: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard_tools.store.gateway.PAUSE_S", 0.3)
    shard = model.shards[1]
    start = car(list(walked(shard.cid, origin))[:4], [shard.cid])
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {CAR}\r\nContent-Length: {shard.size}\r\n\r\n".encode()

    def stalling(connection: Any) -> None:
        connection.sendall(head + start)
        dripping(b"x", 0.05)(connection)

    with answering(stalling) as url:
        began, got = time.monotonic(), []
        with pytest.raises(UnreachableError, match=r"within 0\.3 s"):
            for cid, _ in Gateway(url, Patience(answer_s=5)).get_dag(dag(shard)):
                got.append(cid)
        assert len(got) == 2 and time.monotonic() - began < 3
    with pytest.raises(UnavailableError):
        fetch(open_tiered(cache=str(tmp_path), gateways="http://127.0.0.1:1"), DirectoryStore(tmp_path), model.cid)


def test_two_fetches_at_once_take_one_stream_of_a_shard(origin: MemoryStore, model: Manifest, tmp_path: Path) -> None:
    with gateway(origin) as (url, log):

        def one() -> None:
            fetch(open_tiered(cache=str(tmp_path), gateways=url), DirectoryStore(tmp_path), model.cid)

        threads = [threading.Thread(target=one) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert max(sum(cid == str(s.cid) for cid, _, _ in log.cars) for s in model.shards) == 1
        assert whole(tmp_path, model)
