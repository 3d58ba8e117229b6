"""What the picture of each benchmark shows. Each function draws one result's figures onto an empty figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Figures = Mapping[str, Any]

BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442",
)  # fmt: skip
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, YELLOW)
GREY = "#8a8a8a"
PARTS = (  # of a cold start, in order
    "interpreter", "import_torch", "import_transformers", "import_serve_app", "manifest", "load", "first_token",
    "second_token_and_receipt",
)  # fmt: skip
UNITS = ("s", "ms", "us", "percent", "bytes", "mb", "gb", "tokens", "rows")
MAX_BARS = 12  # of the plain drawing


def bars(ax: Axes, names: Sequence[str], values: Sequence[float], unit: str, colours: Sequence[str] = (BLUE,)) -> None:
    """One bar a name, its value written above it."""
    drawn = ax.bar(names, values, color=[colours[i % len(colours)] for i in range(len(names))], width=0.62)
    ax.bar_label(drawn, [f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in values], padding=2, fontsize=8)
    ax.set_ylabel(unit)
    ax.margins(y=0.14)


def concurrency(figure: Figure, f: Figures) -> None:
    """Two rates."""
    ax = figure.subplots()
    names = ["one after another", f"{f['requests']} side by side"]
    bars(ax, names, [f["alone_tokens_per_s"], f["together_tokens_per_s"]], "answer tokens/s", (GREY, BLUE))
    ax.set_title(f"{f['ratio']} times, {f['stages']} stages, over HTTP")


def parity(figure: Figure, f: Figures) -> None:
    """Equal answers and speed, by number of stages."""
    left, right = figure.subplots(1, 2)
    stages = sorted(int(name.split("_")[2]) for name in f if name.startswith("equal_answers_"))
    bars(left, [str(n) for n in stages], [f[f"equal_answers_{n}_stages"] for n in stages], "answers")
    left.axhline(f["prompts"], color=GREY, linestyle="--", linewidth=1)
    left.set_xlabel("stages")
    left.set_title(f"Equal to transformers', of {f['prompts']}")
    rates = [f["transformers_tokens_per_s"], *(f[f"pipeline_{n}_stages_tokens_per_s"] for n in stages)]
    bars(
        right, ["transformers", *map(str, stages)], rates, "answer tokens/s, one request", (GREY, *[BLUE] * len(stages))
    )
    right.set_xlabel("stages")
    right.set_title("Speed meanwhile")


def stage_isolation(figure: Figure, f: Figures) -> None:
    """Bytes of each stage."""
    ax = figure.subplots()
    stages = sorted(name for name in f if name.startswith("stage_"))
    kinds = (
        ("own_tensor_bytes", "its layers in the manifest", GREY),
        ("parameter_bytes", "its parameters", BLUE),
        ("resident_growth_bytes", "growth of its memory", ORANGE),
    )
    for k, (key, label, colour) in enumerate(kinds):
        places = [i + 0.27 * (k - 1) for i in range(len(stages))]
        ax.bar(places, [f[s][key] / 1e6 for s in stages], 0.25, color=colour, label=label)
    ax.set_xticks(range(len(stages)), [f"stage {s[6:]}\nlayers {f[s]['layers']}" for s in stages])
    ax.set_ylabel("MB")
    ax.margins(y=0.25)
    ax.legend(ncols=3, loc="upper left")


def gpu_application(figure: Figure, f: Figures) -> None:
    """Differences of logits, and when it was ready."""
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    kinds = (
        ("ours_against_transformers_bf16", "ours against\ntransformers'"),
        ("ours_against_transformers_float32", "ours against\nfloat32"),
        ("transformers_bf16_against_its_float32", "transformers'\nagainst float32"),
    )
    bars(left, [label for _, label in kinds], [f[key] for key, _ in kinds], "largest difference", (BLUE, BLUE, GREY))
    left.set_title(f"Logits in bfloat16 (the largest is {f['largest_logit']})")
    stages = sorted(name for name in f if name.endswith("_stages"))
    bars(right, [name.replace("_", " ") for name in stages], [f[name]["ready_s"] for name in stages], "s")
    right.set_title("Ready after")


def serving(figure: Figure, f: Figures) -> None:
    """Latencies and throughput by rate of arrival."""
    first, each, rate = figure.subplots(1, 3)
    runs = f["runs"]
    names = ["all at\nonce" if run["asked_per_s"] == "all at once" else f"{run['asked_per_s']:g}" for run in runs]
    for ax, key, title, scale in ((first, "ttft_ms", "Time to first text", 1e3), (each, "tpot_ms", "Per token", 1)):
        for percent, colour, marker in (("p50", BLUE, "o"), ("p90", ORANGE, "s"), ("p99", VERMILION, "^")):
            ax.plot(names, [run[key][percent] / scale for run in runs], color=colour, marker=marker, label=percent)
        bound = f["slo_ttft_ms" if key == "ttft_ms" else "slo_tpot_ms"] / scale
        ax.axhline(bound, color=GREY, linestyle="--", linewidth=1, label="bound")
        ax.set_ylim(bottom=0)
        ax.set_title(title)
        ax.set_ylabel("s" if scale == 1e3 else "ms")
    first.legend()
    rates, peer = [run["answer_tokens_per_s"] for run in runs], f.get("transformers_generate_batch")
    if peer:  # it has no arrivals to wait for
        bars(rate, [*names, "peer"], [*rates, peer["answer_tokens_per_s"]], "answer tokens/s",
             (*[BLUE] * len(runs), GREY))  # fmt: skip
    else:
        bars(rate, names, rates, "answer tokens/s")
    rate.set_title("Throughput")
    rate.set_xlabel("peer: transformers" if peer else "")
    each.set_xlabel("requests/s that arrive")


def soak(figure: Figure, f: Figures) -> None:
    """Memory over time, and how long clients waited."""
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    course = f["memory_mb_by_s"]
    left.plot([s / 60 for s, _ in course], [mb for _, mb in course], color=BLUE)
    left.set_ylim(0, 1.2 * max(mb for _, mb in course))
    left.set_xlabel("minutes")
    left.set_ylabel("memory, MB")
    ended, hung, stopped = f["requests_ended"], f["hung_up"], f["stopped_by_string"]
    left.set_title(f"{ended} requests, {hung} hung up, {stopped} with a stop string")
    waits = f["first_text_ms"]
    bars(right, list(waits), [ms / 1e3 for ms in waits.values()], "time to first text, s", (BLUE, ORANGE, VERMILION))
    right.set_title(f"{f['clients']} clients, {f['pages']} pages")


def cold_start(figure: Figure, f: Figures) -> None:
    """What happens when, from the command on."""
    ax = figure.subplots()
    parts = [(name.replace("_", " "), f["local_pipeline"][f"{name}_s"]) for name in PARTS]
    at, served = 0.0, f.get("llmd_serve")
    widest = served["ready_s"] if served else f["local_pipeline"]["total_s"]
    for i, (name, seconds) in enumerate(parts):
        ax.barh(1, seconds, 0.5, left=at, color=PALETTE[i % len(PALETTE)], label=name if seconds >= 0.1 else None)
        if seconds > 0.04 * widest:
            ax.text(at + seconds / 2, 1, f"{seconds:.1f}", ha="center", va="center", color="white", fontsize=7.5)
        at += seconds
    rows = ["LocalPipeline"]
    if served:
        rows.insert(0, "llmd serve")
        ax.barh(0, served["ready_s"], 0.5, color="#dddddd")
        marks = sorted((s, n.removesuffix("_s")) for n, s in served["seen"].items())
        for k, (s, name) in enumerate([*marks, (served["ready_s"], "first token")]):
            ax.plot([s, s], [-0.25, 0.25], color="#333333", linewidth=1)
            ax.annotate(f"{name} {s:.0f} s", (s, -0.25), (0, -9 - 9 * (k % 3)), textcoords="offset points",
                        fontsize=7, ha="right" if s > served["ready_s"] * 0.8 else "center")  # fmt: skip
        ax.set_ylim(-0.95, 1.9)
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("seconds")
    ax.legend(ncols=4, loc="upper right", fontsize=7.5)


def receipts_cost(figure: Figure, f: Figures) -> None:
    """Pairs of runs, and the client's check."""
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    pairs = [str(i + 1) for i in range(len(f["with_receipts_tokens_per_s"]))]
    left.plot(pairs, f["without_receipts_tokens_per_s"], "s", color=GREY, label="without")
    left.plot(pairs, f["with_receipts_tokens_per_s"], "o", color=BLUE, label="with receipts")
    left.set_ylim(0, 1.35 * max(f["without_receipts_tokens_per_s"] + f["with_receipts_tokens_per_s"]))
    left.set_xlabel("pair of runs")
    left.set_ylabel("answer tokens/s")
    spread, share = f"{f['ratio_lowest']:.3f} to {f['ratio_highest']:.3f}", f["witness_share_of_cpu_percent"]
    left.set_title(f"With / without: {f['ratio_median']:.3f} ({spread})\nwitnesses: {share} % of processor time")
    left.legend(ncols=2, loc="upper left")
    checks = sorted((int(name.split("_")[0]), times["p50"]) for name, times in f["check_ms"].items())
    bars(right, [f"{rows} rows" for rows, _ in checks], [ms for _, ms in checks], "ms, median")
    right.set_title("The client's check")


