"""A stage of another operator and its controller, over TLS on loopback: what it obeys, and what both refuse.

Whole pipelines with one, in a network of its own: tests/e2e/test_outside_stage.py.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from serve_app.cluster.outside import OutsideStage
from serve_app.cluster.row_holder import OutsideRows
from serve_app.cluster.row_orders import PIECE_BYTES
from serve_app.cluster.specs import Outsider, StageSpec
from serve_app.cluster.stage_orders import Connect, TellTrouble, answer, decode_order, encode_order, read_answer
from serve_app.cluster.stage_server import StagePolicy, StageServer
from serve_app.cluster.wiring import Awaited, Joint
from serve_app.engine.engine import StepOutput
from serve_app.errors import PipelineError
from serve_app.messages.step import SEAL
from serve_app.receipts.identity import NodeIdentity
from serve_app.transport.call import CallListener, ask
from serve_app.transport.handshake import EdgeAddress, Outlet, Peer
from serve_app.transport.tcp import dial_tcp
from serve_app.transport.tls import tls_context
from shard_tools.choice import Choice
from shard_tools.fetch import fetch as fetch_model
from shard_tools.index.directory import DirectoryIndex
from shard_tools.index.model_index import ModelRecord
from shard_tools.publish import publish
from shard_tools.signing import PublicKey, Signer, key_text
from shard_tools.store.directory import DirectoryStore
from shard_tools.trust import TrustPolicy
from tests.serve_app.pipeline.test_retention import PAGE, step
from tests.tiny_models import write_tiny_checkpoint

CONTROLLER, OTHER, STRANGER, PUBLISHER = (Signer.from_seed(bytes([i]) * 32) for i in range(4))
HOST = "127.0.0.1"
MAX_PAGES_BYTES = 1 << 20
MAX_RETAINED_BYTES = 8 << 20


@dataclass(frozen=True)
class Model:
    """A published model; `part` is a store with layers [2, 4) of it alone."""

    record: ModelRecord
    part: Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    root = tmp_path_factory.mktemp("model")
    whole, part = DirectoryStore(root / "whole"), DirectoryStore(root / "part")
    record = publish(write_tiny_checkpoint(root / "in"), whole, DirectoryIndex(root / "whole"), "tiny", PUBLISHER)
    fetch_model(whole, part, record.manifest, layers=(2, 4))
    part.put(record.signature.codec, whole.get(record.signature))
    return Model(record, root / "part")


@pytest.fixture
def policy(model: Model, tmp_path: Path) -> StagePolicy:
    return StagePolicy(
        controllers=frozenset((CONTROLLER.public, OTHER.public)),
        publishers=lambda: TrustPolicy.any_of((PUBLISHER.public,)),
        store=model.part,
        state_dir=tmp_path / "theirs",
        engine=Choice("torch"),
        device="cpu",
        threads=1,
        kv_memory_bytes=MAX_PAGES_BYTES,
        retain_bytes=MAX_RETAINED_BYTES,
        layers=None,
        edge_port=0,
    )


@pytest.fixture
def spec(model: Model, tmp_path: Path) -> StageSpec:
    """Stage 1 of 2, as the cluster would make it: its paths are the cluster's, and go nowhere."""
    return StageSpec(
        epoch=100,
        stage=1,
        n_stages=2,
        start=2,
        stop=4,
        manifest=model.record.manifest,
        signature=model.record.signature,
        trusted=TrustPolicy.any_of(()),
        store=tmp_path / "nowhere",
        engine=Choice("nothing"),
        deterministic=False,
        kv_dtype="auto",
        device="cuda",
        page_size=16,
        threads=1,
        state_dir=tmp_path / "ours",
        session_lifetime_s=3600,
    )


@asynccontextmanager
async def serving(
    policy: StagePolicy, give_up_s: float = 5.0, server: StageServer | None = None
) -> AsyncIterator[Callable[[Signer], OutsideStage]]:
    """A stage on loopback; gives what makes a controller's view of it."""
    server, door = server or StageServer(policy, HOST, give_up_s), socket.create_server((HOST, 0))
    who = Outsider(HOST, door.getsockname()[1], server.key, 1, True)
    task = asyncio.create_task(server.serve(door))
    try:
        yield lambda signer: OutsideStage(who, 1, NodeIdentity(signer))
    finally:
        task.cancel()
        await asyncio.wait([task])


