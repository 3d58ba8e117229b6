"""A stage of another operator, as the Supervisor sees it: `llmd stage`, reached over TLS by the key that is its own.

What it says is taken for no more than its word: it is named as the configuration names it, its certificate must be by
the key that was expected, and no process of the cluster is ever killed or joined by memory because of what it says.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from serve_app.cluster.row_orders import PIECE_BYTES, HoldRows, ReleaseRows, ShowRows, read_piece
from serve_app.cluster.specs import Outsider, StageReport, StageSpec, Trouble
from serve_app.cluster.stage_handle import StageHandle
from serve_app.cluster.stage_host import node_key_path
from serve_app.cluster.stage_orders import (
    MAX_BYTES,
    STAGE_ITSELF,
    ComputesFastIn,
    Connect,
    Listen,
    Order,
    Ping,
    Ready,
    Take,
    Taken,
    TellTrouble,
    encode_order,
    read_answer,
    read_facts,
    read_flag,
    read_gone,
    read_nothing,
    read_port,
)
from serve_app.cluster.wiring import Awaited, Joint, Party
from serve_app.config import AppConfig, split_address
from serve_app.engine.engine import ActivationDtype, BoxKind
from serve_app.errors import PipelineError
from serve_app.receipts.identity import CLOCK_SKEW_S, Certificate, NodeIdentity, RegisteredNode, Registry
from serve_app.transport.call import ask
from serve_app.transport.handshake import EdgeAddress
from shard_tools.canonical import Value
from shard_tools.errors import LlmdError
from shard_tools.signing import key_text, parse_key

T = TypeVar("T")
_log = logging.getLogger(__name__)
_CREDENTIALS_S = 3600  # each call shows fresh ones
_TRY_S = 2.0  # for one attempt to reach it
_TRY_EVERY_S = 0.2


def outside_stages(config: AppConfig) -> dict[int, OutsideStage]:
    """Those that the configuration names, by stage."""
    if not config.pipeline.outside:
        return {}
    identity = NodeIdentity.load_or_create(node_key_path(config.identity.state_dir))
    stages = {}
    for entry in config.pipeline.outside:
        host, port = split_address(entry.address)
        who = Outsider(host, port, parse_key(entry.key), entry.grace_s, entry.stand_in)
        stages[entry.stage] = OutsideStage(who, entry.stage, identity)
    return stages


async def present_outside(config: AppConfig) -> dict[int, OutsideStage]:
    """Those that answer within their grace, and those without which there is no pipeline."""
    stages = outside_stages(config)
    found = await asyncio.gather(*(stage.comes_back() for stage in stages.values()))
    answers = zip(stages.items(), found, strict=True)
    return {i: stage for (i, stage), is_there in answers if is_there or not stage.who.stand_in}


async def returned(stages: Sequence[StageHandle | None], dead: Collection[str]) -> frozenset[str]:
    """Of parts that did not answer, those outside that do so within their grace: they were cut off for a while."""
    away = {f"stage {i}": stage for i, stage in enumerate(stages) if isinstance(stage, OutsideStage)}
    asked = [name for name in dead if name in away]
    found = await asyncio.gather(*(away[name].comes_back() for name in asked))
    return frozenset(name for name, is_back in zip(asked, found, strict=True) if is_back)


class OutsideStage:
    """Implements StageHandle. Every call is a connection of its own, so there is none that a cut link could spoil."""

    def __init__(self, who: Outsider, stage: int, identity: NodeIdentity) -> None:
        """identity: of the node this process runs on; the stage takes orders from it."""
        self.who, self._stage, self._identity = who, stage, identity
        self._name = f"stage {stage} (at {who.host}:{who.port}, of another operator)"
        self._epoch = 0  # of none, until it takes a place
        self._has_left = self._dismissed = False

    def dismiss(self) -> None:
        """It is not to come back, though it answers."""
        self._dismissed = True

    @property
    def actor(self) -> None:
        return None

    async def comes_back(self) -> bool:
        """Whether it answers within its grace. One that leaves, or was dismissed, is not waited for."""
        if self._dismissed or (self._has_left and self.who.stand_in):
            return False
        until, told = time.monotonic() + self.who.grace_s, False
        while True:
            try:
                async with asyncio.timeout(_TRY_S):
                    await self.ready()
                return True
            except (LlmdError, TimeoutError) as e:
                if time.monotonic() > until:
                    _log.error("%s is given up: %s", self._name, str(e) or "no answer")
                    return False
                if not told:
                    _log.warning("%s is waited for, for %d s: %s", self._name, self.who.grace_s, str(e) or "no answer")
                told = True
            await asyncio.sleep(_TRY_EVERY_S)

    async def ready(self) -> None:
        await self._ask(Ready(), read_nothing)

    async def computes_fast_in(self, dtype: ActivationDtype) -> bool:
        return await self._ask(ComputesFastIn(dtype), read_flag)

    async def take(self, spec: StageSpec, dtype: ActivationDtype) -> StageReport:
        taken = await self._ask(Take.of(spec, dtype), Taken.from_value)
        try:
            self._check_certificate(taken, spec)
        except LlmdError as e:
            raise PipelineError(f"{self._name}: {e}") from e
        if taken.profile.dtype != dtype:
            raise PipelineError(f"{self._name} computes in {taken.profile.dtype} where all others do in {dtype}")
        self._epoch, self._has_left = spec.epoch, False
        return StageReport(
            stage=self._stage,
            # No process id and no Ray node: what it said of these could have others of this cluster killed.
            party=Party(f"stage {self._stage}", self.who.key, 0, "", self.who.host),
            host=f"{self.who.host} (outside)"[:100],
            profile=taken.profile,
            certificate=taken.certificate,
            load_s=taken.load_ms / 1000,
            opened_blocks=taken.opened_blocks,
            max_pages=taken.max_pages,
        )

    def _check_certificate(self, taken: Taken, spec: StageSpec) -> None:
        """Raises LlmdError unless its own key vouches for a session of this epoch, for as long as it was asked to."""
        now_s = int(time.time())
        itself = Registry.of([RegisteredNode(self.who.key, self._name)], 1, now_s, _CREDENTIALS_S)
        terms = Certificate.open(taken.certificate, itself, "stage", now_s)
        if terms.epoch != spec.epoch:
            raise PipelineError(f"its session is of epoch {terms.epoch}, and this is {spec.epoch}")
        if terms.not_after < now_s + spec.session_lifetime_s - CLOCK_SKEW_S:
            raise PipelineError(f"its session ends at {terms.not_after} (seconds since 1970), too soon")

    async def listen(self, awaited: Sequence[Awaited]) -> EdgeAddress | None:
        port = await self._ask(Listen(self._epoch, tuple(awaited)), read_port)
        return None if port is None else EdgeAddress(None, self.who.host, port)

    async def connect(self, head: Joint, after: Joint | None, n_pages: int, max_requests: int) -> None:
        await self._ask(Connect(self._epoch, head, after, n_pages, max_requests), read_nothing)

    async def offer_inbox(self, kind: BoxKind, places: int) -> bytes | None:
        return None  # no GPU of another host can be mapped

    async def try_outbox(self, kind: BoxKind, offer: bytes) -> bool:
        return False

    async def got_probe(self, kind: BoxKind) -> bool:
        return False

    async def use_outbox(self, kind: BoxKind) -> None:
        raise AssertionError("nothing was offered to it")

    async def trouble(self, epoch: int) -> Trouble:
        gone = await self._ask(TellTrouble(epoch), read_gone)
        if STAGE_ITSELF in gone:
            self._has_left = True
            return Trouble(f"{self._name} leaves", frozenset((f"stage {self._stage}",)))
        return Trouble(f"{self._name} has lost {', '.join(sorted(gone)) or 'its epoch'}", gone)

    async def ping(self) -> dict[str, Value]:
        if self._has_left:
            raise PipelineError(f"{self._name} has left")
        facts = await self._ask(Ping(), read_facts)
        ours: dict[str, Value] = {
            "stage": self._stage,
            "actor": "",
            "outside": f"{self.who.host}:{self.who.port}",
            "node": self.who.key.hex()[:16],
            "past_host": [],
        }
        return facts and facts | ours

    async def show_rows(self, request: bytes, attempt: int, start: int) -> bytes | None:
        """A piece of the rows that it kept; None if they are not there."""
        return await self._ask(ShowRows(request, attempt, start), read_piece, PIECE_BYTES + MAX_BYTES)

    async def tell_rows(self, order: HoldRows | ReleaseRows) -> None:
        """They are to be held, or not needed any more."""
        await self._ask(order, read_nothing)

    async def _ask(self, order: Order, read: Callable[[Value], T], longest: int = MAX_BYTES) -> T:
        credentials = self._identity.certify_tls(int(time.time()), _CREDENTIALS_S)
        try:
            data = await ask(self.who.host, self.who.port, self.who.key, credentials, encode_order(order), longest)
        except PipelineError as e:
            raise PipelineError(f"{self._name}: {e}. This node is {key_text(self._identity.key)}") from e
        try:
            return read(read_answer(data, "it", longest))
        except LlmdError as e:
            raise PipelineError(f"{self._name}: {e}") from e
