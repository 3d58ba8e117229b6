"""Leaves out of the original files, by ranges over HTTP: from a server that gives them, and from those that do not."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from shard_tools import canonical
from shard_tools.block_server import BlockServer
from shard_tools.checkpoint.original import original_ranges
from shard_tools.checkpoint.source import open_checkpoint
from shard_tools.cid import Cid, Codec
from shard_tools.errors import (
    CorruptBlockError,
    FormatError,
    InputError,
    LlmdError,
    NotFoundError,
    UnavailableError,
    UnreachableError,
)
from shard_tools.fetch import fetch, load_manifest, verify
from shard_tools.http_client import Patience
from shard_tools.index.directory import DirectoryIndex
from shard_tools.manifest import Manifest
from shard_tools.publish import publish
from shard_tools.ranges import MAX_OFFSET, Place, RangeMap, RangeMaps, read_map
from shard_tools.signing import Signer
from shard_tools.sources import open_pulling, open_tiered, outside
from shard_tools.store.directory import DirectoryStore
from shard_tools.store.hub import HubSource
from shard_tools.store.peers import Peers
from shard_tools.store.tiered import TieredStore
from tests.shard_tools.http_doubles import answering, ok, saying, serving
from tests.shard_tools.test_cli import Desk, refusal
from tests.shard_tools.test_replication import Late
from tests.tiny_models import write_tiny_checkpoint

SECRET = bytes(32)
REVISION = "/org/tiny/resolve/main"


class Published:
    """A model of several files, and the folder it was made of."""

    def __init__(self, root: Path) -> None:
        self.folder = write_tiny_checkpoint(root / "ck", layers=2, hidden=128, dtype="bfloat16", max_shard_size="300KB")
        self.root = root / "store"
        self.store = DirectoryStore(self.root)
        index, maps = DirectoryIndex(self.root), RangeMaps(self.root)
        self.record = publish(self.folder, self.store, index, "tiny", Signer.from_seed(bytes(32)), ranges=maps)
        self.model = load_manifest(self.store, self.record.manifest)
        self.ranges = self.root / "ranges" / str(self.model.cid)
        self.weights = [leaf for s in self.model.shards for t in s.tensors for leaf in t.leaves]

    def without_weights(self, root: Path) -> Path:
        """A mirror that has all but the weights."""
        store, leaves = DirectoryStore(root), {leaf.cid for leaf in self.weights}
        for cid in self.store.cids():
            if cid not in leaves:
                store.put(cid.codec, self.store.get(cid))
        return root


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published(tmp_path_factory.mktemp("published"))


class Hub:
    """Serves a folder as the Hub does: /resolve/ leads to an object store, to a signed address that gives ranges."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mode, self.signature = folder, "ranges", 1
        self.asked: Counter[str] = Counter()
        self.sent: list[dict[str, str]] = []


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, Hub]]:
    """The address of the folder on such a server. mode: ranges, whole, wrong, short, loop, moved."""
    state = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            state.sent.append(dict(self.headers))
            if path.startswith("/org/"):
                state.asked["resolve"] += 1
                there = f"/objects/{path.rpartition('/')[2]}?sig={state.signature}"
                self._say(302, b"", Location=self.path if state.mode == "loop" else there)
                return
            state.asked["object"] += 1
            file = state.folder / path.rpartition("/")[2]
            if query != f"sig={state.signature}":
                self._say(403, b"the signature has run out")
            elif not file.exists():
                self._say(404, b"no such file")
            else:
                self._part(file.read_bytes())

        def _part(self, data: bytes) -> None:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1]
            if state.mode == "whole":
                self._say(200, data)
            elif not part:
                self._say(416, b"")
            else:
                part = {"wrong": b"?" * len(part), "short": part[:-1]}.get(state.mode, part)
                self._say(206, part, **{"Content-Range": f"bytes {first}-{last}/{len(data)}"})

        def _say(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:  # a client that wants no whole file hangs up
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Handler) as url:
        yield f"{url}{REVISION}", state


def source(published: Published, url: str) -> HubSource:
    found = read_map(published.ranges)
    return HubSource(url, lambda: found.spans(published.model), Patience(answer_s=5))