def test_it_takes_a_place_with_its_own_layers_and_key(policy: StagePolicy, spec: StageSpec) -> None:
    """Its session is certified by its own key; a second epoch finds the layers loaded; an old one is refused."""

    async def main() -> None:
        async with serving(policy) as seen_by:
            stage = seen_by(CONTROLLER)
            await stage.ready()
            assert await stage.ping() == {}
            assert await stage.computes_fast_in("float32")
            report = await stage.take(spec, "float32")
            assert (report.certificate.key, report.party.node) == (stage.who.key, stage.who.key)
            assert (report.party.pid, report.party.ray_node, report.party.address) == (0, "", HOST)
            assert report.max_pages == MAX_PAGES_BYTES // report.profile.kv_page_bytes
            facts = await stage.ping()
            assert (facts["stage"], facts["layers"], facts["steps"]) == (1, [2, 4], 0)
            later = await stage.take(replace(spec, epoch=101), "float32")
            assert later.load_s == report.load_s and later.certificate != report.certificate
            with pytest.raises(PipelineError, match="epoch 101 is not newer than 101"):
                await stage.take(replace(spec, epoch=101), "float32")

    asyncio.run(main())


def test_it_shows_the_rows_that_it_kept_to_its_controllers_alone(policy: StagePolicy, spec: StageSpec) -> None:
    """In pieces, within its own bound; what was promised goes when it was read. Silence shows nothing."""

    async def main() -> None:
        server = StageServer(policy, HOST)
        async with serving(policy, server=server) as seen_by:
            stage, request = seen_by(CONTROLLER), bytes([1]) * 32
            rows, stranger = OutsideRows(stage), OutsideRows(seen_by(STRANGER))
            assert await rows.show(request, 0, 0) is None
            await stage.take(replace(spec, retain_bytes=1 << 40), "float32")
            assert (await stage.ping())["retain_bytes"] == MAX_RETAINED_BYTES
            assert server._host.showing is not None
            retention = server._host.showing.retention
            retention.begin(1, PAGE)
            plan, size = step([(1, 0, 8, [0, 1])], {1: 0}, [(1, 8, SEAL)]), 8 << 17
            retention.saw(plan, StepOutput(memoryview(b"i" * size), memoryview(b"o" * size), ()))
            rows.hold(request, 0, True)
            assert await soon(lambda: retention._closed[request, 0].held_until_s > 0)
            shown = b""
            while piece := await rows.show(request, 0, len(shown)):
                shown += piece
                if len(piece) < PIECE_BYTES:
                    break
            assert len(shown) > 2 * PIECE_BYTES and shown.endswith(b"i" * size + b"o" * size)
            assert await stranger.show(request, 0, 0) is None
            rows.release(request, 0, True)
            assert await soon(lambda: (request, 0) not in retention._closed)
            assert await rows.show(request, 0, 0) is None
            await stage.take(replace(spec, epoch=101), "float32")  # of a pipeline that audits nothing
            assert server._host.showing is None
        assert await rows.show(request, 0, 0) is None  # it is gone

    asyncio.run(main())


async def soon(so: Callable[[], bool]) -> bool:
    """Whether it is so within some seconds."""
    for _ in range(1000):
        if so():
            return True
        await asyncio.sleep(0.02)
    return False


def test_a_node_it_was_not_told_of_is_cut_off(policy: StagePolicy) -> None:
    async def main() -> None:
        async with serving(policy) as seen_by:
            with pytest.raises(PipelineError, match="takes no orders from this node") as refused:
                await seen_by(STRANGER).ready()
            assert key_text(STRANGER.public) in str(refused.value)

    asyncio.run(main())


def test_a_stage_with_another_key_is_not_the_one_that_was_configured(policy: StagePolicy) -> None:
    async def main() -> None:
        async with serving(policy) as seen_by:
            who = replace(seen_by(CONTROLLER).who, key=STRANGER.public)
            with pytest.raises(PipelineError, match=f"is not the node {key_text(STRANGER.public)}"):
                await OutsideStage(who, 1, NodeIdentity(CONTROLLER)).ready()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("allowed", "asked", "said"),
    [
        ({"publishers": lambda: TrustPolicy.any_of((STRANGER.public,))}, {}, "not by a trusted publisher"),
        ({"layers": (3, 4)}, {}, r"layers \[2, 4\) were asked for, and of tiny it serves \[3, 4\)"),
        ({}, {"start": 2, "stop": 5}, r"layers \[2, 5\) were asked for, and of tiny it serves \[0, 4\)"),
        ({}, {"start": 0, "stop": 2, "stage": 0}, "is not in directory"),
        ({"kv_memory_bytes": 100}, {}, "no room for a KV page"),
    ],
    ids=["publisher", "layers", "beyond the model", "not in its store", "memory"],
)
def test_what_its_operator_does_not_allow_is_refused(
    policy: StagePolicy, spec: StageSpec, allowed: dict[str, object], asked: dict[str, object], said: str
) -> None:
    """And it is no stage then."""

    async def main() -> None:
        async with serving(replace(policy, **allowed)) as seen_by:  # type: ignore[arg-type]
            stage = seen_by(CONTROLLER)
            with pytest.raises(PipelineError, match=f"it refuses: .*({said})"):
                await stage.take(replace(spec, **asked), "float32")  # type: ignore[arg-type]
            assert await stage.ping() == {}

    asyncio.run(main())


