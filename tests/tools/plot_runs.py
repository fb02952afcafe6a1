"""Draw runs side by side over their training steps.

    python tests/tools/plot_runs.py runs/ONE runs/ANOTHER --title "..." --output figure.png

Of several runs the first is grey, the others have colours; the legend is the folders' names.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from matplotlib.figure import Figure

COLORS = ("#555555", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7")  # Okabe and Ito
PANELS = {
    "normalized_score": "normalized score",
    "loss": "mean squared action error",
    "saturated_fraction": "share of |action| > 0.99",
    "grad_norm": "gradient norm before clipping",
    "clipped_fraction": "share of clipped steps",
}


@dataclass
class Args:
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders of any of the scripts"""
    title: str = ""
    """of the figure"""
    output: Path = Path("runs.png")
    """the PNG to write"""


def plot_runs(folders, title):
    figure = Figure(figsize=(18, 3.8), layout="constrained")
    figure.suptitle(title)
    colors = COLORS if len(folders) > 1 else COLORS[1:]
    for axes, (name, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        for folder, color in zip(folders, colors):
            summary = json.loads((folder / "summary.json").read_text())
            per_epoch = name == "normalized_score"
            lines = summary["epochs"] if per_epoch else summary["history"]
            steps = [line["step"] for line in lines]
            values = [line[name] for line in lines]
            style = "-o" if per_epoch else "-"
            axes.plot(steps, values, style, color=color, label=folder.name, markersize=4)
        axes.set(xlabel="training step", ylabel=label)
        if name != "normalized_score":
            axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return figure


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    plot_runs(args.folders, args.title).savefig(args.output, dpi=120)
    print(args.output)
