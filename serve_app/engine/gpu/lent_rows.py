"""Rows that stay on a GPU: the next stage, in another process of the host, copies them from there to its own.

What leaves a stage's last layer is copied into a ring on its GPU, and what travels in place of the rows is a
*reference*: where they lie. The neighbour maps the ring once (CUDA IPC) and reads it on its own stream, over NVLink
where there is some. The ring has a place for each step that can be on its way, so one is written again only when the
step that lay there has come back from the last stage: the Head keeps to that, and should it not, the digests of what
was sent and what was received differ and no receipt is signed.

A reference is no longer than this and of odd length, so it is never taken for rows: magic, handle, offset, bytes.
Calls go to the driver, whose library is there wherever a GPU is; torch keeps its own forms of these to itself.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.gpu.copies import upload_rows
from serve_app.errors import PipelineError, ProtocolError

_log = logging.getLogger(__name__)
PLACE_BYTES = 64 << 20  # 8192 rows of width 4096 in two bytes; what is larger goes through the host
_MAX_MAPPED = 4  # rings: a stage has one neighbour before it, and pipelines of an earlier epoch may linger
_MAGIC = b"llmd-gpu"
_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_REFERENCE = struct.Struct(f"<8s{_HANDLE_BYTES}sQQx")
_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * _HANDLE_BYTES)]


@dataclass(frozen=True, slots=True)
class Reference:
    """Where rows lie. Law: decode(encode(r)) == r."""

    handle: bytes
    offset: int
    n_bytes: int

    def encode(self) -> bytes:
        """The bytes that travel in place of the rows."""
        return _REFERENCE.pack(_MAGIC, self.handle, self.offset, self.n_bytes)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Reference | None:
        """Read encode's bytes; None if these are none."""
        if len(data) != _REFERENCE.size or bytes(data[: len(_MAGIC)]) != _MAGIC or data[-1]:
            return None
        _, handle, offset, n_bytes = _REFERENCE.unpack(data)
        return cls(handle, offset, n_bytes)


class RowRing:
    """Memory of this GPU that a neighbour may read. Made and written to in threads where torch has used the GPU."""

    def __init__(self, places: int, place_bytes: int = PLACE_BYTES) -> None:
        """Raises PipelineError where the driver gives no such memory."""
        self.places, self._place_bytes = places, place_bytes
        address, handle = ctypes.c_uint64(), _Handle()
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(places * place_bytes))
        self._address = int(address.value)
        _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(self._address))
        self._handle = bytes(handle.bytes)
        self._next = 0

    def take(self, rows: Tensor) -> bytes | None:
        """Queue a copy of contiguous rows into the next place; the reference to it, None if a place holds less."""
        n_bytes = rows.numel() * rows.element_size()
        if n_bytes > self._place_bytes:
            return None
        offset = self._next * self._place_bytes
        self._next = (self._next + 1) % self.places
        _copy(self._address + offset, rows.data_ptr(), n_bytes)
        return Reference(self._handle, offset, n_bytes).encode()


class RowInlet:
    """Brings rows into this GPU, from the host or from where a reference says."""

    def __init__(self) -> None:
        self._mapped: dict[bytes, tuple[int, int]] = {}  # handle -> address, bytes

    def holds(self, rows: memoryview, n_bytes: int) -> bool:
        """Whether this is, or refers to, so many bytes of rows."""
        if len(rows) == n_bytes:
            return True
        reference = Reference.decode(rows)
        return reference is not None and reference.n_bytes == n_bytes

    def bring(self, rows: memoryview, out: Tensor) -> None:
        """Queue what fills out [rows, width]. Raises ProtocolError for a reference that leads nowhere."""
        n_bytes = out.numel() * out.element_size()
        if len(rows) == n_bytes:
            upload_rows(rows, out)
            return
        reference = Reference.decode(rows)
        if reference is None or reference.n_bytes != n_bytes:
            raise ProtocolError(f"{len(rows)} bytes are neither {n_bytes} bytes of rows nor a reference to them")
        address, size = self._map(reference.handle)
        if reference.offset + n_bytes > size:
            raise ProtocolError(f"a reference to bytes {reference.offset} + {n_bytes} of {size}")
        _copy(out.data_ptr(), address + reference.offset, n_bytes)

    def _map(self, handle: bytes) -> tuple[int, int]:
        if handle not in self._mapped:
            if len(self._mapped) >= _MAX_MAPPED:
                raise ProtocolError(f"rows on more than {_MAX_MAPPED} other GPUs' memories")
            address, base, size = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_size_t()
            try:
                _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), _PEER_ACCESS)
                _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
            except PipelineError as e:
                raise ProtocolError(f"the rows on the neighbour's GPU cannot be reached: {e}") from e
            self._mapped[handle] = int(address.value), int(size.value)
        return self._mapped[handle]


class RowPort:
    """How rows come into this GPU and leave it. hand_on: whether somebody needs those that leave."""

    def __init__(self, device: torch.device) -> None:
        self.hand_on = True
        self._device = device
        self._inlet = RowInlet()
        self._ring: RowRing | None = None
        self._lending = False
        self.holds, self.bring = self._inlet.holds, self._inlet.bring

    def offer(self, places: int) -> bytes | None:
        """As engine.LendsRows.offer_rows."""
        if self._device.type != "cuda":
            return None
        probe = _probe(self._device)  # first: this thread may not have used the GPU before
        try:
            self._ring = RowRing(places)
            reference = self._ring.take(probe)
        except PipelineError as e:
            _log.warning("rows go to the next stage through the host: %s", e)
            return None
        torch.cuda.synchronize(self._device)
        return reference

    def can_read(self, reference: bytes) -> bool:
        """As engine.LendsRows.can_read_rows."""
        if self._device.type != "cuda":
            return False
        probe = _probe(self._device)
        found = torch.zeros_like(probe)
        try:
            self._inlet.bring(memoryview(reference), found)
        except (PipelineError, ProtocolError) as e:
            _log.warning("rows come from the stage before through the host: %s", e)
            return False
        torch.cuda.synchronize(self._device)
        return torch.equal(probe, found)

    def lend(self) -> None:
        """From now on rows stay in the ring that was offered."""
        self._lending = self._ring is not None

    def give(self, rows: Tensor) -> tuple[Tensor | None, bytes | None]:
        """Queue what hands these rows on: a copy on the host, or the reference to one in the ring; None, None: nobody
        needs them.
        """
        if not self.hand_on:
            return None, None
        if self._lending and self._ring is not None:
            reference = self._ring.take(rows)
            if reference is not None:
                return None, reference
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=self._device.type == "cuda")
        host.copy_(rows, non_blocking=True)
        return host, None


def _probe(device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.int32, device=device)[None]


def _copy(to: int, source: int, n_bytes: int) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    _call(
        "cuMemcpyAsync",
        ctypes.c_uint64(to),
        ctypes.c_uint64(source),
        ctypes.c_size_t(n_bytes),
        ctypes.c_void_p(stream),
    )


@cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise PipelineError(f"there is no NVIDIA driver: {e}") from e


def _call(name: str, *args: object) -> None:
    """Raises PipelineError with the driver's word for what went wrong."""
    code = getattr(_driver(), name)(*args)
    if code:
        said = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(said))
        raise PipelineError(f"{name}: {(said.value or b'error').decode()} ({code})")
