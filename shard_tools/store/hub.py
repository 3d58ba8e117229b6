"""The files a model was published from, on a web server that gives parts of them: the Hugging Face Hub, or any mirror.

    GET <url>/<file>, Range: bytes=<start>-<stop - 1>        for a leaf that is this run of the original file

Every block is hashed here. Only leaves that a range map places in a file can be had; the others (headers, small files,
what was converted) come from other sources. Redirects are followed, for the Hub answers with one to its object store:
a few, never from https to http, and without a word of ours but the range. No token is sent: public repositories only.
Source: https://huggingface.co/docs/hub/models-downloading, RFC 9110 section 14.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from shard_tools.cid import Cid, Codec
from shard_tools.errors import InputError, NotFoundError, UnreachableError
from shard_tools.http_client import Answer, HttpClient, Patience, parse_url
from shard_tools.store.block_store import MAX_BLOCK_BYTES, check_block

MAX_HOPS = 3  # the Hub needs one
LOCATION_S = 300.0  # how long a redirect is remembered; the Hub signs its own for an hour
AGAIN_S = 30.0  # where no manifest was to be had, it is asked for again so much later
_MAX_SERVERS = 8  # that redirects may lead to

_REDIRECTS = (301, 302, 303, 307, 308)
_GONE = (404, 410, 416)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, stop) of a file."""

    file: str
    start: int
    stop: int


class HubSource:
    """A BlockSource over one folder of files, shared by threads."""

    def __init__(self, url: str, spans: Callable[[], Mapping[Cid, Span]], patience: Patience) -> None:
        """url: `https://huggingface.co/<org>/<model>/resolve/<revision>`. spans: where leaves lie; asked when needed,
        until it says something. Raises InputError.
        """
        parse_url(url)
        self._url, self._spans_of, self._patience = url.rstrip("/"), spans, patience
        self._guard = threading.Lock()
        self._spans: Mapping[Cid, Span] = {}
        self._ask_at = 0.0
        self._servers: dict[str, HttpClient] = {}
        self._moved: dict[str, tuple[str, float]] = {}  # file -> where it was found, until when that holds

    @property
    def label(self) -> str:
        return f"hub {self._url}"

    def get(self, cid: Cid) -> bytes:
        span = self._span(cid)
        if span is None:
            raise NotFoundError(f"block {cid}", self.label, "It is no run of bytes of the original files.")
        answer = self._part(span)
        if answer.status in _GONE:
            raise NotFoundError(f"block {cid}", self.label, f"{span.file}: {answer.problem()}")
        if answer.status == 200:
            raise UnreachableError(self.label, f"gives no part of {span.file}: it answers with the whole file")
        if answer.status != 206:
            raise UnreachableError(self.label, answer.problem())
        return check_block(cid, answer.body, self.label)

    def has(self, cid: Cid) -> bool:
        """Whether the leaf lies in a file that the server has so far; its bytes may be others."""
        span = self._span(cid)
        if span is None:
            return False
        answer = self._part(Span(span.file, span.stop - 1, span.stop))  # not HEAD: signed addresses are for GET
        if answer.status not in (206, *_GONE):
            raise UnreachableError(self.label, answer.problem())
        return answer.status == 206

    def close(self) -> None:
        """No connection is kept any more."""
        with self._guard:
            servers, self._servers = self._servers, {}
        for server in servers.values():
            server.close()

    def _span(self, cid: Cid) -> Span | None:
        if cid.codec is not Codec.RAW:
            return None  # nor is it looked for what the map says of the manifest that is on its way just now
        with self._guard:
            if not self._spans and time.monotonic() >= self._ask_at:
                self._spans = self._spans_of()
                self._ask_at = time.monotonic() + AGAIN_S
        return self._spans.get(cid)

    def _part(self, span: Span) -> Answer:
        """What the server, or the one that it leads to, says to a request for the span."""
        url, until = self._moved.get(span.file, ("", 0.0))
        if time.monotonic() < until:
            with suppress(UnreachableError):  # that server, and not the one that led to it
                answer = self._asked(url, span)
                if answer.status == 206:
                    return answer
            self._moved.pop(span.file, None)  # its signature has run out, say
        url = f"{self._url}/{quote(span.file)}"
        for _ in range(MAX_HOPS + 1):
            answer = self._asked(url, span)
            if answer.status not in _REDIRECTS:
                if answer.status == 206:
                    self._moved[span.file] = url, time.monotonic() + LOCATION_S
                return answer
            url = self._next(url, answer.location)
        raise UnreachableError(self.label, f"leads on for more than {MAX_HOPS} times")

    def _next(self, url: str, location: str) -> str:
        try:
            there = urljoin(url, location)
        except ValueError:
            there = ""
        if not (location and there) or (url.startswith("https:") and not there.startswith("https:")):
            raise UnreachableError(self.label, f"leads to {location[:100]!r}, where nothing is asked for")
        return there.partition("#")[0]

    def _asked(self, url: str, span: Span) -> Answer:
        try:
            parts = urlsplit(url)
            server = self._server(f"{parts.scheme}://{parts.netloc}")
        except (ValueError, InputError) as e:
            raise UnreachableError(self.label, f"leads to no address: {str(e)[:200]}") from e
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return server.ask("GET", target, "*/*", MAX_BLOCK_BYTES, (span.start, span.stop))

    def _server(self, origin: str) -> HttpClient:
        with self._guard:
            found = self._servers.get(origin)
            if found is None:
                if len(self._servers) >= _MAX_SERVERS:
                    self._servers.pop(next(iter(self._servers))).close()
                found = self._servers[origin] = HttpClient(origin, self.label, self._patience)
            return found
