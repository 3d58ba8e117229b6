"""The process that benchmarks/cold_start.py starts: a LocalPipeline out of nothing, with the time of each part.

Imports stand inside, one after another, because they are what is timed.
"""

from __future__ import annotations

import time
from pathlib import Path


def first_token(root: Path, cid: str, stages: int, spawned_s: float) -> dict[str, float]:
    """Seconds of each part, from the moment the process was spawned (time.monotonic() of its parent) to a receipt."""
    marks = [("interpreter", time.monotonic())]

    def mark(name: str) -> None:
        marks.append((name, time.monotonic()))

    import torch

    mark("import_torch")
    import transformers  # noqa: F401

    mark("import_transformers")
    import serve_app.local  # noqa: F401

    mark("import_serve_app")
    parts = _served(root, cid, stages, mark, torch.get_num_threads())
    before, out = spawned_s, {}
    for name, at in marks:
        out[f"{name}_s"] = round(at - before, 3)
        before = at
    return {"total_s": round(before - spawned_s, 3), **out, **parts}


def _served(root: Path, cid: str, stages: int, mark, threads: int) -> dict[str, float]:  # type: ignore[no-untyped-def]
    import asyncio

    import serve_app.local
    from serve_app.engine.load import LoadOptions
    from serve_app.local import LocalPipeline
    from serve_app.messages.request import GenerationRequest, RequestId, Sampling, TokensEvent, fresh_salt
    from shard_tools.cid import Cid
    from shard_tools.fetch import load_manifest
    from shard_tools.store.directory import DirectoryStore

    parts = {"blocks_read_and_verified_s": 0.0, "engines_s": 0.0}

    class TimedStore(DirectoryStore):
        def get(self, asked: Cid) -> bytes:
            began = time.monotonic()
            block = super().get(asked)
            parts["blocks_read_and_verified_s"] += time.monotonic() - began
            return block

    load_engine = serve_app.local.load_engine

    def timed_load(*args):  # type: ignore[no-untyped-def]
        began = time.monotonic()
        engine = load_engine(*args)
        parts["engines_s"] += time.monotonic() - began
        return engine

    serve_app.local.load_engine = timed_load

    async def serve() -> None:
        store = TimedStore(root / "store")
        manifest = load_manifest(store, Cid.parse(cid))
        mark("manifest")
        options = LoadOptions("cpu", "float32", 16, max(1, threads // stages))
        pipeline = LocalPipeline(store, manifest, stages=stages, options=options)
        mark("load")
        prompt = tuple(range(100, 130))
        request = GenerationRequest(RequestId("cold"), manifest.cid, prompt, 2, Sampling(0), (), b"", fresh_salt())
        first = True
        async for event in pipeline.generate(request):
            if isinstance(event, TokensEvent) and first:
                mark("first_token")
                first = False
        mark("second_token_and_receipt")

    asyncio.run(serve())
    return {name: round(seconds, 3) for name, seconds in parts.items()}