def test_it_is_of_an_epoch_until_its_neighbours_are_gone(policy: StagePolicy, spec: StageSpec) -> None:
    """Its controller learns who was lost; then the epoch is given up. Another node of the cluster may lead it too."""

    async def main() -> None:
        async with serving(policy, give_up_s=0.1) as seen_by:
            stage, other = seen_by(CONTROLLER), seen_by(OTHER)
            await stage.take(spec, "float32")
            with pytest.raises(PipelineError, match="no stage of epoch 0 any more"):
                await command(other, Connect(0, joint("the head"), None, 1, 1))
            neighbour = Signer.fresh()
            edge = await open_edge(stage, neighbour)
            with pytest.raises(PipelineError, match="epoch 100 has its listen already"):
                await open_edge(stage, neighbour)
            trouble = asyncio.create_task(stage.trouble(spec.epoch))
            edge.close_abruptly()
            assert (await asyncio.wait_for(trouble, 5)).gone == {"stage 0"}
            for _ in range(100):
                if await stage.ping() == {}:
                    break
                await asyncio.sleep(0.05)
            assert (await stage.trouble(spec.epoch)).gone == frozenset()
            await other.take(replace(spec, epoch=101), "float32")
            await other.take(replace(spec, epoch=102), "float32")
            assert (await stage.trouble(101)).gone == frozenset()

    asyncio.run(main())


def test_it_runs_without_ray() -> None:
    """No module of Ray's is loaded by what a stage of another operator runs."""
    program = "import sys, serve_app.cluster.stage_server, serve_app.engine.load; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_stage_that_leaves_says_so_and_is_not_waited_for(policy: StagePolicy, spec: StageSpec) -> None:
    async def main() -> None:
        server, door = StageServer(policy, HOST), socket.create_server((HOST, 0))
        stage = OutsideStage(Outsider(HOST, door.getsockname()[1], server.key, 60, True), 1, NodeIdentity(CONTROLLER))
        task = asyncio.create_task(server.serve(door))
        await stage.take(spec, "float32")
        trouble = asyncio.create_task(stage.trouble(spec.epoch))
        await asyncio.sleep(0.1)
        await server.part()
        assert (await trouble).gone == {"stage 1"}
        assert not await stage.comes_back()
        with pytest.raises(PipelineError, match="it leaves"):
            await stage.take(replace(spec, epoch=101), "float32")
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())


def test_more_pages_than_it_has_room_for_are_refused(policy: StagePolicy, spec: StageSpec) -> None:
    async def main() -> None:
        async with serving(policy) as seen_by:
            stage = seen_by(CONTROLLER)
            report = await stage.take(spec, "float32")
            assert report.max_pages is not None
            with pytest.raises(PipelineError, match="KV pages were asked for, and it has room for"):
                await stage.connect(joint("the head"), None, report.max_pages + 1, 1)

    asyncio.run(main())


def test_a_neighbour_with_another_key_finds_no_way_in(policy: StagePolicy, spec: StageSpec) -> None:
    async def main() -> None:
        async with serving(policy) as seen_by:
            stage = seen_by(CONTROLLER)
            await stage.take(spec, "float32")
            with pytest.raises(PipelineError, match=r"is not the node|does not expect|ended the connection"):
                await open_edge(stage, Signer.fresh(), shows=STRANGER)

    asyncio.run(main())


@pytest.mark.parametrize(
    "frame", [struct.pack("<I", 1 << 31), struct.pack("<I", 4) + b"\x80\x04.\n"], ids=["long", "no"]
)
def test_bytes_that_are_no_order_cost_nothing(policy: StagePolicy, frame: bytes) -> None:
    """A frame past the bound is not waited for, pickles are not looked into; the stage goes on."""

    async def main() -> None:
        async with serving(policy) as seen_by:
            stage = seen_by(CONTROLLER)
            context = tls_context(credentials(CONTROLLER), frozenset((stage.who.key,)), listens=False)
            reader, writer = await asyncio.open_connection(HOST, stage.who.port, ssl=context)
            writer.write(frame)
            said = await asyncio.wait_for(reader.read(1000), 3)
            assert said == b"" or b"not canonical DAG-CBOR" in said
            writer.transport.abort()
            await stage.ready()

    asyncio.run(main())


