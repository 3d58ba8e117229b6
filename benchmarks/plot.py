"""A picture of each benchmark's newest result, all in one layout.

    python -m benchmarks.plot [NAME...]        writes benchmarks/results/plots/NAME.png

What a picture shows is said in drawings.py; here is what all share: size, colours that colour-blind eyes tell apart
(Okabe and Ito, 2008), a title that is the question, and below it where, when and by what it was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.drawings import DRAWINGS, PALETTE, plain
from benchmarks.report import RESULTS, Result

PLOTS = RESULTS / "plots"
STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks; default: all that have results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of NAME.jsonl")
    parser.add_argument("--out", type=Path, default=None, help="folder for the pictures; default: RESULTS/plots")
    a = parser.parse_args()
    for name in a.names or sorted(path.stem for path in a.results.glob("*.jsonl")):
        try:
            print(picture(newest(a.results / f"{name}.jsonl"), a.out or a.results / "plots"))
        except (OSError, ValueError, KeyError, TypeError) as e:
            print(f"{name}: its newest result cannot be drawn: {type(e).__name__}: {e}", file=sys.stderr)
            return 1
    return 0


def newest(path: Path) -> Result:
    """The last line of a result file. Raises OSError, ValueError."""
    lines = path.read_text().splitlines()
    if not lines:
        raise ValueError(f"{path} is empty")
    return Result(**json.loads(lines[-1]))


def picture(result: Result, folder: Path) -> Path:
    """The picture of one result, as a PNG in `folder`. Raises KeyError or TypeError for figures of another form."""
    title, draw = DRAWINGS.get(result.benchmark, (result.benchmark.replace("_", " ").capitalize(), plain))
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(7.2, 3.5), layout="constrained")
        try:
            draw(figure, result.figures)
            figure.suptitle(title, x=0.012, ha="left", fontsize=10.5, fontweight="bold")
            figure.supxlabel("\n".join(caption(result)), x=0.012, ha="left", fontsize=6.5, color="#666666")
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{result.benchmark}.png"
            figure.savefig(path, dpi=130, metadata={"Software": None})
        finally:
            plt.close(figure)
    return path


def caption(result: Result) -> list[str]:
    """Where, when and by what."""
    model = f"{result.figures['model']}, " if isinstance(result.figures.get("model"), str) else ""
    where = f"{model}{result.machine}, commit {result.commit}, {result.at[:10]}"
    return [where, textwrap.shorten(result.command, 150, placeholder=" …")]


if __name__ == "__main__":
    sys.exit(main())
