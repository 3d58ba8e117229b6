"""Run by test_plugins.py where the example package is installed: publish, serve and verify through its parts alone.

Arguments: a folder. Prints the tokens of a pipeline of two stages of the chosen engine, then those of plain torch.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from serve_app.choices import check_choices, index_of, store_of
from serve_app.config import AppConfig
from serve_app.engine.engines import TORCH
from serve_app.engine.load import LoadOptions
from serve_app.local import LocalPipeline
from serve_app.messages.request import FinishedEvent, GenerationRequest, RequestId, Sampling, TokensEvent, fresh_salt
from serve_app.receipts.bundle import Bundle
from serve_app.receipts.check import check
from shard_tools.catalog import open_model
from shard_tools.choice import Choice
from shard_tools.manifest import Manifest
from shard_tools.publish import publish
from shard_tools.signing import Signer, key_text
from shard_tools.store.block_store import BlockStore
from tests.tiny_models import write_tiny_checkpoint


async def tokens_of(store: BlockStore, manifest: Manifest, engine: Choice) -> list[int]:
    options = LoadOptions("cpu", "float32", 16, 1, engine)
    pipeline = LocalPipeline(store, manifest, stages=2, options=options)
    try:
        await pipeline.warm_up()
        request = GenerationRequest(
            RequestId("r"), manifest.cid, tuple(range(3, 20)), 8, Sampling(0), (), b"", fresh_salt()
        )
        events = [event async for event in pipeline.generate(request)]
        assert isinstance(events[-1], FinishedEvent), events[-1]
        checked = check(Bundle.decode(events[-1].receipt), pipeline.operator.public, now_s=int(time.time()))
        print(checked.statements[0].profile, file=sys.stderr)
        return [token for event in events if isinstance(event, TokensEvent) for token in event.tokens]
    finally:
        pipeline.close()


def main(folder: Path) -> None:
    models = {"kind": "sqlite", "path": str(folder / "models.db")}
    signer = Signer.fresh()
    model = {"name": "tiny", "store": models, "index": models, "trust": [key_text(signer.public)]}
    app = AppConfig.parse({"model": model, "pipeline": {"engine": "numpy"}})
    check_choices(app)
    store, index = store_of(app.model.store), index_of(app.model)
    publish(write_tiny_checkpoint(folder / "checkpoint"), store, index, "tiny", signer)
    manifest = open_model("tiny", index, store, app.model.publishers(), int(time.time()), None)
    found = [asyncio.run(tokens_of(store, manifest, engine)) for engine in (app.pipeline.engine, TORCH)]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
