"""An IPFS node's RPC that answers well, as Kubo's documentation says it does, and badly: no node is needed.

What js-ipfs really answers is tested in tests/contracts/test_ipfs_node.py. Kubo's lines here are written from its
documentation (https://docs.ipfs.tech/reference/kubo/rpc/), not recorded: no Kubo with an RPC was at hand.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from shard_tools.choice import Choice
from shard_tools.cid import Cid, Codec
from shard_tools.errors import CorruptBlockError, FormatError, InputError, LlmdError, NotFoundError, UnreachableError
from shard_tools.http_client import Patience
from shard_tools.index.indexes import open_index
from shard_tools.store.ipfs import IpfsNode
from tests.shard_tools.http_doubles import answering, dripping, saying, silent

BLOCK = b"block" * 100
CID = Cid.of(Codec.RAW, BLOCK)
NAME = "k51qzi5uqu5dlvj2baxnqndepeb86cbk3ng7n3i46uzyxzyqj2xjonzllnv0v8"
Answers = dict[str, Callable[[dict[str, list[str]]], bytes | dict[str, Any] | list[Any]]]


class Refused(Exception):
    """Kubo's error: HTTP 500 with a message."""


@contextmanager
def kubo(answers: Answers, asked: list[tuple[str, dict[str, list[str]]]] | None = None) -> Iterator[str]:
    """The RPC address of a node that answers each command so: with bytes, an object, or lines of objects."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self._drain()
            parts = urlsplit(self.path)
            command, query = parts.path.removeprefix("/api/v0/"), parse_qs(parts.query)
            if asked is not None:
                asked.append((command, query))
            try:
                said = answers[command](query)
            except Refused as e:
                self._send(500, json.dumps({"Message": str(e), "Code": 0, "Type": "error"}).encode())
                return
            except KeyError:  # as Kubo says of object/*, dht/* and others that it has dropped
                self._send(404, b"404 page not found")
                return
            lines = said if isinstance(said, list) else [said]
            self._send(
                200, said if isinstance(said, bytes) else b"".join(json.dumps(x).encode() + b"\n" for x in lines)
            )

        def _drain(self) -> None:
            if self.headers.get("transfer-encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    self.rfile.read(size + 2)
                self.rfile.readline()
            else:
                self.rfile.read(int(self.headers.get("content-length", 0)))

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"/ip4/127.0.0.1/tcp/{server.server_port}/http"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def refusing(message: str) -> Callable[[object], bytes]:
    def refuse(_: object) -> bytes:
        raise Refused(message)

    return refuse


def node(api: str, answer_s: float = 3.0) -> IpfsNode:
    return IpfsNode(api, Patience(connect_s=1, answer_s=answer_s))


def api_of(url: str) -> str:
    return f"/ip4/127.0.0.1/tcp/{url.rsplit(':', 1)[1]}/http"


def test_blocks_pins_and_versions_of_kubo_are_understood() -> None:
    asked: list[tuple[str, dict[str, list[str]]]] = []
    answers: Answers = {
        "block/get": lambda _: BLOCK,
        "block/stat": lambda _: {"Key": str(CID), "Size": len(BLOCK)},
        "pin/add": lambda _: {"Pins": [str(CID)]},
        "pin/ls": lambda _: {"Keys": {str(CID): {"Type": "recursive", "Name": ""}}},
        "pin/rm": lambda _: {"Pins": [str(CID)]},
        "version": lambda _: {
            "Version": "0.40.1",
            "Commit": "",
            "Repo": "18",
            "System": "amd64/linux",
            "Golang": "go1.26",
        },
        "dag/import": lambda _: [{"Root": {"Cid": {"/": str(CID)}, "PinErrorMsg": ""}}],
    }
    with kubo(answers, asked) as api:
        there = node(api)
        assert there.get(CID) == BLOCK and there.has(CID) and there.pinned(CID) and there.version() == "0.40.1"
        there.put([CID], [(CID, BLOCK)], pin=True)
        there.unpin(CID)
    options = dict(asked)
    assert options["block/get"]["timeout"] == ["2.700s"] and options["dag/import"]["pin-roots"] == ["true"]
    assert options["pin/add"]["recursive"] == ["True"] or options["pin/add"]["recursive"] == ["true"]


def test_what_kubo_does_not_have_is_missing_and_says_so() -> None:
    missing = f"block was not found locally (offline): ipld: could not find {CID}"
    refuse = refusing(missing)
    answers: Answers = {"block/get": refuse, "block/stat": refuse, "pin/ls": refusing(f"path '{CID}' is not pinned")}
    with kubo(answers) as api:
        there = node(api)
        with pytest.raises(NotFoundError, match="not found locally"):
            there.get(CID)
        assert not there.has(CID) and not there.pinned(CID)
        there.unpin(CID)


def test_a_node_that_lies_is_found_out() -> None:
    with kubo({"block/get": lambda _: b"wrong" * 100}) as api, pytest.raises(CorruptBlockError, match="IPFS node"):
        node(api).get(CID)


def test_a_node_that_cannot_pin_what_it_was_given_is_heard() -> None:
    failed = {"Root": {"Cid": {"/": str(CID)}, "PinErrorMsg": "pin: context deadline exceeded"}}
    with kubo({"dag/import": lambda _: [failed]}) as api, pytest.raises(UnreachableError, match="deadline exceeded"):
        node(api).put([CID], [(CID, BLOCK)], pin=True)


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n" + bytes(3_000_000),
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nshort",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 5\r\n\r\n<oops",
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0\r\n",
        b"",
    ],
    ids=["endless", "short", "500-html", "403", "ssh", "nothing"],
)
def test_answers_that_are_none_become_our_errors(said: bytes) -> None:
    with answering(saying(said)) as url:
        there = node(api_of(url))
        for ask in (there.get, there.pin, lambda _: there.version()):
            with pytest.raises(LlmdError, match="IPFS node"):
                ask(CID)


def test_a_node_that_stalls_costs_no_more_than_its_time() -> None:
    drip = dripping(b"x", 0.05)
    for answer in (silent, lambda s: (s.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"), drip(s))):
        with answering(answer) as url, pytest.raises(UnreachableError, match=r"did not answer|in time|cannot be asked"):
            node(api_of(url), answer_s=0.5).get(CID)


def test_a_node_that_does_not_run_is_said_to_be_so() -> None:
    with pytest.raises(UnreachableError, match="Does it run"):
        node("/ip4/127.0.0.1/tcp/1/http").version()
    with pytest.raises(InputError, match="expected one such as /ip4"):
        node("http://127.0.0.1:5001")


def test_names_of_ipns_lead_to_what_they_were_published_for() -> None:
    other = str(Cid.of(Codec.DAG_CBOR, b"x"))
    answers: Answers = {
        "name/resolve": lambda _: {"Path": f"/ipfs/{other}"},
        "name/publish": lambda _: {"Name": NAME, "Value": f"/ipfs/{other}"},
        "key/list": lambda _: {"Keys": [{"Name": "self", "Id": NAME}]},
    }
    with kubo(answers) as api:
        there = node(api)
        assert str(there.resolve_name(NAME)) == other and there.publish_name(CID, "self") == NAME
        assert there.name_of("self") == NAME
        with pytest.raises(InputError, match="ipfs key gen"):
            there.name_of("nope")
    for path in ("/ipns/x", "/ipfs/QmW2WQi7j6c7UgJTarActp7tDNikE4B2qXtFCfLPdsgaTQ", ""):
        with kubo({"name/resolve": lambda _, p=path: {"Path": p}}) as api, pytest.raises(FormatError):
            node(api).resolve_name(NAME)
    with kubo({"name/resolve": lambda _: ["nonsense"]}) as api, pytest.raises(UnreachableError):
        node(api).resolve_name(NAME)


def test_a_catalogue_that_is_none_is_refused() -> None:
    block = b"\xa0"
    cid = Cid.of(Codec.DAG_CBOR, block)
    answers: Answers = {"name/resolve": lambda _: {"Path": f"/ipfs/{cid}"}, "block/get": lambda _: block}
    with kubo(answers) as api, pytest.raises(FormatError, match="catalogue"):
        open_index(Choice.of("ipns", name=NAME, api=api)).resolve("m")
