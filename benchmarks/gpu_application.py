"""The same application with its stages on a GPU, once: publish, serve, ask, verify, compare.

    python3 -m benchmarks.gpu_application [--device cuda] [--tiny]

Random weights of Qwen3-0.6B's published configuration (nothing to download), bfloat16, one stage and then two stages
that share the GPU. The logits of two engines in a row are compared with transformers' own on the same device; the
receipt is verified by `llmd receipt verify`. --tiny: a few layers, to try the script on a CPU.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.parity import pipeline_logits
from benchmarks.report import Result, save
from serve_app.config import config_path
from shard_tools.fetch import load_manifest
from shard_tools.index.directory import DirectoryIndex
from shard_tools.publish import publish
from shard_tools.signing import Signer, key_text
from shard_tools.store.directory import DirectoryStore
from tests.tiny_models import write_tokenizer

NAME = "qwen3-0.6b-random"
URL = "http://127.0.0.1:8000"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    figures: dict[str, Any] = {"torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = write_checkpoint(root / "checkpoint", a.tiny)
        store, signer = DirectoryStore(root / "store"), Signer.fresh()
        began = time.perf_counter()
        record = publish(root / "checkpoint", store, DirectoryIndex(root / "store"), NAME, signer)
        figures["publish_s"] = round(time.perf_counter() - began, 2)
        (root / "publisher.pub").write_text(key_text(signer.public) + "\n")
        figures |= compare(model.to(a.device), store, record.manifest, a.device)
        print(figures, flush=True)
        del model
        torch.cuda.empty_cache()
        for stages in (1, 2):
            figures[f"{stages}_stages"] = serve_and_ask(root, a.device, stages)
    save(Result("gpu_application", figures), a.out)
    return 0


def write_checkpoint(folder: Path, tiny: bool) -> Any:
    """Random weights, on disk as transformers writes them; also returned."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=4 if tiny else 28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=8192 if tiny else 151936,
        max_position_embeddings=40960,
        rope_theta=1_000_000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder, context=40960)
    return model


@torch.inference_mode()
def compare(model: Any, store: DirectoryStore, cid: Any, device: str) -> dict[str, Any]:
    """Logits of two stages against transformers', in bfloat16, and transformers' own error against float32."""
    prompt = tuple(range(3, 103))
    manifest = load_manifest(store, cid)
    ours = pipeline_logits(store, manifest, prompt, "bfloat16", device).cpu()
    ids = torch.tensor([prompt], device=device)
    theirs = model(ids).logits[0].float().cpu()
    exact = model.float()(ids).logits[0].float().cpu()
    return {
        "largest_logit": float(f"{exact.abs().max():.3g}"),
        "ours_against_transformers_bf16": float(f"{(ours - theirs).abs().max():.3g}"),
        "ours_against_transformers_float32": float(f"{(ours - exact).abs().max():.3g}"),
        "transformers_bf16_against_its_float32": float(f"{(theirs - exact).abs().max():.3g}"),
    }


def serve_and_ask(root: Path, device: str, stages: int) -> dict[str, Any]:
    """Start the application, ask it, verify the receipt, measure 8 streams, stop it."""
    document = yaml.safe_load(config_path(None).read_text())
    args = document["applications"][0]["args"]
    args["model"] |= {"name": NAME, "store": str(root / "store"), "trust": [str(root / "publisher.pub")]}
    args["pipeline"] |= {"stages": stages, "device": device, "gpus_per_stage": 1.0 / stages}
    args["identity"]["state_dir"] = str(root / "state")
    path, log = root / "config.yaml", root / "log"
    path.write_text(yaml.safe_dump(document))
    began = time.perf_counter()
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "serve_app.cli", "serve", str(path), "--new-ray"], stdout=out, stderr=out
        )
    try:
        while not healthy():
            if server.poll() is not None or time.perf_counter() - began > 240:
                raise SystemExit(log.read_text()[-3000:])
            time.sleep(0.5)
        ready_s = time.perf_counter() - began
        receipt = root / f"receipt-{stages}"
        llmd("chat", "What is a shard?", "--temperature", "0", "--max-tokens", "64", "--receipt", str(receipt))
        beside = ("--request", f"{receipt}.request.json", "--response", f"{receipt}.response.json")
        trust = ("--trust", str(root / "state" / "operator.pub"), "--store", str(root / "store"))
        llmd("receipt", "verify", str(receipt), *trust, *beside)
        subprocess.run([sys.executable, "-m", "benchmarks.concurrency", "--requests", "8"], check=True)
        pipeline = httpx.get(f"{URL}/v1/cluster/state", timeout=5).json()["pipelines"][0]
        return {"ready_s": round(ready_s, 1), "stages": pipeline["stages"]}
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def healthy() -> bool:
    """Whether a token has been generated."""
    try:
        return httpx.get(f"{URL}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def llmd(*args: str) -> None:
    """A command a person would type."""
    subprocess.run([sys.executable, "-m", "serve_app.cli", *args], check=True)


if __name__ == "__main__":
    sys.exit(main())
