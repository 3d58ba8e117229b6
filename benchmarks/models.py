"""The models that CPU benchmarks ask: SmolLM2-135M out of its package, or a tiny random one; published, in a folder."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch

from serve_app.api.text import TextCodec
from serve_app.demo import demo_model
from serve_app.engine.load import LoadOptions
from serve_app.local import LocalLimits, LocalPipeline
from serve_app.messages.request import GenerationRequest, RequestId, Sampling, fresh_salt
from shard_tools.fetch import load_manifest, read_file
from shard_tools.index.directory import DirectoryIndex
from shard_tools.manifest import Manifest
from shard_tools.publish import publish
from shard_tools.signing import Signer, key_text
from shard_tools.store.directory import DirectoryStore
from tests.tiny_models import write_tiny_checkpoint

ModelChoice = Literal["smollm2", "tiny"]
PAGE_SIZE = 16  # tokens, as in serve_app/config.yaml
TINY_CONTEXT = 4096  # tokens: room for a receipt of 2000 rows


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """One model in root/store, named there, signed with the key of root/publisher.pub."""

    root: Path
    checkpoint: Path
    manifest: Manifest
    text: TextCodec

    @property
    def store(self) -> DirectoryStore:
        """Its blocks."""
        return DirectoryStore(self.root / "store")

    @property
    def publisher(self) -> Path:
        """The file with its publisher's key."""
        return self.root / "publisher.pub"

    def pipeline(self, stages: int, limits: LocalLimits | None = None, prefix_cache: bool = False) -> LocalPipeline:
        """It, served in this process in float32; the cores are shared out among the stages.

        prefix_cache: with one, if this build has it.
        """
        options = LoadOptions("cpu", "float32", PAGE_SIZE, max(1, torch.get_num_threads() // stages))
        limits = limits or LocalLimits()
        if prefix_cache and any(f.name == "prefix_cache" for f in fields(limits)):
            limits = replace(limits, **{"prefix_cache": True})
        return LocalPipeline(self.store, self.manifest, stages=stages, options=options, limits=limits)


def published(root: Path, choice: ModelChoice) -> PublishedModel:
    """The model of that name, in float32, so that transformers on the same checkpoint has the same values."""
    checkpoint = demo_model()
    if choice == "tiny":
        checkpoint = write_tiny_checkpoint(root / "checkpoint", layers=4, context=TINY_CONTEXT)
    store, signer = DirectoryStore(root / "store"), Signer.fresh()
    record = publish(checkpoint, store, DirectoryIndex(root / "store"), f"bench-{choice}", signer, "float32")
    (root / "publisher.pub").write_text(key_text(signer.public) + "\n")
    manifest = load_manifest(store, record.manifest)
    text = TextCodec.from_files({f.path: read_file(store, f) for f in manifest.files})
    return PublishedModel(root, checkpoint, manifest, text)


def random_prompt(draw: random.Random, manifest: Manifest, n: int) -> tuple[int, ...]:
    """n ids of ordinary tokens; the special ones stand below 100 in both models."""
    return tuple(draw.randrange(100, min(manifest.vocab_size, 40_000)) for _ in range(n))


_numbers = itertools.count()


def greedy(manifest: Manifest, prompt: Sequence[int], tokens: int, stop_ids: tuple[int, ...] = ()) -> GenerationRequest:
    """A request for the likeliest `tokens` tokens."""
    id = RequestId(f"bench-{next(_numbers)}")
    return GenerationRequest(id, manifest.cid, tuple(prompt), tokens, Sampling(0), stop_ids, b"", fresh_salt())