def test_strangers_that_only_hold_the_door_keep_nobody_out(policy: StagePolicy) -> None:
    async def main() -> None:
        async with serving(policy) as seen_by:
            stage = seen_by(CONTROLLER)
            crowd = [socket.create_connection((HOST, stage.who.port)) for _ in range(100)]
            await asyncio.wait_for(stage.ready(), 5)
            for one in crowd:
                one.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (lambda session: session(Signer.fresh(), "stage", 100), "is not in registry|is signed by|not in registry"),
        (lambda session: session(None, "stage", 99), "its session is of epoch 99, and this is 100"),
        (lambda session: session(None, "head", 100), "for the role head, and was used as stage"),
        (lambda session: session(None, "stage", 100), "ends at .* too soon"),
    ],
    ids=["another node's", "another epoch's", "a Head's", "one that ends soon"],
)
def test_a_certificate_that_is_not_its_own_for_this_epoch_is_refused(
    policy: StagePolicy, spec: StageSpec, lie: Callable[..., object], said: str
) -> None:
    """A real stage behind one that changes what it answers."""
    liar = Signer.fresh()

    def session(node: Signer | None, role: str, epoch: int) -> object:
        identity = NodeIdentity(node or liar)
        return identity.open_session(role, epoch, int(time.time()), 600).certificate.to_value()  # type: ignore[arg-type]

    async def main() -> None:
        honest = StageServer(policy, HOST)

        async def obey(who: PublicKey, order: bytes) -> bytes:
            said = await honest.obey(who, order)
            value = read_answer(said, "it")
            assert isinstance(value, dict)
            return answer(value | {"certificate": lie(session)})  # type: ignore[dict-item]

        async with answering(liar, obey) as port:
            who = Outsider(HOST, port, liar.public, 1, True)
            with pytest.raises(PipelineError, match=said):
                await OutsideStage(who, 1, NodeIdentity(CONTROLLER)).take(spec, "float32")

    asyncio.run(main())


def test_one_that_cannot_be_reached_is_waited_for_and_then_given_up(policy: StagePolicy) -> None:
    async def main() -> None:
        with socket.create_server((HOST, 0)) as nobody:
            port = nobody.getsockname()[1]
        who = Outsider(HOST, port, STRANGER.public, 0, True)
        assert not await OutsideStage(who, 1, NodeIdentity(CONTROLLER)).comes_back()
        async with serving(policy) as seen_by:
            assert await seen_by(CONTROLLER).comes_back()

    asyncio.run(main())


def test_a_caller_that_leaves_is_not_answered_for_ever() -> None:
    """Whoever asks for trouble and hangs up leaves no task behind."""
    ended = threading.Event()
    me = Signer.fresh()

    async def never(who: PublicKey, order: bytes) -> bytes:
        assert decode_order(order) == TellTrouble(7)
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()
        return b""

    async def main() -> None:
        async with answering(me, never) as port:
            asking = asyncio.create_task(
                ask(HOST, port, me.public, credentials(CONTROLLER), encode_order(TellTrouble(7)))
            )
            await asyncio.sleep(0.3)
            asking.cancel()
            assert await asyncio.to_thread(ended.wait, 5)

    asyncio.run(main())


@asynccontextmanager
async def answering(me: Signer, answer: Callable[[PublicKey, bytes], Awaitable[bytes]]) -> AsyncIterator[int]:
    door = socket.create_server((HOST, 0))
    port: int = door.getsockname()[1]
    listener = CallListener(lambda: credentials(me), frozenset((CONTROLLER.public,)), answer)
    task = asyncio.create_task(listener.serve(door))
    try:
        yield port
    finally:
        task.cancel()
        await asyncio.wait([task])


class OpenEdge:
    """From stage 0 to the stage; ends as a process that is killed ends it."""

    def __init__(self, edge: object, tls: ssl.SSLSocket) -> None:
        self._edge, self._tls = edge, tls

    def close_abruptly(self) -> None:
        self._tls.shutdown(socket.SHUT_RDWR)


async def open_edge(stage: OutsideStage, neighbour: Signer, shows: Signer | None = None) -> OpenEdge:
    name = "stage 0 > stage 1 (100)"
    address = await stage.listen([Awaited(name, "tcp", Peer("stage 0", neighbour.public, 0))])
    assert address is not None
    outlet = Outlet(name, "tcp", Peer("stage 1", stage.who.key, 0), address)
    edge = await asyncio.to_thread(dial_tcp, outlet, 100, credentials(shows or neighbour), lambda peer, why: None)
    return OpenEdge(edge, edge._tls)


def joint(name: str) -> Joint:
    return Joint("e", "tcp", Peer(name, STRANGER.public, 0), EdgeAddress(None, HOST, 1), None)


async def command(stage: OutsideStage, order: Connect) -> object:
    who = stage.who
    return read_answer(await ask(who.host, who.port, who.key, credentials(OTHER), encode_order(order)), "it")


def credentials(signer: Signer) -> bytes:
    return signer.certify_tls(int(time.time()), 600)
