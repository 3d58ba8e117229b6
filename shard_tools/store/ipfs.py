"""An IPFS node over its RPC: blocks from wherever the node finds them (bitswap), and whole models in and out of it.

A BlockSource, and no BlockStore: a node files blocks by hash alone and forgets their codec, so it cannot list what it
holds as CIDs. Put a directory in front of it (tiered.py). The node is never believed: every block is hashed here,
and blocks go in as a CAR, never through `add`, which would cut files elsewhere and so name them otherwise.

The RPC port commands the node: keep it on loopback, or behind its API.Authorizations. The only home of the package
ipfshttpclient. That is 0.7.0 of 2021: `connect()` refuses every node of today, so it is not used; options go as `opts`
or keywords; its calls wait for two minutes unless told; its errors come in three families, all of which become ours.
Single blocks, which strangers have made, are asked of the same RPC by our own client: the library reads a whole
answer, of whatever length and however slowly it drips, before it gives the first byte.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import NamedTemporaryFile
from typing import Any

from shard_tools.cid import Cid
from shard_tools.errors import InputError, NotFoundError, UnreachableError
from shard_tools.http_client import HttpClient, Patience, printable
from shard_tools.store.block_store import MAX_BLOCK_BYTES, check_block
from shard_tools.store.car import write_car

try:
    import ipfshttpclient
    from ipfshttpclient.exceptions import AddressError, ErrorResponse
    from ipfshttpclient.exceptions import Error as ClientError
    from requests.exceptions import RequestException
    from urllib3.exceptions import HTTPError
except ImportError as e:
    raise InputError(f"an IPFS node is asked by the package ipfshttpclient ({e}): pip install 'llm-d[ipfs]'") from e

# It hands urllib3 a keyword that urllib3 2 warns of at every call; urllib3 3 would refuse it, and is excluded.
warnings.filterwarnings("ignore", message="The 'strict' parameter", category=FutureWarning)

_ITS_MISTAKES = (ValueError, LookupError, TypeError, AttributeError, AssertionError)  # over answers it did not expect

DEFAULT_API = "/ip4/127.0.0.1/tcp/5001/http"
_MULTIADDR = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([0-9A-Za-z.:-]{1,253})/tcp/(\d{1,5})(?:/(https?))?")
_STAT_BYTES = 4 << 10
_LOCAL_S = 1.0  # for a question about the node itself; js-ipfs asks the network all the same, and is cut off
_NAME_LIFETIME = "720h"  # 30 days: how long the network keeps a record; releases have an expiry of their own
_IMPORT_S = 600.0  # for a whole model; the node writes 40 to 100 MB/s


class IpfsNode:
    """One node. Threads share it."""

    def __init__(self, api: str = DEFAULT_API, patience: Patience | None = None) -> None:
        """api: a multiaddr such as DEFAULT_API. Raises InputError for what is none; asks nothing yet."""
        self._api, self._patience = api, patience or Patience()
        self._blocks = HttpClient(_url(api), self.label, self._patience)
        try:
            self._client: Any = ipfshttpclient.Client(api, session=True, timeout=self._timeout(_LOCAL_S))
        except AddressError as e:
            raise _no_address(api) from e

    @property
    def label(self) -> str:
        return f"IPFS node {self._api}"

    def get(self, cid: Cid) -> bytes:
        answer = self._blocks.ask("POST", self._command("get", cid, self._patience.answer_s), "*/*", MAX_BLOCK_BYTES)
        if answer.status == 500:  # what the node says where it finds nothing, or not in time
            raise NotFoundError(f"block {cid}", f"reach of the {self.label}", f"It says: {_message(answer.said)}")
        if answer.status != 200:
            raise UnreachableError(self.label, answer.problem())
        return check_block(cid, answer.body, self.label)

    def has(self, cid: Cid) -> bool:
        answer = self._blocks.ask("POST", self._command("stat", cid, _LOCAL_S) + "&offline=true", "*/*", _STAT_BYTES)
        if answer.status not in (200, 500):
            raise UnreachableError(self.label, answer.problem())
        return answer.status == 200

    def put(self, roots: Sequence[Cid], blocks: Iterable[tuple[Cid, bytes]], pin: bool) -> None:
        """The node holds the blocks. pin: and keeps all that the roots link.

        One CAR for all: block by block costs js-ipfs 23 ms each. Raises UnreachableError.
        """
        with NamedTemporaryFile() as file:  # on disk: a model is larger than memory; the library wants a name
            write_car(file.file, roots, blocks)
            file.seek(0)
            opts = {"pin-roots": "true" if pin else "false"}
            with (
                self._asking(refused=True),
                # As a stream, because the library insists on one line of answer, and there may be none or several.
                self._client.dag.imprt(file, stream=True, opts=opts, timeout=self._timeout(_IMPORT_S)) as said,
            ):
                problems = [
                    str(line["Root"]["PinErrorMsg"]) for line in said if line.get("Root", {}).get("PinErrorMsg")
                ]
        if problems:
            raise UnreachableError(self.label, f"has the blocks and cannot pin them: {printable(problems[0])}")
        for cid in roots if pin else ():  # js-ipfs pins roots only if it is told so twice
            self.pin(cid)

    def pin(self, cid: Cid) -> None:
        """The node keeps the block and all it links, and fetches what is missing. Raises UnreachableError."""
        with self._asking(refused=True):
            self._client.pin.add(str(cid), recursive=True, timeout=self._timeout(_IMPORT_S))

    def unpin(self, cid: Cid) -> None:
        """The node may forget it; nothing happens if it was not pinned. Raises UnreachableError."""
        if self.pinned(cid):
            with self._asking(refused=True):
                self._client.pin.rm(str(cid), recursive=True)

    def pinned(self, cid: Cid) -> bool:
        """Whether the node keeps the block and all it links."""
        try:
            with self._asking():
                self._client.pin.ls(str(cid), type="recursive")
        except ErrorResponse:
            return False
        return True

    def name_of(self, key: str) -> str:
        """The IPNS name of the node's key of this name. Raises InputError if there is none."""
        with self._asking(refused=True):
            keys = {str(item["Name"]): str(item["Id"]) for item in self._client.key.list()["Keys"]}
        if key not in keys:
            known = ", ".join(sorted(keys)[:20])
            raise InputError(f"the {self.label} has no key {key[:100]!r}; it has {known}. Make one: ipfs key gen NAME")
        return keys[key]

    def publish_name(self, cid: Cid, key: str) -> str:
        """The node's key of this name points at the block; returns the key's IPNS name. Raises UnreachableError."""
        with self._asking(refused=True):
            said = self._client.name.publish(
                f"/ipfs/{cid}",
                key=key,
                resolve=False,
                lifetime=_NAME_LIFETIME,
                allow_offline=True,
                timeout=self._timeout(self._patience.answer_s),
            )
            return str(said["Name"])[:100]

    def resolve_name(self, name: str) -> Cid:
        """The block that an IPNS name points at, as the node has it. Raises NotFoundError, FormatError."""
        seconds = self._patience.answer_s
        try:
            with self._asking():
                said = self._client.name.resolve(
                    name, recursive=True, timeout=self._timeout(seconds), opts={"timeout": f"{seconds:g}s"}
                )
                path = str(said["Path"])
        except ErrorResponse as e:
            raise NotFoundError(
                f"the IPNS name {name}", f"reach of the {self.label}", f"It says: {printable(str(e))}"
            ) from e
        return Cid.parse(path.removeprefix("/ipfs/"))

    def version(self) -> str:
        """What the node says it is. Raises UnreachableError."""
        with self._asking(refused=True):
            return printable(str(self._client.version()["Version"]), 100)

    def _timeout(self, seconds: float) -> tuple[float, float]:
        """To connect, and between two reads: past what the node was given, so its own answer comes first."""
        return self._patience.connect_s, seconds + 1

    def _command(self, what: str, cid: Cid, seconds: float) -> str:
        """The node gives up before we do, so that it is heard why."""
        return f"/api/v0/block/{what}?arg={cid}&timeout={max(0.1, 0.9 * seconds):.3f}s"

    @contextmanager
    def _asking(self, refused: bool = False) -> Iterator[None]:
        """Errors of the library become ours; but an answer that says no only if `refused`."""
        try:
            yield
        except ErrorResponse as e:
            if not refused:
                raise
            raise UnreachableError(self.label, f"refuses: {printable(str(e))}") from e
        except ipfshttpclient.exceptions.TimeoutError as e:
            raise UnreachableError(self.label, "did not answer in time") from e
        except (ClientError, RequestException, HTTPError, OSError, *_ITS_MISTAKES) as e:
            raise UnreachableError(self.label, f"cannot be asked: {type(e).__name__}. Does it run?") from e


def _url(api: str) -> str:
    found = _MULTIADDR.fullmatch(api)
    if found is None:
        raise _no_address(api)
    kind, host, port, scheme = found.groups()
    return f"{scheme or 'http'}://{f'[{host}]' if kind == 'ip6' else host}:{port}"


def _no_address(api: str) -> InputError:
    return InputError(f"{api[:200]!r} is no address of an IPFS node's RPC: expected one such as {DEFAULT_API}")


def _message(said: str) -> str:
    """What stands in `{"Message": ...}`, or all of it."""
    try:
        return printable(str(json.loads(said)["Message"]))
    except (ValueError, LookupError, TypeError):
        return said
