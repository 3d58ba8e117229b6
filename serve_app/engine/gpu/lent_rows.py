"""Rows and tokens that go from GPU to GPU: between processes of one host, past the host's memory and its processors.

Who receives has an *inbox* on its GPU, which the sender maps once (CUDA IPC). What is sent is copied into one of its
places, then a stamp behind it; the receiver's stream waits for the stamp and copies on. So the host only says in which
order things happen, ahead of time: the receiver's step is queued before what it works on is there.

Rows travel beside their plan: in place of them it carries a *reference*, their number and size. An inbox has a place
for each step that can be on its way, so one is written again only when the step that lay there has come back from the
last stage: the Head keeps to that, and should it not, the digests of what was sent and what was received differ and no
receipt is signed. Tokens go from the last stage to the first, which may run the row of a token that the Head does not
know yet; their number is their step's, and a step that failed is stamped too, so that nobody waits for it for ever.

A reference has an odd length, so it is never taken for rows. Calls go to the driver, whose library is there wherever a
GPU is; torch keeps its own forms of these to itself.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from serve_app.errors import PipelineError, ProtocolError

ROW_PLACE_BYTES = 64 << 20  # 8192 rows of width 4096 in two bytes; what is larger goes through the host
TOKEN_PLACES = 1024  # by step: those without rows count too
_MAX_BYTES = 16 << 30
_HEAD_BYTES = 4096  # before the places: the stamp
_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_OFFER = struct.Struct(f"<8s{_HANDLE_BYTES}sQQ")
_REFERENCE = struct.Struct("<8sQQx")
_OFFER_MAGIC, _REFERENCE_MAGIC = b"llmd-box", b"llmd-row"
_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_FAR = 1 << 20  # numbers: more than can be awaited at a time
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ, which counts round


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * _HANDLE_BYTES)]


@dataclass(frozen=True, slots=True)
class Offer:
    """An inbox as its sender must know it. Law: decode(encode(o)) == o."""

    handle: bytes
    places: int
    place_bytes: int

    def encode(self) -> bytes:
        """The bytes."""
        return _OFFER.pack(_OFFER_MAGIC, self.handle, self.places, self.place_bytes)

    @classmethod
    def decode(cls, data: bytes) -> Offer:
        """Read encode's bytes. Raises ProtocolError."""
        if len(data) != _OFFER.size or not data.startswith(_OFFER_MAGIC):
            raise ProtocolError("no offer of an inbox of this version")
        _, handle, places, place_bytes = _OFFER.unpack(data)
        if not 0 < places * place_bytes <= _MAX_BYTES:
            raise ProtocolError(f"an inbox of {places} places of {place_bytes} bytes")
        return cls(handle, places, place_bytes)


@dataclass(frozen=True, slots=True)
class Reference:
    """What stands for rows in an inbox: the number-th that were sent. Law: decode(encode(r)) == r."""

    number: int
    n_bytes: int

    def encode(self) -> bytes:
        """The bytes that travel in place of the rows."""
        return _REFERENCE.pack(_REFERENCE_MAGIC, self.number, self.n_bytes)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Reference | None:
        """Read encode's bytes; None if these are none."""
        if len(data) != _REFERENCE.size or bytes(data[: len(_REFERENCE_MAGIC)]) != _REFERENCE_MAGIC or data[-1]:
            return None
        return cls(*_REFERENCE.unpack(data)[1:])


