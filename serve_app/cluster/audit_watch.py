"""The Supervisor's side of audits: sees that there is an auditor, and keeps every node's standing by what it finds.

Works beside the Supervisor's watch, which waits for nothing here. A node that is quarantined loses its stages to spares
of other nodes; where there is none, it goes on serving, and the state says so: a pipeline that is built anew on the
same node would be no better.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from serve_app.audit.book import StandingBook, asked_to_readmit
from serve_app.audit.draw_verdict import DRAW_VERDICT_TYPE, DrawVerdict
from serve_app.audit.office import News
from serve_app.audit.verdict import HARMLESS, MAX_VERDICT_BYTES, Verdict
from serve_app.cluster.audit_specs import AUDITOR, FOLDER, OWNER, AuditorSpec, auditor_spec, nodes_of
from serve_app.cluster.auditor_actor import make_auditor
from serve_app.cluster.named_actors import cause_of, find_actor, kill_actor
from serve_app.cluster.pipeline_group import PipelineGroup
from serve_app.config import AppConfig
from serve_app.errors import PipelineError
from serve_app.receipts.equivocation import Equivocation
from serve_app.receipts.transit import TransitProof
from shard_tools import canonical
from shard_tools.canonical import Value
from shard_tools.errors import LlmdError
from shard_tools.signing import Envelope, PublicKey, key_text

_log = logging.getLogger(__name__)
_CALL_S = 10.0
_START_S = 60.0  # for a new process on a loaded machine


class AuditWatch:
    """Of one Supervisor, and all its pipelines: the standing of a node is one, wherever it was found out."""

    def __init__(self) -> None:
        self._book: StandingBook | None = None
        self._auditor: Any | None = None
        self._spec: AuditorSpec | None = None
        self._turn: asyncio.Task[None] | None = None
        self._problem: str | None = "the auditor is starting"
        self._no_way_out: dict[int, str] = {}  # pipeline -> why a quarantined node goes on serving in it
        self._status: dict[str, Value] = {}
        self._spare_nodes: dict[str, PublicKey] = {}  # by the name of the spare's actor

    def tick(self, config: AppConfig, groups: Sequence[PipelineGroup]) -> None:
        """Called every second or so with all pipelines that there are; does its work in the background."""
        audited = [group for group in groups if group.spec.audit is not None]
        if audited and (self._turn is None or self._turn.done()):
            self._turn = asyncio.get_running_loop().create_task(self._work(config, audited))

    async def stop(self) -> None:
        """Nothing is audited here any more; an auditor of a later version goes on."""
        if self._turn is not None:
            self._turn.cancel()
        own, found = self._spec, None if self._spec is None else find_actor(AUDITOR)
        if own is None or found is None:
            return
        with suppress(RayError, TimeoutError):
            async with asyncio.timeout(_CALL_S):
                if (await found.spec.remote()).version != own.version:
                    return
        kill_actor(found)

    def state(self, group: PipelineGroup) -> dict[str, Value]:
        """For the Head, which shows it to people; `watched`: stages of which every answer is to be audited."""
        if group.spec.audit is None:
            return {}
        book = self._book
        watched = [i for i, node in enumerate(nodes_of(group.spec)) if book and book.of(node).audited_always]
        return {
            "auditor_problem": self._problem,
            "quarantine_problem": self._no_way_out.get(group.group.replica),
            "auditor": self._status,
            "nodes": book.state() if book else [],
            "watched": list(watched),
        }

    def to_replace(self, group: PipelineGroup) -> tuple[PipelineGroup, frozenset[str]]:
        """Stages of quarantined nodes, as far as there are spares of others; and the group with these spares alone."""
        bad = self._book.quarantined() if self._book and group.spec.audit else frozenset()
        stages = [f"stage {i}" for i, node in enumerate(nodes_of(group.spec)) if node in bad]
        replica = group.group.replica
        if not stages:
            self._no_way_out.pop(replica, None)
            return group, frozenset()
        plan = group.spec.plan
        waiting = list(zip(plan.spares, group.spares, strict=True))
        # One that has not said where it is, is not relied on.
        nodes = self._spare_nodes
        clean = [(p, a) for p, a in waiting if a is not None and p.actor in nodes and nodes[p.actor] not in bad]
        if not clean:
            if replica not in self._no_way_out:
                _log.error("%s run on quarantined nodes, and no spare stands ready on another one", ", ".join(stages))
            self._no_way_out[replica] = (
                f"{', '.join(stages)} run on quarantined nodes and go on: no spare stands ready on another node. "
                f"Add a node and pipeline.spares, or take the node out of the cluster"
            )
            return group, frozenset()
        for place, actor in waiting:
            if (place, actor) not in clean:
                kill_actor(None if actor is None else actor.actor)
        spec = replace(group.spec, plan=replace(plan, spares=tuple(place for place, _ in clean)))
        left = replace(group, spec=spec, spares=tuple(actor for _, actor in clean))
        return left, frozenset(stages[: len(clean)])

    async def _work(self, config: AppConfig, groups: Sequence[PipelineGroup]) -> None:
        try:
            if self._book is None:
                self._book = StandingBook(config.identity.state_dir / FOLDER / "standing")
            for node in asked_to_readmit(config.identity.state_dir / FOLDER):
                _log.warning("node %s is %s now", key_text(node), self._book.readmit(node).state.value)
            auditor = await self._living(auditor_spec(config, groups[0].spec))
            async with asyncio.timeout(_CALL_S):
                key, news, self._status = await auditor.news.remote(self._book.read_to)
            for one in news:
                self._hear(self._book, one, key)
            for group in groups:
                await self._ask_spares(group)
                if group.head is not None and _rows_are_signed_for(config):
                    async with asyncio.timeout(_CALL_S):
                        proofs: list[bytes] = await group.head.proofs.remote()
                    self._convict(self._book, config.identity.state_dir / FOLDER / "transit", proofs)
            self._problem = None
        except (RayError, TimeoutError, LlmdError, OSError) as e:
            self._fail(cause_of(e))
        except Exception as e:  # a mistake of ours must not end the watch in silence
            _log.exception("audits cannot be watched")
            self._fail(f"{type(e).__name__}: {e}")

    def _fail(self, why: str) -> None:
        if self._problem is None:
            _log.error("audits stand still: %s", why)
        self._problem, self._auditor = why, None

    async def _living(self, spec: AuditorSpec) -> Any:
        """The auditor of these pipelines; one of others is ended first."""
        if self._auditor is None or self._spec is None or not self._spec.is_like(spec):
            found = await asyncio.get_running_loop().run_in_executor(None, find_actor, AUDITOR)
            if found is not None:
                try:
                    async with asyncio.timeout(_CALL_S):
                        own = await found.spec.remote()
                except RayError:
                    own = None  # one that cannot start: another may
                if own is not None and own.version != spec.version and own.number > spec.number:
                    raise PipelineError("a later version of the application is audited")
                if own is None or not own.is_like(spec):
                    kill_actor(found)
                    found = None
            if found is None:
                found = make_auditor(spec)
                async with asyncio.timeout(_START_S):
                    await found.spec.remote()
            self._auditor, self._spec = found, spec
        return self._auditor

    def _hear(self, book: StandingBook, news: News, auditor: PublicKey) -> None:
        before = book.of(news.node)
        sealed = None
        if news.verdict:
            value = canonical.decode(news.verdict, max_bytes=2 * MAX_VERDICT_BYTES)
            sealed = Envelope.from_value(value, "verdict", MAX_VERDICT_BYTES)
        if sealed is not None and sealed.payload_type == DRAW_VERDICT_TYPE:
            said = DrawVerdict.open(sealed, frozenset((auditor,)))
            if said.accuses:
                _log.error("tokens of request %s, drawn again: %s", said.request_hash.hex(), said.summary)
            after = before  # it was one of two nodes, and nothing says which
        elif sealed is not None:
            verdict = Verdict.open(sealed, frozenset((auditor,)))
            after = book.judged(verdict, OWNER)
            if verdict.finding not in HARMLESS:
                _log.warning("an audit of stage %d on %s: %s", news.stage, key_text(news.node), verdict.finding)
        elif news.equivocation:
            after = before
            try:  # not the auditor's word, but the node's own: checked here too
                after = book.proven(Equivocation.decode(news.equivocation).convicted(), news.why)
            except LlmdError as e:
                _log.error("what the auditor calls a proof against %s is none: %s", key_text(news.node), e)
        elif news.refused:
            after = book.refused(news.node, news.why)
        else:
            after = before
        book.read(news.number)
        if after.state is not before.state:
            _log.error("node %s is %s now: %s", key_text(news.node), after.state.value, after.reason)

    def _convict(self, book: StandingBook, folder: Path, proofs: Sequence[bytes]) -> None:
        """Of what stages said about rows on their way. A proof that is in the folder has had its effect."""
        for data in proofs:
            try:
                proof = TransitProof.decode(data)
                node = proof.convicted()
            except LlmdError as e:
                _log.error("what a Head calls a proof is none: %s", e)
                continue
            kept = folder / str(proof.cid)
            if not kept.exists():
                _log.error("node %s %s: %s", key_text(node), proof.what, kept)
                book.proven(node, proof.what)
                folder.mkdir(exist_ok=True, mode=0o700)
                kept.write_bytes(data)

    async def _ask_spares(self, group: PipelineGroup) -> None:
        """On which nodes they are."""
        for place, spare in zip(group.spec.plan.spares, group.spares, strict=True):
            if spare is not None and place.actor not in self._spare_nodes:
                with suppress(RayError, TimeoutError):  # one that is gone, or is being started: asked again
                    async with asyncio.timeout(_CALL_S):
                        self._spare_nodes[place.actor] = await spare.node_key()


def _rows_are_signed_for(config: AppConfig) -> bool:
    """Whether a Head can come to proofs at all."""
    mode = config.audit.deliveries
    return mode == "always" or (mode == "auto" and bool(config.pipeline.outside))
