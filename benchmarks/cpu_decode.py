"""How fast does one CPU serve SmolLM2, beside transformers and llama.cpp on the same cores?

    python -m benchmarks.cpu_decode --prepare WORK     # once: the models, in every form; minutes, not timed
    python -m benchmarks.cpu_decode WORK [--threads 2]

Ours go through LocalPipeline with receipts on; each engine in a process of its own, one after the other, all with the
same threads. llama.cpp is xllamacpp's wheel (pip install xllamacpp), its files made by gguf-py: layers at Q8_0 or Q4_0,
the embedding, which is the head too, at Q8_0, as llama-quantize does where a head is tied. Perplexity: of the stored
values in float32, llama.cpp's too, on this repository's README, so that only the weights differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Result, save

TOKENS, WARM, PROMPT = 96, 16, 16
OURS = [f"{form}-{how}" for form in ("bfloat16", "float32", "int8", "int4") for how in ("compiled", "operators")]
OTHERS = ["transformers-bfloat16", "transformers-float32", "llama.cpp-BF16", "llama.cpp-Q8_0", "llama.cpp-Q4_0"]
STAGES = ["stages-1", "stages-2"]
PERPLEXITY = ["ppl-bfloat16", "ppl-int8", "ppl-int4", "ppl-Q8_0", "ppl-Q4_0"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", default=[*OURS, *OTHERS, *STAGES, *PERPLEXITY])
    parser.add_argument("--one", help="used by itself")
    a = parser.parse_args()
    if a.prepare:
        prepare(a.work)
        return 0
    if a.one:
        print("\n" + json.dumps(one(a.work, a.one, a.threads)), flush=True)
        return 0
    figures: dict[str, Any] = {"threads": a.threads}
    environment = {**os.environ, "OMP_NUM_THREADS": str(a.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    for name in a.only:
        command = [sys.executable, "-m", "benchmarks.cpu_decode", str(a.work), "--threads", str(a.threads)]
        done = subprocess.run([*command, "--one", name], capture_output=True, text=True, env=environment, timeout=300)
        if done.returncode:
            print(f"{name} failed: {done.stderr[-800:]}", file=sys.stderr)
            figures[name] = None
            continue
        answer = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))  # llama.cpp talks
        figures[name] = json.loads(answer)
        print(f"{name:24} {figures[name]}", flush=True)
    save(Result("cpu_decode", figures))
    return int(any(value is None for value in figures.values()))


def one(work: Path, name: str, threads: int) -> dict[str, float]:
    """The figures of one engine, in this process."""
    kind, _, form = name.partition("-")
    if kind == "transformers":
        return of_transformers(form, threads)
    if kind == "llama.cpp":
        return of_llama_cpp(work / f"{form}.gguf", threads)
    if kind == "stages":
        return asyncio.run(of_stages(work, int(form), threads))
    if kind == "ppl":
        return {"perplexity": round(perplexity(work, form), 4)}
    return asyncio.run(of_ours(work, kind, form == "compiled", threads))


def prepare(work: Path) -> None:
    """Every form of the model: shards of ours, files of llama.cpp, and shards of what those files hold."""
    from serve_app.demo import demo_model
    from shard_tools.checkpoint.source import open_checkpoint
    from shard_tools.checkpoint.split import split
    from shard_tools.store.directory import DirectoryStore

    work.mkdir(parents=True, exist_ok=True)
    source = demo_model()
    for kind in ("BF16", "Q8_0", "Q4_0"):
        write_gguf(source, work / f"{kind}.gguf", kind)
    store = DirectoryStore(work / "store")
    for form, path, dtype, scheme in (
        ("bfloat16", source, "bfloat16", None),
        ("float32", source, "float32", None),
        ("int8", source, "bfloat16", "int8"),
        ("int4", source, "bfloat16", "int4"),
        ("Q8_0", work / "Q8_0.gguf", "float32", None),
        ("Q4_0", work / "Q4_0.gguf", "float32", None),
    ):
        named = work / f"{form}.cid"
        if not named.exists():
            named.write_text(str(split(open_checkpoint(path), store, form, dtype, scheme=scheme).cid))  # type: ignore[arg-type]
        print(f"{form} is there", flush=True)


def write_gguf(source: Path, target: Path, kind: str) -> None:
    """The same model with its matrices at this quantisation."""
    import gguf

    if target.exists():
        return
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target.with_suffix(".part"), architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        matrix = values.ndim == 2
        wanted = "Q8_0" if tensor.name == "token_embd.weight" and kind == "Q4_0" else kind
        to = getattr(gguf.GGMLQuantizationType, wanted if matrix else "F32")
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target.with_suffix(".part").rename(target)


def model_of(work: Path, form: str) -> tuple[Any, Any]:
    """The store, and the manifest of this form."""
    from shard_tools.cid import Cid
    from shard_tools.fetch import load_manifest
    from shard_tools.store.directory import DirectoryStore

    store = DirectoryStore(work / "store")
    return store, load_manifest(store, Cid.parse((work / f"{form}.cid").read_text()))


def prompt_of(tokens: int) -> tuple[int, ...]:
    """Ids that mean nothing: how long a step takes does not depend on them."""
    return tuple((37 * i) % 40_000 + 5 for i in range(tokens))


def pipeline_of(work: Path, form: str, stages: int, threads: int, native: bool = True) -> Any:
    from serve_app.engine.load import LoadOptions
    from serve_app.local import LocalLimits, LocalPipeline

    store, manifest = model_of(work, form)
    options = LoadOptions("cpu", "float32" if form == "float32" else "bfloat16", 16, threads, native=native)
    return LocalPipeline(
        store, manifest, stages=stages, options=options, limits=LocalLimits(n_pages=512, take_turns=True)
    )


async def stream(pipeline: Any, prompt: int, tokens: int) -> tuple[float, float, float]:
    """Seconds to the first token; then tokens per second, and milliseconds of all cores together for each."""
    from serve_app.messages.request import GenerationRequest, RequestId, Sampling, TokensEvent, fresh_salt

    id = RequestId(os.urandom(8).hex())
    request = GenerationRequest(
        id, pipeline.manifest.cid, prompt_of(prompt), tokens, Sampling(0), (), b"", fresh_salt()
    )
    began, first, n = time.perf_counter(), 0.0, 0
    async for event in pipeline.generate(request):
        if isinstance(event, TokensEvent):
            n += len(event.tokens)
            if not first:
                first, burnt = time.perf_counter(), time.process_time()
            last, used = time.perf_counter(), time.process_time()
    if n == 1:
        return first - began, 0.0, 0.0
    return first - began, (n - 1) / (last - first), (used - burnt) * 1e3 / (n - 1)


def check_hashed(pipeline: Any) -> None:
    """Every row that ran was hashed by every stage, or these figures do not count."""
    time.sleep(0.3)
    ran = pipeline.status()["pipelines"][0]["rows_run"]
    hashed = [stage.witness.rows_hashed for stage in pipeline.stages]
    assert all(rows == ran for rows in hashed), (ran, hashed)


async def of_ours(work: Path, form: str, native: bool, threads: int) -> dict[str, float]:
    pipeline = pipeline_of(work, form, 1, threads, native)
    try:
        await stream(pipeline, PROMPT, WARM)
        runs = [await stream(pipeline, PROMPT, TOKENS) for _ in range(2)]
        firsts = {n: min([(await stream(pipeline, n, 1))[0] for _ in range(2)]) for n in (128, 512)}
        check_hashed(pipeline)
    finally:
        pipeline.close()
    prefill = {f"prefill_{n}_tokens_per_s": round(n / s, 1) for n, s in firsts.items()}
    rate, burnt = max(run[1] for run in runs), min(run[2] for run in runs)
    return {"decode_tokens_per_s": round(rate, 1), "decode_cpu_ms": round(burnt, 2)} | prefill


async def of_stages(work: Path, stages: int, threads: int) -> dict[str, float]:
    """Four streams at a time, bfloat16; the stages take turns on the same cores, as they do on one node."""
    pipeline = pipeline_of(work, "bfloat16", stages, threads)
    try:
        await asyncio.gather(*(stream(pipeline, PROMPT, WARM) for _ in range(4)))
        best = 0.0
        for _ in range(2):
            began = time.perf_counter()
            await asyncio.gather(*(stream(pipeline, PROMPT, TOKENS) for _ in range(4)))
            best = max(best, 4 * TOKENS / (time.perf_counter() - began))
        check_hashed(pipeline)
    finally:
        pipeline.close()
    return {"four_streams_tokens_per_s": round(best, 1)}


def of_transformers(form: str, threads: int) -> dict[str, float]:
    import torch

    from benchmarks.parity import reference_model
    from serve_app.demo import demo_model
    from shard_tools.checkpoint.source import open_checkpoint

    torch.set_num_threads(threads)
    model = reference_model(open_checkpoint(demo_model()), getattr(torch, form))

    def seconds(prompt: int, tokens: int) -> float:
        began = time.perf_counter()
        ids = torch.tensor([prompt_of(prompt)])
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        model.generate(ids, **length, do_sample=False, eos_token_id=None, pad_token_id=0)
        return time.perf_counter() - began

    with torch.inference_mode():
        seconds(PROMPT, 4)
        first = min(seconds(PROMPT, 1) for _ in range(2))
        before = time.process_time()
        rate = (TOKENS // 2 - 1) / (seconds(PROMPT, TOKENS // 2) - first)
        burnt = (time.process_time() - before) * 1e3 / (TOKENS // 2)
        prefill = {f"prefill_{n}_tokens_per_s": round(n / seconds(n, 1), 1) for n in (128, 512)}
    return {"decode_tokens_per_s": round(rate, 1), "decode_cpu_ms": round(burnt, 2)} | prefill


def of_llama_cpp(path: Path, threads: int) -> dict[str, float]:
    import xllamacpp

    params: Any = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 1024, 1, 0, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server: Any = xllamacpp.Server(params)

    def timings(prompt: int, tokens: int) -> dict[str, float]:
        asked = {"prompt": list(prompt_of(prompt)), "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        answer: dict[str, Any] = server.handle_completions(asked | {"cache_prompt": False, "timings_per_token": True})
        assert answer["usage"]["completion_tokens"] == tokens
        return dict(answer["timings"])

    timings(PROMPT, WARM)
    before = time.process_time()
    rate = max(timings(PROMPT, TOKENS)["predicted_per_second"] for _ in range(2))
    burnt = (time.process_time() - before) * 1e3 / (2 * TOKENS)  # with the prompt's 16 tokens: about 3 % too much
    prefill = {n: max(timings(n, 1)["prompt_per_second"] for _ in range(2)) for n in (128, 512)}
    return {"decode_tokens_per_s": round(rate, 1), "decode_cpu_ms": round(burnt, 2)} | {
        f"prefill_{n}_tokens_per_s": round(s, 1) for n, s in prefill.items()
    }


def perplexity(work: Path, form: str, tokens: int = 768) -> float:
    """Teacher-forced over the README's first tokens, by the plain engine in float32."""
    import numpy as np
    import torch

    from serve_app.api.text import TextCodec
    from serve_app.engine.engines import TORCH
    from serve_app.engine.load import LoadOptions, load_engine
    from serve_app.messages.step import CLOSE, OPEN, SPAN, StepPlan
    from shard_tools.fetch import read_file

    store, manifest = model_of(work, form)
    text = TextCodec.from_files({f.path: read_file(store, f) for f in manifest.files})
    words = (Path(__file__).parents[1] / "LICENSE").read_text() + (Path(__file__).parents[1] / "README.md").read_text()
    ids = np.array(text.encode(words, False)[:tokens], "<u4")
    engine = load_engine(store, manifest, 0, manifest.n_layers, LoadOptions("cpu", "float32", 16, None, TORCH))
    pages = -(-tokens // 16)
    engine.reserve(pages, 1)
    opening, span = np.zeros(1, OPEN), np.array([(0, 0, tokens, pages, 0)], SPAN)
    plan = StepPlan(0, 0, opening, span, np.arange(pages, dtype="<u4"), np.zeros(0, CLOSE), np.zeros(0, "<u8"))
    hidden = engine.run(plan, memoryview(ids.tobytes())).hidden
    logits = engine.logits_of(hidden)[:-1]
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:].astype(np.int64)))
    return float(loss.exp())


if __name__ == "__main__":
    sys.exit(main())