def prefill(figure: Figure, f: Figures) -> None:
    """Prompt tokens a second by length."""
    ax = figure.subplots()
    readers = sorted(f["prompt_tokens_per_s"].items(), key=lambda item: (len(item[0]), item[0]))
    for (name, by_length), marker in zip(readers, "os^Dv<>", strict=False):
        by_length = dict(sorted(by_length.items(), key=lambda item: int(item[0])))
        style = {"color": GREY, "linestyle": "--"} if name == "transformers" else {}
        label = name if name == "transformers" else f"ours, {name} tokens"
        ax.plot(list(by_length), list(by_length.values()), marker=marker, label=label, **style)  # type: ignore[arg-type]
    ax.set_ylim(bottom=0)
    ax.set_xlabel("prompt length, tokens")
    ax.set_ylabel("prompt tokens/s")
    ax.legend()


def prefix_cache(figure: Figure, f: Figures) -> None:
    """With and without anything to find, for each load."""
    loads = [name for name in ("shared_system_prompt", "multi_turn") if name in f]
    for ax, name in zip(figure.subplots(1, len(loads), squeeze=False)[0], loads, strict=True):
        for k, (way, colour) in enumerate((("missed", GREY), ("reused", BLUE))):
            waits = f[name][way]["ttft_ms"]
            places = [i + 0.36 * (k - 0.5) for i in range(len(waits))]
            label = f"{way}: {f[name][way]['answer_tokens_per_s']} tokens/s"
            ax.bar(places, [ms / 1e3 for ms in waits.values()], 0.34, color=colour, label=label)
            ax.set_xticks(range(len(waits)), list(waits))
        ax.set_title(name.replace("_", " "))
        ax.set_ylabel("time to first token, s")
        ax.margins(y=0.3)
        ax.legend(loc="upper left")


