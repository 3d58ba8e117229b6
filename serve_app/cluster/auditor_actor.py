"""The auditor as a Ray actor: logs receipts, fetches the rows of what was drawn, computes and draws it again.

Detached and restartable: its log, its verdicts and what it found of the latest answers are on disk; receipts, and what
waited, were in memory and are lost, which it says. It yields to all else on its host, and does one audit at a time.
Nobody waits for it: a Head notes, draws and goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.audit.band import MAX_BAND_BYTES, DrawBand
from serve_app.audit.calibration import MAX_CALIBRATION_BYTES, Calibration
from serve_app.audit.desk import Drawn, Outgoing
from serve_app.audit.exactness import PROFILE
from serve_app.audit.office import AuditOffice, News
from serve_app.audit.showing import most_bytes
from serve_app.choices import store_of
from serve_app.cluster.audit_specs import AUDITOR, FOLDER, AuditorSpec
from serve_app.cluster.named_actors import find_actor
from serve_app.cluster.outside import OutsideStage
from serve_app.cluster.row_holder import OutsideRows, RayRows, RowHolder
from serve_app.cluster.specs import NAMESPACE, Outsider
from serve_app.cluster.stage_host import node_key_path
from serve_app.errors import AuditError, PipelineError
from serve_app.receipts.identity import NodeIdentity
from serve_app.receipts.statement import StageStatement
from shard_tools.canonical import Value
from shard_tools.catalog import open_record
from shard_tools.cid import Cid
from shard_tools.errors import LlmdError
from shard_tools.index.model_index import ModelRecord
from shard_tools.signing import PublicKey, Signer, key_text

if TYPE_CHECKING:
    from serve_app.audit.auditor import Auditor
    from serve_app.audit.exact import ExactReplay
    from serve_app.audit.redraw import Redrawer
    from serve_app.engine.load import LoadOptions
    from serve_app.engine.output_head import OutputHead

Stages = tuple[str | Outsider, ...]  # of one pipeline: names of actors, and who is none
_log = logging.getLogger(__name__)
_NICE = 10  # it competes with stages for the same cores
_FETCH_S = 20.0  # for a piece of 8 MiB from a stage on a loaded machine
_MAX_QUEUED = 1024  # a verdict that waits behind so many comes too late anyway
_KEPT_HEAD_BYTES = 256 << 20  # an output layer that stays in memory between answers
_PAGE_SIZE = 16  # of a replay's cache; nobody else sees it


class _AuditorProcess:
    """One per cluster, named AUDITOR."""

    def __init__(self, spec: AuditorSpec) -> None:
        os.nice(_NICE)
        self._spec = spec
        self._store = store_of(spec.store)
        self._manifest = open_record(ModelRecord(spec.manifest, spec.signature), self._store, spec.trusted)
        self._signer = Signer.load_or_create(spec.state_dir / "auditor.key")
        (spec.state_dir / "auditor.pub").write_text(key_text(self._signer.public) + "\n")
        self._office = AuditOffice(
            spec.state_dir / FOLDER, self._signer, spec.operator, self._make, self._make_redrawer
        )
        self._queue: asyncio.Queue[tuple[Drawn, Stages, tuple[StageStatement, ...]]] = asyncio.Queue(_MAX_QUEUED)
        self._replays = ThreadPoolExecutor(1, "replay")
        self._logs = ThreadPoolExecutor(1, "log")  # a disk must not hold up who asks
        self._outside: dict[Outsider, OutsideRows] = {}
        self._work: asyncio.Task[None] | None = None
        self._exact: ExactReplay | None = None
        self._exact_profile = ""  # until it is known; promises of exact answers wait for it

    async def spec(self) -> AuditorSpec:
        """What it audits."""
        return self._spec

    async def note(self, outgoing: Outgoing, desk: str = "") -> tuple[bytes, list[str]]:
        """All of it is in the log. Returns the log's root, and of which of this desk's answers rows are not needed."""
        if self._work is None:
            self._work = asyncio.get_running_loop().create_task(self._audit_all())
            self._replays.submit(self._learn_profile)
        note = self._office.note
        root = await self._aside(self._logs, note, outgoing.notes, outgoing.commitment, outgoing.told, desk)
        return root, self._office.settled(desk)

    async def audit(self, drawn: list[tuple[Drawn, Stages]]) -> None:
        """These are to be audited; rows are asked to be kept at once. With each, who all its stages are."""
        for one, stages in drawn:
            try:
                wanted = self._office.begin(one)
            except LlmdError as e:
                _log.warning("%s is not audited: %s", one.id, e)
                continue
            if self._queue.full():
                for said in wanted:
                    self._give_up(one, said, f"{_MAX_QUEUED} audits wait before it")
            elif wanted:
                self._queue.put_nowait((one, stages, wanted))  # first, since it is begun once whatever comes now
                for said in wanted:
                    stage = await self._find(stages, said)
                    if stage is not None:
                        stage.hold(said.request_hash, said.attempt, one.certain)

    async def news(self, after: int) -> tuple[PublicKey, list[News], dict[str, Value]]:
        """Its key, what came of audits since news number `after`, and how it does."""
        news = [one for one in self._office.news if one.number > after]
        return self._signer.public, news, self._office.status() | {PROFILE: self._exact_profile}

    async def lookup(self, id: str) -> dict[str, Value] | None:
        """As AuditOffice.lookup."""
        return self._office.lookup(id)

    def _make(self) -> Auditor:
        # torch takes seconds to import: not in the Supervisor, which knows this class, nor before there is a need.
        from serve_app.audit.auditor import Auditor

        blocks = self._blocks(self._spec.calibrations, MAX_CALIBRATION_BYTES)
        known = [Calibration.decode(data) for data in blocks]
        return Auditor(self._store, self._manifest, self._options(), known, self._signer, self._exact)

    def _learn_profile(self) -> None:
        """What it repeats bits by, if stages fix theirs. In the thread that replays: threads are counted there."""
        from serve_app.audit.exact import ExactReplay

        fixed = self._spec.exact
        if fixed is None:
            return
        options = replace(self._options(), dtype=fixed.dtype, threads=fixed.threads, deterministic=True)
        try:
            exact = ExactReplay(self._store, self._manifest, options)
            self._exact_profile, self._exact = exact.profile, exact
        except Exception:  # it audits by calibration all the same
            _log.exception("no answer can be exact: the auditor does not know what it computes by")

    def _make_redrawer(self) -> Redrawer:
        from serve_app.audit.redraw import Redrawer
        from serve_app.engine.load import load_head

        bands = [DrawBand.decode(data) for data in self._blocks(self._spec.bands, MAX_BAND_BYTES)]
        options, size = self._options(), 4 * self._manifest.vocab_size * self._manifest.hidden_size

        def load() -> OutputHead:
            return load_head(self._store, self._manifest, options)

        return Redrawer(
            self._manifest,
            cache(load) if size <= _KEPT_HEAD_BYTES else load,  # 2 GB of a large vocabulary are loaded for each answer
            bands,
            self._signer,
            None if self._exact is None else self._exact.head(),
        )

    def _options(self) -> LoadOptions:
        from serve_app.engine.engines import TORCH
        from serve_app.engine.load import LoadOptions

        return LoadOptions("cpu", "float32", _PAGE_SIZE, self._spec.threads, engine=TORCH)

    def _blocks(self, cids: tuple[Cid, ...], max_bytes: int) -> Iterator[bytes]:
        for cid in cids:
            data = self._store.get(cid)
            if len(data) > max_bytes:
                raise AuditError(f"{cid}, of honest stages or draws, has {len(data)} bytes, more than {max_bytes}")
            yield data

    async def _audit_all(self) -> None:
        while True:
            one, stages, wanted = await self._queue.get()
            for said in wanted:  # one after another: the rows of one stage at a time are in memory
                try:
                    await self._audit(one, stages, said)
                except Exception as e:
                    _log.exception("an audit ended in an error")
                    self._give_up(one, said, f"{type(e).__name__}: {e}")

    async def _audit(self, one: Drawn, stages: Stages, said: StageStatement) -> None:
        stage = await self._find(stages, said)
        if stage is None:
            self._give_up(one, said, "the stage's process is gone")
            return
        try:
            shown = await self._fetch(stage, said)
        except (RayError, TimeoutError) as e:
            self._give_up(one, said, f"the stage did not answer: {type(e).__name__}")
            return
        except PipelineError as e:
            self._office.gave_nothing(one, said, str(e), refused=True)
            return
        if shown is None:
            # Rows of what was promised are set aside, so that there is no excuse; others may have made room.
            self._office.gave_nothing(
                one, said, "the stage does not show its rows, or has them no more", refused=one.certain
            )
            return
        await self._aside(self._replays, self._office.judge, one, said.stage, shown)
        stage.release(said.request_hash, said.attempt, one.certain)

    async def _find(self, stages: Stages, said: StageStatement) -> RowHolder | None:
        """This stage, as far as it is known; None if it is gone."""
        who = stages[said.stage] if said.stage < len(stages) else ""
        if isinstance(who, Outsider):
            if who not in self._outside:
                identity = NodeIdentity.load_or_create(node_key_path(self._spec.state_dir))
                self._outside[who] = OutsideRows(OutsideStage(who, said.stage, identity))
            return self._outside[who]
        actor = await self._aside(self._logs, find_actor, who) if who else None
        return None if actor is None else RayRows(actor)

    async def _fetch(self, stage: RowHolder, said: StageStatement) -> bytes | None:
        data, most = bytearray(), most_bytes(said.n_rows, self._manifest.hidden_size)
        while True:
            async with asyncio.timeout(_FETCH_S):
                piece = await stage.show(said.request_hash, said.attempt, len(data))
            if piece is None:
                return None
            if not isinstance(piece, bytes) or len(piece) > stage.piece_bytes or len(data) + len(piece) > most:
                raise PipelineError(f"the stage shows more than the {most} bytes that its rows can be")
            data += piece
            if len(piece) < stage.piece_bytes:
                return bytes(data)

    def _give_up(self, one: Drawn, said: StageStatement, why: str) -> None:
        try:
            self._office.gave_nothing(one, said, why, refused=False)
        except LlmdError as e:
            _log.warning("%s: %s", one.id, e)

    async def _aside(self, pool: ThreadPoolExecutor, work: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *args)


AuditorActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(_AuditorProcess)


def make_auditor(spec: AuditorSpec) -> Any:
    """The cluster's auditor, beside whoever calls if that is possible: its log lies on that host."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return AuditorActor.options(
        name=AUDITOR,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        scheduling_strategy=here,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(spec.threads), "OMP_WAIT_POLICY": "PASSIVE"}},
    ).remote(spec)
