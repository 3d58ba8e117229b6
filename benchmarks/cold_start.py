"""From shards on disk to the first token: what takes how long?

    python -m benchmarks.cold_start [--model smollm2] [--stages 2] [--repeats 2] [--no-serve]

Two ways: LocalPipeline in a fresh process, which says when it has done what; and `llmd serve`, whose processes are
watched from outside (when each appears, what its stages say they took to load, when /health answers). And the imports
that either makes, by `python -X importtime`. Files are in the page cache: the model has just been written. Of the
repeats the fastest counts; the others are kept beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.models import ModelChoice, PublishedModel, published
from benchmarks.report import Result, save
from benchmarks.server import START_S, OwnServer

ROOT = Path(__file__).parents[1]
# What each process of the application imports first.
IMPORTED = {
    "llmd": "serve_app.cli",
    "ingress": "serve_app.cluster.application",
    "head": "serve_app.cluster.head_actor",
    "stage": "serve_app.engine.load",
    "receipt_check": "serve_app.receipts.check",
}
ACTORS = ("ServeController", "ProxyActor", "ServeReplica", "Supervisor", "Stage", "Head")  # in titles of processes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-serve", action="store_true", help="without the application")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; default: benchmarks/results")
    a = parser.parse_args()
    figures: dict[str, Any] = {"stages": a.stages}
    with tempfile.TemporaryDirectory() as folder:
        model = published(Path(folder), a.model)
        figures["model"] = model.manifest.name
        runs = sorted((fresh_process(model, a.stages) for _ in range(a.repeats)), key=lambda run: run["total_s"])
        figures["local_pipeline"] = runs[0] | {"all_totals_s": [run["total_s"] for run in runs]}
        print(figures["local_pipeline"], flush=True)
    figures["imports"] = {who: imports(module) for who, module in IMPORTED.items()}
    if not a.no_serve:
        served = sorted((llmd_serve(a.model, a.stages) for _ in range(a.repeats)), key=lambda run: run["ready_s"])
        figures["llmd_serve"] = served[0] | {"all_ready_s": [run["ready_s"] for run in served]}
    save(Result("cold_start", figures), a.out)
    return 0


def fresh_process(model: PublishedModel, stages: int) -> dict[str, float]:
    """Seconds of each part, in a process that has imported nothing."""
    command = [sys.executable, "-c", _FRESH, str(model.root), str(model.manifest.cid), str(stages)]
    run = subprocess.run(
        [*command, repr(time.monotonic())], cwd=ROOT, capture_output=True, text=True, check=True, timeout=START_S
    )
    parts: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return parts


# Not `-m benchmarks.cold_start`: this file's own imports would come first.
_FRESH = """
import json, sys
from pathlib import Path
from benchmarks.cold_process import first_token
print(json.dumps(first_token(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))))
"""


def imports(module: str) -> dict[str, Any]:
    """Seconds that importing it takes, and the packages that take most of it with what they import themselves."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=START_S).stderr
    own: dict[str, float] = {}
    total = 0.0
    for line in said.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if len(fields) != 3 or not fields[0].strip().isdecimal():
            continue
        package = fields[2].strip().split(".")[0]
        seconds = int(fields[0]) / 1e6
        own[package] = own.get(package, 0.0) + seconds
        total += seconds
    largest = sorted(own.items(), key=lambda item: -item[1])[:6]
    return {"total_s": round(total, 2), "own_time_s": {name: round(seconds, 2) for name, seconds in largest}}


def llmd_serve(choice: ModelChoice, stages: int) -> dict[str, Any]:
    """Seconds after the command until each process was there, until /health, and what the stages say of loading."""
    server = OwnServer(choice, stages)
    seen: dict[str, float] = {}
    server.start()
    try:
        while not (ready := server.ready()):
            now = time.monotonic() - server.started_s
            if now > START_S:
                raise SystemExit(f"not ready after {START_S:.0f} s")
            for title in server.processes().values():
                # An actor's process is there before Ray gives it its title.
                names = [actor for actor in ACTORS if title.startswith("ray::") and actor in title]
                names += ["raylet"] if "/raylet " in title else []
                for name in names:
                    seen.setdefault(f"{name}_s", round(now, 2))
            time.sleep(0.1)
        assert ready
        ready_s = time.monotonic() - server.started_s
        stage_load = [stage["load_ms"] / 1000 for stage in server.state()["stages"]]
    finally:
        server.stop()
    return {"ready_s": round(ready_s, 2), "seen": seen, "stage_load_s": stage_load}


if __name__ == "__main__":
    sys.exit(main())