def gpu_serving(figure: Figure, f: Figures) -> None:
    """Decode steps by batch, and what must be read for them at the memory's nominal speed; else as plain."""
    batches = sorted(int(name.split("_")[1]) for name in f if name.startswith("decode_") and name.endswith("_ms"))
    if not batches:
        plain(figure, f)
        return
    ax = figure.subplots()
    steps = [f[f"decode_{batch}_ms"] for batch in batches]
    floors = [ms / f.get(f"decode_{batch}_of_floor", 1.0) for ms, batch in zip(steps, batches, strict=True)]
    places = range(len(batches))
    drawn = ax.bar([i - 0.18 for i in places], steps, 0.34, color=BLUE, label="a step, receipts on")
    ax.bar_label(drawn, [f"{ms:.2f}" for ms in steps], padding=2, fontsize=7.5)
    ax.bar([i + 0.18 for i in places], floors, 0.34, color=GREY, label="reading weights, keys and values alone")
    ax.set_xticks(places, [str(batch) for batch in batches])
    ax.set_xlabel(f"{f['model']}, {f['layers']} layers, {f.get('stages', 1)} stage(s): requests at once")
    ax.set_ylabel("milliseconds a token")
    ax.margins(y=0.2)
    ax.legend(loc="upper left")


def speculate(figure: Figure, f: Figures) -> None:
    """The rate with and without guesses, for each prompt."""
    prompts = [name for name, of in f.items() if isinstance(of, Mapping) and "ratio" in of]
    for ax, name in zip(figure.subplots(1, len(prompts), squeeze=False)[0], prompts, strict=True):
        rates = [sorted(f[name][f"{way}_tokens_per_s"]) for way in ("without", "with")]
        middle = [(r[(len(r) - 1) // 2] + r[len(r) // 2]) / 2 for r in rates]
        bars(ax, ["no guesses", f"up to {f['guesses_at_most']}"], middle, "answer tokens/s", (GREY, BLUE))
        right = f[name]["right_percent"]
        said = "none made" if right is None else f"{f[name]['guesses']} made, {right} % right"
        ax.set_title(f"{name.replace('_', ' ')}: {f[name]['ratio']} times ({said})", fontsize=9)


def churn(figure: Figure, f: Figures) -> None:
    """Goodput against the rate of deaths, and how long streams stood still."""
    left, right = figure.subplots(1, 2)
    runs = sorted(f["runs"], key=lambda run: 60 / run["every_s"] if run["every_s"] else 0)
    rates = [60 / run["every_s"] if run["every_s"] else 0 for run in runs]
    left.plot(rates, [run["goodput_tokens_per_s"] for run in runs], "o-", color=BLUE)
    for rate, run in zip(rates, runs, strict=True):
        said = f"{run['right_percent']:g} %\nright"
        left.annotate(said, (rate, run["goodput_tokens_per_s"]), (4, 5), textcoords="offset points", fontsize=7)
    left.set_ylim(0, 1.25 * max(1.0, *(run["goodput_tokens_per_s"] for run in runs)))
    for ax in (left, right):
        ax.set_xlim(-0.1 * max(1.0, *rates), 1.3 * max(1.0, *rates))
        ax.set_xlabel("deaths a minute")
    left.set_ylabel("tokens/s of right answers")
    left.set_title(f"{f['clients']} streams, {f['stages']} stages, {f['signal']}")
    for key, label, colour, marker in (
        ("stall_s", "streams that went on stood still", BLUE, "o"),
        ("ready_s", "not ready, where it said so", VERMILION, "^"),
    ):
        seen = [(rate, run[key]) for rate, run in zip(rates, runs, strict=True) if run[key]]
        if seen:
            right.plot([r for r, _ in seen], [p["p50"] for _, p in seen], marker, color=colour, label=label)
            right.vlines([r for r, _ in seen], [p["p50"] for _, p in seen], [p["p99"] for _, p in seen], color=colour)
    longest = [run[key]["p99"] for run in runs for key in ("stall_s", "ready_s") if run[key]]
    right.set_ylim(0, 1.4 * max([1.0, *longest]))
    right.set_ylabel("s, median and up to p99")
    right.set_title("How long")
    if right.get_legend_handles_labels()[0]:
        right.legend(loc="upper left", fontsize=7)


def plain(figure: Figure, f: Figures) -> None:
    """Of a benchmark without a drawing of its own: its numbers as bars, by unit, of the commonest two units."""
    by_unit: dict[str, list[tuple[str, float]]] = {}
    for name, value in _flat(f):
        stem, _, unit = name.rpartition("_")
        if stem.endswith("_per"):
            by_unit.setdefault(f"1/{unit}", []).append((stem.removesuffix("_per"), value))
        elif unit in UNITS:
            by_unit.setdefault(unit, []).append((stem, value))
        else:
            by_unit.setdefault("", []).append((name, value))
    units = sorted(by_unit, key=lambda unit: -len(by_unit[unit]))[:2]
    if not units:
        raise ValueError("it holds no numbers")
    for ax, unit in zip(figure.subplots(1, len(units), squeeze=False)[0], units, strict=True):
        items = by_unit[unit][:MAX_BARS][::-1]
        drawn = ax.barh([name.replace("_", " ")[-34:] for name, _ in items], [v for _, v in items], color=BLUE)
        ax.bar_label(drawn, [f"{v:.4g}" for _, v in items], padding=2, fontsize=7.5)
        ax.tick_params(axis="y", labelsize=7)
        ax.grid(axis="x")
        ax.grid(visible=False, axis="y")
        ax.margins(x=0.18)
        ax.set_xlabel(unit)


def _flat(value: Any, name: str = "") -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        return [item for key, inner in value.items() for item in _flat(inner, f"{name} {key}".strip())]
    return [(name, float(value))] if isinstance(value, int | float) and not isinstance(value, bool) else []


def audit_detection(figure: Figure, f: Figures) -> None:
    """Share of requests past the limit by tokens, and how large errors are beside the limit."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = list(f["cases"])
    for i, name in enumerate(names):
        shares = f["cases"][name]["share_and_interval"]
        honest = name.startswith("honest")
        colour = GREY if honest else PALETTE[i % len(PALETTE)]
        style = {"linestyle": "--" if honest or i > len(PALETTE) else "-", "marker": "osD^v<>ph*X"[i % 11]}
        tokens = sorted(shares, key=int)
        left.plot(tokens, [shares[n][0] for n in tokens], color=colour, label=name, **style)
    left.set_xlabel("tokens of one request")
    left.set_ylabel("share past the limit")
    left.legend(fontsize=5.5, loc="center left", bbox_to_anchor=(0.4, 0.3))
    stages = sorted(key for key in f["cases"][names[0]] if key.startswith("stage_"))
    for stage, colour in zip(stages, PALETTE, strict=False):
        medians = [f["cases"][name][stage]["median_error"] for name in names]
        right.plot(medians, range(len(names)), "o", color=colour, label=stage.replace("_", " "))
        limits = f[f"limits_{stage}"]
        right.axvline(limits[max(limits, key=int)], color=colour, linestyle=":", linewidth=1)
    right.set_xscale("log")
    right.set_yticks(range(len(names)), [name.removeprefix("honest: ") for name in names], fontsize=6)
    right.set_title("Median error; dotted: limit", fontsize=8)
    right.legend(fontsize=6)


DRAWINGS: Mapping[str, tuple[str, Callable[[Figure, Figures], None]]] = {
    "audit_detection": ("Which cheats does an audit see?", audit_detection),
    "concurrency": ("Streams side by side, against one after another", concurrency),
    "parity": ("Does the pipeline say what transformers says?", parity),
    "stage_isolation": ("Does a stage hold only its own layers?", stage_isolation),
    "gpu_application": ("The whole application on one GPU", gpu_application),
    "gpu_serving": ("How long a decode step takes a GPU", gpu_serving),
    "serving": ("Serving under load, through HTTP, receipts on", serving),
    "soak": ("Still serving after everything that clients do", soak),
    "churn": ("What clients see while parts die", churn),
    "cold_start": ("From shards on disk to the first token", cold_start),
    "receipts_cost": ("What receipts cost", receipts_cost),
    "prefill": ("How fast a prompt is read", prefill),
    "prefix_cache": ("What a cache of prefixes saves", prefix_cache),
    "speculate": ("What guessed tokens gain", speculate),
}