class Driver:
    """The calls to the GPU's driver, in threads where torch has used that GPU; PipelineError with its word."""

    def works_on(self, device: torch.device) -> bool:
        """Whether there is such a driver for this device."""
        return device.type == "cuda"

    def allocate(self, n_bytes: int) -> int:
        """The address of so much memory, full of ones."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(n_bytes))
        self._call("cuMemsetD32_v2", address, ctypes.c_uint(0), ctypes.c_size_t(1))
        return int(address.value)

    def free(self, address: int) -> None:
        """Give back what was allocated there. Nothing uses it any more."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def unmap(self, address: int) -> None:
        """Let go of another process's memory."""
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def share(self, address: int) -> bytes:
        """The handle by which another process maps what was allocated there."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle.bytes)

    def map(self, handle: bytes) -> tuple[int, int]:
        """Address and size of another process's memory."""
        address, base, size = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_size_t()
        there = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), there, ctypes.c_uint(_PEER_ACCESS))
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        return int(address.value), int(size.value)

    def copy(self, to: int, source: int, n_bytes: int) -> None:
        """Queue a copy."""
        self._call(
            "cuMemcpyAsync", ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(n_bytes), self._stream()
        )

    def await_stamp(self, address: int, number: int) -> None:
        """Queue: nothing goes on until the 32 bits there are this number or one after it, counting round."""
        stamp, how = ctypes.c_uint32(number), ctypes.c_uint(_AT_LEAST)
        self._call("cuStreamWaitValue32_v2", self._stream(), ctypes.c_uint64(address), stamp, how)

    def stamp_beside(self, address: int, number: int, device: torch.device) -> None:
        """Write 32 bits there now, whatever the queue of this thread waits for."""
        beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(beside):
            stamp = torch.full((1,), number, dtype=torch.int64, device=device)
            self.copy(address, stamp.data_ptr(), 4)
        beside.synchronize()

    def synchronize(self, device: torch.device) -> None:
        """Wait for all that was queued."""
        torch.cuda.synchronize(device)

    def _stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    def _call(self, name: str, *args: object) -> None:
        code = getattr(_library(), name)(*args)
        if code:
            said = ctypes.c_char_p()
            _library().cuGetErrorName(code, ctypes.byref(said))
            raise PipelineError(f"{name}: {(said.value or b'error').decode()} ({code})")


CUDA = Driver()


class Inbox:
    """Memory of this GPU that one sender writes to."""

    def __init__(self, driver: Driver, places: int, place_bytes: int) -> None:
        """Raises PipelineError where the driver gives no such memory."""
        self._driver = driver
        self._address = driver.allocate(_HEAD_BYTES + places * place_bytes)
        self._awaited = 0
        self.offer = Offer(driver.share(self._address), places, place_bytes)

    def take(self, number: int, out: Tensor) -> None:
        """Queue: wait for what has this number, then copy it to out, which is contiguous."""
        self._awaited = number
        self._driver.await_stamp(self._address, number & 0xFFFFFFFF)
        place = self._address + _HEAD_BYTES + number % self.offer.places * self.offer.place_bytes
        self._driver.copy(out.data_ptr(), place, out.numel() * out.element_size())

    def is_stamped(self, number: int, device: torch.device) -> bool:
        """Whether that stamp is there now. Waits for what was queued."""
        found = torch.zeros(1, dtype=torch.int32, device=device)
        self._driver.copy(found.data_ptr(), self._address, 4)
        self._driver.synchronize(device)
        return int(found.item()) == number

    def release(self, device: torch.device) -> None:
        """Nothing comes any more: whatever waits goes on, with what lies there."""
        self._driver.stamp_beside(self._address, (self._awaited + _FAR) & 0xFFFFFFFF, device)

    def close(self) -> None:
        """Give the memory back. Nothing waits for it."""
        self._driver.free(self._address)


class Outbox:
    """A neighbour's inbox."""

    def __init__(self, driver: Driver, offer: Offer, device: torch.device) -> None:
        """Raises PipelineError if its memory cannot be reached, ProtocolError if it is smaller than offered."""
        self._driver, self.offer = driver, offer
        self._address, size = driver.map(offer.handle)
        if size < _HEAD_BYTES + offer.places * offer.place_bytes:
            raise ProtocolError(f"an inbox of {size} bytes, where {offer.places} x {offer.place_bytes} are offered")
        self._stamp = torch.zeros(1, dtype=torch.int32, device=device)

    def close(self) -> None:
        """Let go of it. Nothing is queued for it any more."""
        self._driver.unmap(self._address)

    def holds(self, content: Tensor) -> bool:
        """Whether a place is large enough."""
        return content.numel() * content.element_size() <= self.offer.place_bytes

    def put(self, number: int, content: Tensor | None) -> None:
        """Queue: copy contiguous content, which a place holds, into its place; then the stamp."""
        if content is not None and content.numel():
            place = self._address + _HEAD_BYTES + number % self.offer.places * self.offer.place_bytes
            self._driver.copy(place, content.data_ptr(), content.numel() * content.element_size())
        self._stamp.fill_((number & 0xFFFFFFFF) - ((number & 0x80000000) << 1))
        self._driver.copy(self._address, self._stamp.data_ptr(), 4)


@cache
def _library() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise PipelineError(f"there is no NVIDIA driver: {e}") from e
