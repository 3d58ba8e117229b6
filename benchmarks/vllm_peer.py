"""The peer on a GPU: vLLM on the workloads of gpu_serving.py, with random weights of the same configurations.

    python3 -m benchmarks.vllm_peer --model qwen3-0.6b --work nano decode

Run it on the same host right before or after gpu_serving: only figures of one machine and one hour compare. Prefix
caching is off on both sides; everything else is vLLM's own default, and may be tuned upward with --set.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_models import ARCHITECTURES, MODELS
from benchmarks.gpu_serving import nano
from benchmarks.report import Result, save


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=[name for name in MODELS if not name.startswith("tiny")], default="qwen3-0.6b"
    )
    parser.add_argument("--work", nargs="+", choices=["nano", "decode"], default=["nano", "decode"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="arguments of vllm.LLM")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    for name, value in {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it is compiled at start-up, by a compiler the host may lack
        "HF_HUB_OFFLINE": "1",
    }.items():
        os.environ.setdefault(name, value)
    import vllm

    shape = MODELS[a.model]
    config = {**shape, "architectures": [ARCHITECTURES[shape["model_type"]]], "hidden_act": "silu"}
    config |= {"torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 2, "attention_bias": False}
    figures: dict[str, Any] = {"model": a.model, "vllm": vllm.__version__}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        given = {name: json.loads(value) for name, value in (item.split("=", 1) for item in a.set)}
        fixed = {"load_format": "dummy", "skip_tokenizer_init": True, "enable_prefix_caching": False}
        began = time.perf_counter()
        llm = vllm.LLM(
            model=folder, max_model_len=4096, gpu_memory_utilization=0.9, max_num_seqs=256, **{**fixed, **given}
        )
        figures["start_s"] = round(time.perf_counter() - began, 1)
        run(llm, [([1] * 16, 8)])
        if "nano" in a.work:
            asked = nano(shape["vocab_size"], 256)
            for attempt in range(2):
                n, seconds = sum(tokens for _, tokens in asked), run(llm, asked)
                figures[f"nano_tokens_per_s_{attempt}"] = round(n / seconds)
                print(f"nano: {n} tokens in {seconds:.2f} s: {n / seconds:.0f} tok/s", flush=True)
        for batch in a.batches if "decode" in a.work else []:
            prompts = [random.choices(range(shape["vocab_size"] - 300), k=128) for _ in range(batch)]
            short, long = (run(llm, [(prompt, tokens) for prompt in prompts]) for tokens in (2, 130))
            figures[f"decode_{batch}_ms"] = round((long - short) / 128 * 1e3, 3)
            print(f"decode at batch {batch}: {figures[f'decode_{batch}_ms']} ms a step", flush=True)
    save(Result("vllm_peer", figures), a.out)
    return 0


def run(llm: Any, asked: list[tuple[list[int], int]]) -> float:
    """Seconds for all of it. Fails unless every request got as many tokens as it asked for."""
    from vllm import SamplingParams

    ways = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n, detokenize=False) for _, n in asked]
    began = time.perf_counter()
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in asked], ways, use_tqdm=False)
    seconds = time.perf_counter() - began
    assert [len(answer.outputs[0].token_ids) for answer in answers] == [n for _, n in asked]
    return seconds


if __name__ == "__main__":
    sys.exit(main())