def test_a_published_model_has_a_map_that_tells_the_truth(published: Published) -> None:
    """Every leaf of a weight, and no other block, is the run of the file that the map says."""
    spans = read_map(published.ranges).spans(published.model)
    assert spans.keys() == {leaf.cid for leaf in published.weights} and len({s.file for s in spans.values()}) > 2
    for cid, span in spans.items():
        data = (published.folder / span.file).read_bytes()[span.start : span.stop]
        assert Cid.of(Codec.RAW, data) == cid
    names = [t.name for s in published.model.shards for t in s.tensors]
    with safe_open(published.folder / next(iter(spans.values())).file, "pt") as f:
        assert set(f.keys()) <= set(names)


def test_weights_come_from_the_hub_and_the_rest_from_elsewhere(published: Published, tmp_path: Path) -> None:
    mirror = published.without_weights(tmp_path / "mirror")
    with hub(published.folder) as (url, state):
        there = open_tiered(cache=str(tmp_path / "c"), mirrors=str(mirror), hub=url, hub_ranges=str(published.ranges))
        target = DirectoryStore(tmp_path / "c")
        assert fetch(there, target, published.model.cid, threads=1) == published.model
        assert verify(target, published.model) == []
        assert state.asked["object"] == len({leaf.cid for leaf in published.weights})
        assert state.asked["resolve"] == len(read_map(published.ranges).files), "a redirect is remembered"
        assert not any("Authorization" in headers or "Cookie" in headers for headers in state.sent)


def test_what_is_no_run_of_the_original_is_not_asked_for(published: Published) -> None:
    with hub(published.folder) as (url, state):
        there, header = source(published, url), published.model.shards[0].header.cid
        for cid in (header, published.model.cid, published.model.files[0].cid):
            assert not there.has(cid)
            with pytest.raises(NotFoundError, match="no run of bytes"):
                there.get(cid)
        assert there.has(published.weights[0].cid) and state.asked["object"] == 1


@pytest.mark.parametrize(
    ("mode", "error", "said"),
    [
        ("whole", UnreachableError, "answers with the whole file"),
        ("wrong", CorruptBlockError, "altered or cut short"),
        ("short", CorruptBlockError, "altered or cut short"),
        ("loop", UnreachableError, "more than 3 times"),
    ],
)
def test_a_server_that_gives_no_right_range_is_found_out_and_passed_over(
    published: Published, tmp_path: Path, mode: str, error: type[LlmdError], said: str
) -> None:
    """The block then comes from who has it; where nobody has, the error says what the hub did."""
    leaf = published.weights[0].cid
    with hub(published.folder) as (url, state):
        state.mode = mode
        with pytest.raises(error, match=said):
            source(published, url).get(leaf)
        options = {"hub": url, "hub_ranges": str(published.ranges)}
        bare = str(published.without_weights(tmp_path / "bare"))
        store = open_tiered(cache=str(tmp_path / "a"), mirrors=bare, **options)
        load_manifest(store, published.model.cid)
        with pytest.raises(UnavailableError, match=f"hub {url}: "):
            store.get(leaf)
        store = open_tiered(cache=str(tmp_path / "b"), mirrors=str(published.root), **options)
        assert store.get(leaf) == published.store.get(leaf)


def test_a_signed_address_that_ran_out_is_fetched_anew(published: Published) -> None:
    with hub(published.folder) as (url, state):
        there = source(published, url)
        one, two = published.weights[0].cid, published.weights[1].cid
        assert there.get(one) == published.store.get(one)
        state.signature = 2
        assert there.get(two) == published.store.get(two) == there.get(two)
        assert state.asked["resolve"] <= 3
        there._moved[next(iter(there._moved))] = "http://127.0.0.1:1/gone", time.monotonic() + 60
        assert there.get(one) == published.store.get(one) and there.get(two) == published.store.get(two)


