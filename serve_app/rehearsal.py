"""Requests through a whole pipeline of this process whose rows are kept: for calibrations, and to show who cheats.

The pipeline is local.py's own, so rows come of prefill and decode in the batches that a scheduler makes of them, and
the statements are signed and the receipts checked. A stage can be made to cheat (engine/dishonest.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from serve_app.api.text import TextCodec
from serve_app.engine.engine import Engine
from serve_app.engine.load import LoadOptions, load_engine
from serve_app.errors import PipelineError
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.record import StageRecord
from serve_app.messages.request import FinishedEvent, GenerationRequest, RequestId, Sampling, fresh_salt
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.check import CheckedReceipt, check
from shard_tools.manifest import Manifest
from shard_tools.signing import Envelope
from shard_tools.store.block_store import BlockStore

Load = Callable[[BlockStore, Manifest, int, int, LoadOptions], Engine]
PROMPT_TOKENS = 24
_RETAIN_BYTES = 1 << 30  # in each stage; what was answered is taken out at once


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """One answered request: its receipt, checked, and by stage what was signed and the rows behind it."""

    receipt: CheckedReceipt
    statements: tuple[Envelope, ...]
    records: tuple[StageRecord, ...]


def rehearse(
    store: BlockStore,
    manifest: Manifest,
    prompts: Sequence[Sequence[int]],
    *,
    stages: int,
    options: LoadOptions,
    tokens: int,
    at_once: int = 8,
    cheats: Mapping[int, str] | None = None,
    samplings: Sequence[Sampling] = (Sampling(),),
) -> list[Rehearsed]:
    """The prompts, answered with `tokens` tokens each, `at_once` of them at a time, in their order.

    cheats: by stage, one of dishonest.DISHONEST, or for the last one of DISHONEST_SAMPLERS. samplings: the prompts take
    turns with them; the seed is the number of the prompt, whatever they say. Raises PipelineError if an answer fails.
    """
    run = _Rehearsal(store, manifest, stages, options, at_once, cheats or {})
    return asyncio.run(run.answers(prompts, tokens, samplings))


def prompts_of(
    codec: TextCodec, text: str, count: int, length: int = PROMPT_TOKENS, first: int = 0
) -> list[tuple[int, ...]]:
    """Prompts number first .. first + count - 1 out of a text: windows of it, one after another, none over another.

    Raises ValueError if the text is too short.
    """
    ids = codec.encode(text, False)
    if len(ids) < (first + count) * length:
        raise ValueError(f"{count} prompts from number {first} on need {(first + count) * length} tokens of text")
    return [tuple(ids[i * length : (i + 1) * length]) for i in range(first, first + count)]


def loader(stages: int, cheats: Mapping[int, str]) -> Load:
    """What makes the engines of a pipeline of so many stages. cheats: as in `rehearse`."""
    last_first = iter(reversed(range(stages)))

    def load(store: BlockStore, manifest: Manifest, start: int, stop: int, options: LoadOptions) -> Engine:
        cheat = cheats.get(next(last_first))
        if cheat is None:
            return load_engine(store, manifest, start, stop, options)
        # Imported where it is asked for: nothing that serves has it in memory.
        from serve_app.engine.dishonest import load_cheat

        return load_cheat(store, manifest, start, stop, options, cheat)

    return load


class _Rehearsal:
    def __init__(
        self,
        store: BlockStore,
        manifest: Manifest,
        stages: int,
        options: LoadOptions,
        at_once: int,
        cheats: Mapping[int, str],
    ) -> None:
        self._store, self._manifest, self._stages, self._options = store, manifest, stages, options
        self._at_once, self._cheats = at_once, cheats

    async def answers(
        self, prompts: Sequence[Sequence[int]], tokens: int, samplings: Sequence[Sampling]
    ) -> list[Rehearsed]:
        pages = self._at_once * (-(-(max(map(len, prompts)) + tokens) // self._options.page_size) + 1)
        limits = LocalLimits(
            n_pages=pages,
            max_running=self._at_once,
            max_waiting=len(prompts) + self._at_once,
            retain_bytes=_RETAIN_BYTES,
        )
        pipeline = LocalPipeline(
            self._store,
            self._manifest,
            stages=self._stages,
            options=self._options,
            limits=limits,
            load=loader(self._stages, self._cheats),
        )
        try:
            turn = asyncio.Semaphore(self._at_once)
            jobs = [
                self._answer(pipeline, turn, i, tuple(prompt), tokens, samplings[i % len(samplings)])
                for i, prompt in enumerate(prompts)
            ]
            return list(await asyncio.gather(*jobs))
        finally:
            pipeline.close()

    async def _answer(
        self,
        pipeline: LocalPipeline,
        turn: asyncio.Semaphore,
        number: int,
        prompt: tuple[int, ...],
        tokens: int,
        sampling: Sampling,
    ) -> Rehearsed:
        seeded, id = replace(sampling, seed=number), RequestId(f"rehearsal-{number}")
        request = GenerationRequest(id, self._manifest.cid, prompt, tokens, seeded, (), b"", fresh_salt())
        async with turn:
            async for event in pipeline.generate(request):
                if isinstance(event, FinishedEvent):
                    return with_rows(pipeline, event.receipt)
        raise PipelineError(f"request {number} of a rehearsal was not answered")


def with_rows(pipeline: LocalPipeline, receipt: bytes, *, keep: bool = False) -> Rehearsed:
    """An answer of this pipeline, whose stages keep rows. Raises PipelineError, ReceiptError.

    keep: they go on doing so, for those whose beginning these rows are too; else they let go of them.
    """
    bundle = Bundle.decode(receipt)
    checked = check(bundle, pipeline.operator.public, now_s=int(time.time()))
    records = []
    for said in checked.statements:
        retention = pipeline.stages[said.stage].retention
        record = retention.read(said.request_hash, said.attempt) if retention else None
        if retention is None or record is None:
            raise PipelineError(f"stage {said.stage} kept no rows of a request it has signed for")
        if not keep:
            retention.release(said.request_hash, said.attempt)
        records.append(record)
    return Rehearsed(checked, bundle.statements, tuple(records))
