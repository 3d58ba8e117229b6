"""Does a stage open only its own layers, and hold only their bytes? Shown on a generated model of 2.3 GB.

    python -m benchmarks.stage_isolation [--stages 3]

A random Llama of 24 layers (hidden 2048, bfloat16, tied head) is written, published and loaded stage by stage,
each in a process of its own. The store records every block that is opened; the process reports its parameter bytes
and how much its resident memory grew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.process_watch import resident_bytes
from benchmarks.report import Result, save
from shard_tools.cid import Cid
from shard_tools.index.directory import DirectoryIndex
from shard_tools.manifest import Manifest
from shard_tools.placement.even import plan
from shard_tools.publish import publish
from shard_tools.signing import Signer
from shard_tools.store.directory import DirectoryStore

LAYERS, HIDDEN, VOCAB = 24, 2048, 49152


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--load", nargs=4, metavar=("STORE", "CID", "START", "STOP"), help="used by itself")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    if a.load:
        store, cid, start, stop = a.load
        print(json.dumps(load_one(Path(store), Cid.parse(cid), int(start), int(stop))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        manifest = publish_model(root)
        total = sum(s.size for s in manifest.shards)
        print(f"a model of {total / 1e9:.2f} GB in {len(manifest.shards)} shards", flush=True)
        figures: dict[str, object] = {"model_gb": round(total / 1e9, 3), "shards": len(manifest.shards)}
        failed = False
        for i, (start, stop) in enumerate(plan(manifest.n_layers, a.stages)):
            command = [sys.executable, "-m", "benchmarks.stage_isolation", "--load"]
            run = [*command, str(root / "store"), str(manifest.cid), str(start), str(stop)]
            found = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            figures[f"stage_{i}"] = found
            print(f"stage {i}: {found}", flush=True)
            failed |= bool(found["foreign_blocks"]) or found["parameter_bytes"] != found["own_tensor_bytes"]
        save(Result("stage_isolation", figures), a.out)
    return int(failed)


def publish_model(root: Path) -> Manifest:
    """A random checkpoint, published into root/store."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny_models import write_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=5632,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(root / "checkpoint", max_shard_size="500MB")
    write_tokenizer(root / "checkpoint")
    del model
    store = DirectoryStore(root / "store")
    record = publish(root / "checkpoint", store, DirectoryIndex(root / "store"), "generated", Signer.fresh())
    from shard_tools.fetch import load_manifest

    return load_manifest(store, record.manifest)


def load_one(root: Path, cid: Cid, start: int, stop: int) -> dict[str, object]:
    """Load one stage here and say what it opened and holds."""
    from serve_app.engine.load import LoadOptions, load_engine
    from shard_tools.fetch import load_manifest

    opened: set[Cid] = set()

    class Watching(DirectoryStore):
        def get(self, asked: Cid) -> bytes:
            opened.add(asked)
            return super().get(asked)

    store = Watching(root)
    manifest = load_manifest(store, cid)
    opened.clear()
    before = resident_bytes()
    engine = load_engine(store, manifest, start, stop, LoadOptions("cpu", "bfloat16", 16, 2))
    refs = {(r.shard, r.tensor) for unit in manifest.units_of(start, stop) for r in unit.tensors}
    own = [manifest.shards[s].tensors[t] for s, t in refs]
    own_blocks = {leaf.cid for tensor in own for leaf in tensor.leaves}
    leaves = {leaf.cid for shard in manifest.shards for tensor in shard.tensors for leaf in tensor.leaves}
    return {
        "layers": [start, stop],
        "opened_weight_blocks": len(opened & leaves),
        "own_weight_blocks": len(own_blocks),
        "foreign_blocks": len((opened & leaves) - own_blocks),
        "parameter_bytes": engine.profile.parameter_bytes,
        "own_tensor_bytes": sum(tensor.size for tensor in own),
        "resident_growth_bytes": resident_bytes() - before,
    }


if __name__ == "__main__":
    sys.exit(main())