def test_a_file_that_is_missing_or_too_short_is_a_missing_block(published: Published, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    with hub(tmp_path / "files") as (url, _):
        there = source(published, url)
        assert not there.has(published.weights[0].cid)
        with pytest.raises(NotFoundError, match="HTTP 404: no such file"):
            there.get(published.weights[0].cid)
    for file in published.folder.glob("*.safetensors"):
        (tmp_path / "files" / file.name).write_bytes(b"short")
    with hub(tmp_path / "files") as (url, _), pytest.raises(NotFoundError, match="HTTP 416"):
        source(published, url).get(published.weights[-1].cid)


@pytest.mark.parametrize("location", ["", "ftp://x/y", "http://u:p@127.0.0.1/x", "http://[::1", "file:///etc/passwd"])
def test_a_redirect_to_anywhere_else_than_a_web_server_is_not_followed(published: Published, location: str) -> None:
    answer = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
    with answering(saying(answer)) as url, pytest.raises(UnreachableError, match=r"leads to|cannot be asked"):
        source(published, url).get(published.weights[0].cid)


def test_https_never_leads_to_http() -> None:
    with pytest.raises(UnreachableError, match="leads to 'http://127"):
        HubSource("https://x", dict, Patience())._next("https://x/f", "http://127.0.0.1/f")


def test_a_part_that_is_larger_than_a_block_is_not_read(published: Published) -> None:
    data = ok(b"", size=1 << 30).replace(b"200 OK", b"206 Partial Content")
    with answering(saying(data)) as url, pytest.raises(UnreachableError, match="1073741824 bytes"):
        source(published, url).get(published.weights[0].cid)


def test_a_converted_or_quantised_tensor_is_in_no_map(published: Published, tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for dtype, scheme, mapped in (("keep", "none", True), ("float32", "none", False), ("keep", "int8", True)):
        words = ("shard", published.folder, "--name", "m", "--dtype", dtype, "--quantise", scheme)
        done = desk.run(*words)
        assert done.exit_code == 0, done.output
        cid = next(word for word in done.stdout.split() if word.startswith("bafyrei"))
        path = desk.store / "ranges" / cid
        assert path.exists() == mapped == (f"--ranges {path}" in done.stdout)
        if scheme == "int8":
            model = load_manifest(DirectoryStore(desk.store), Cid.parse(cid))
            found = {model.shards[p.shard].tensors[p.tensor].dtype for p in read_map(path).places}
            assert found == {"bfloat16"}
    assert desk.run("gc", "--grace-s", 0).exit_code == 0
    assert list((desk.store / "ranges").iterdir()) == [], "the map of a model that is not kept goes with it"


def test_renamed_tensors_are_placed_and_stacked_ones_are_not(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "ck", "mixtral", layers=1)
    store = DirectoryStore(tmp_path / "store")
    record = publish(folder, store, DirectoryIndex(tmp_path / "store"), "m", Signer.from_seed(bytes(32)))
    model = load_manifest(store, record.manifest)
    found = original_ranges(open_checkpoint(folder), model)
    assert found is not None
    placed = {model.shards[p.shard].tensors[p.tensor].name for p in found.places}
    names = {t.name for s in model.shards for t in s.tensors}
    assert {name for name in names - placed} == {name for name in names if ".experts." in name}
    data = (folder / "model.safetensors").read_bytes()
    assert all(Cid.of(Codec.RAW, data[s.start : s.stop]) == cid for cid, s in found.spans(model).items())


def test_the_command_fetches_by_name_with_the_hub_for_weights(published: Published, tmp_path: Path) -> None:
    desk, mirror = Desk(tmp_path / "desk"), published.without_weights(tmp_path / "mirror")
    trust = ("--trust", "llmd-ed25519:" + Signer.from_seed(bytes(32)).public.hex())
    with hub(published.folder) as (url, _):
        words = ("fetch", "tiny", "--mirror", mirror, "--index", published.root, "--hub", url)
        done = desk.run(*words, "--ranges", published.ranges, *trust)
        assert done.exit_code == 0, done.output
        assert "give both" in refusal(desk.run(*words, *trust))
        assert "cannot read the range map" in refusal(desk.run(*words, "--ranges", tmp_path / "none", *trust))
    assert desk.run("verify", "tiny", *trust).exit_code == 0


def test_a_clusters_nodes_take_each_weight_from_the_hub_once(published: Published, tmp_path: Path) -> None:
    """A node that never had the manifest serves a leaf all the same: it gets the manifest from the others."""
    mirror = str(published.without_weights(tmp_path / "mirror"))
    stores = [DirectoryStore(tmp_path / f"node{i}") for i in range(2)]
    late = [Late(), Late()]
    servers = [BlockServer(s, "127.0.0.1", 0, SECRET, pull) for s, pull in zip(stores, late, strict=True)]
    peers = Peers([f"http://127.0.0.1:{server.port}" for server in servers], SECRET, Patience())
    with hub(published.folder) as (url, state):
        for i, pull in enumerate(late):
            far, words = outside("", "", mirror, Patience()), (url, str(published.ranges))
            pull.source = open_pulling(stores[i], tmp_path / f"node{i}", peers, far, *words)
        try:
            for i in range(3):
                target = DirectoryStore(tmp_path / f"target{i}")
                there = TieredStore(target, tmp_path / f"lock{i}", peers.order)
                assert fetch(there, target, published.model.cid) == published.model
        finally:
            for server in servers:
                server.close()
        assert state.asked["object"] == len({leaf.cid for leaf in published.weights})


def test_a_store_of_a_config_names_both_or_neither(tmp_path: Path, published: Published) -> None:
    for options in ({"hub": "https://x"}, {"hub_ranges": str(published.ranges)}):
        with pytest.raises(InputError, match="give both"):
            open_tiered(cache=str(tmp_path), mirrors="/x", **options)
    with pytest.raises(InputError, match="is no address"):
        open_tiered(cache=str(tmp_path), hub="huggingface.co/x", hub_ranges=str(published.ranges))


@given(data=st.data())
def test_a_map_reads_back_as_it_was_written_and_nothing_else_is_a_map(data: st.DataObject) -> None:
    files = tuple(data.draw(st.lists(st.sampled_from(["a.safetensors", "b-1.safetensors"]), min_size=1, max_size=3)))
    keys = sorted(data.draw(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5)))
    offsets = st.integers(0, MAX_OFFSET)
    places = tuple(Place(i, k, data.draw(st.integers(0, len(files) - 1)), data.draw(offsets)) for i, k in keys)
    found = RangeMap(Cid.of(Codec.DAG_CBOR, b"m"), files, places)
    block = found.encode()
    assert RangeMap.decode(block) == found
    at = data.draw(st.integers(0, len(block) - 1))
    flipped = block[:at] + bytes([block[at] ^ data.draw(st.integers(1, 255))]) + block[at + 1 :]
    try:
        assert RangeMap.decode(flipped) != found
    except FormatError:
        pass


@pytest.mark.parametrize(
    ("files", "places"),
    [
        (["../x.safetensors"], []),
        (["a/b.safetensors"], []),
        (["/etc/passwd"], []),
        (["a.safetensors"], [[0, 0, 1, 0]]),
        (["a.safetensors"], [[0, 0, 0, -1]]),
        (["a.safetensors"], [[0, 0, 0, MAX_OFFSET + 1]]),
        (["a.safetensors"], [[1, 0, 0, 0], [0, 0, 0, 0]]),
        (["a.safetensors"], [[0, 0, 0, 0], [0, 0, 0, 1]]),
        (["a.safetensors"], [[0, 0, 0]]),
    ],
)
def test_a_map_out_of_bounds_is_refused(files: list[str], places: list[list[int]]) -> None:
    value = {"v": 1, "manifest": Cid.of(Codec.DAG_CBOR, b"m"), "files": files, "places": places}
    with pytest.raises(FormatError):
        RangeMap.decode(canonical.encode(value))  # type: ignore[arg-type]


def test_a_map_of_another_model_or_of_no_tensor_of_it_is_refused(published: Published) -> None:
    model: Manifest = published.model
    with pytest.raises(FormatError, match="not of"):
        RangeMap(Cid.of(Codec.DAG_CBOR, b"m"), (), ()).spans(model)
    with pytest.raises(FormatError, match="no tensor"):
        RangeMap(model.cid, ("a.safetensors",), (Place(99, 0, 0, 0),)).spans(model)
