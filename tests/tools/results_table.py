"""Tables of runs and of analyses from their CSVs, and a figure of runs side by side.

    python tests/tools/results_table.py runs/*                      # mean ± deviation over seeds
    python tests/tools/results_table.py runs/* --readme README.md   # and put between its marks
    python tests/tools/results_table.py runs/ONE runs/ANOTHER --figure runs.png --title "..."

A folder counts for what is in it: log.csv makes it a run (at least one is needed), attention.csv,
windows.csv, cka.csv or information.csv an analysis. In the file that --readme names,
`<!-- table: NAME -->` and `<!-- end -->` enclose a table: scores, losses, attention, gradients, cka,
information.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import seaborn as sns
import tyro

# Normalized return of the best of 40 epochs, medium data, mean over seeds 666 and 42: Table 1 of the
# paper (K = 20) and Table 4 of its appendix J (K = 1). Table 2 of its main text is seed 666 alone.
# What it calls iGPT is an ImageGPT in GPT-2's blocks, igpt-as-gpt2 here; there is none with K = 1.
PAPER = {
    ("Hopper", 20): {"gpt2": 79.5, "igpt-as-gpt2": 2.6, "random": 67.7},
    ("HalfCheetah", 20): {"gpt2": 48.4, "igpt-as-gpt2": 1.3, "random": 48.6},
    ("Walker2d", 20): {"gpt2": 71.2, "igpt-as-gpt2": 4.3, "random": 71.0},
    ("Hopper", 1): {"gpt2": 81.3, "random": -0.3},
    ("HalfCheetah", 1): {"gpt2": 47.9, "random": 49.2},
    ("Walker2d", 1): {"gpt2": 71.2, "random": 35.6},
}
# The returns of a score of 0 and of 100 on Hopper. The released code (compute_normalized_score.py)
# takes the mean returns of D4RL's random-v2 and expert-v2 data, which its notebook prints for
# Hopper only: on HalfCheetah and Walker2d the paper's scale is not known.
D4RL_HOPPER = (-20.272305, 3234.3)
PAPER_HOPPER = (18.398905, 3511.3577)

SETTINGS = ["env", "K", "backbone", "dataset", "head_std", "max_grad_norm"]  # and the seed
FORMATS = {
    "loss": "{:.3f}",
    "saturated in epoch 1": "{:.0%}",
    "one evaluation": "{:.1f}",
    "best of 5": "{:.1f}",
    "best of 40": "{:.1f}",
    "best": "{:.1f}",
    "last": "{:.1f}",
}
PANELS = {
    "score": "score, 95 % interval",
    "loss": "mean squared action error",
    "saturated_fraction": "share of |action| > 0.99",
    "grad_norm": "gradient norm before clipping",
    "clipped_fraction": "share of clipped steps",
}


@dataclass
class Args:
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of runs"""
    paper_scale: bool = False
    """Hopper's scores between the returns that the paper takes, instead of D4RL's"""
    readme: Path | None = None
    """file to put the tables in, between their marks"""
    figure: Path | None = None
    """PNG of the runs over their training steps"""
    title: str = ""
    """of the figure"""


def read_logs(folders, paper_scale=False):
    """The log.csv of all runs, one below the other."""
    logs = []
    for folder in folders:
        if (folder / "log.csv").exists():
            log = pd.read_csv(folder / "log.csv")
            logs.append(log.assign(run=str(folder).split("runs/")[-1]))
    log = pd.concat(logs, ignore_index=True)
    log["backbone"] = log.backbone.str.replace(r"\S*/", "", regex=True)  # of folders and hub ids
    if paper_scale:
        low, high = PAPER_HOPPER
        hopper = log.env.str.startswith("Hopper-")
        log.loc[hopper, "score"] = 100 * (log["return"] - low) / (high - low)
    return log


def expected_best(scores, n):
    """Expected best of `n` evaluations drawn from these (Expected Online Performance, ICML 2022).

    The probability that the best is the i-th smallest of N is (i / N)^n - ((i - 1) / N)^n.
    """
    ranks = np.arange(len(scores) + 1) / len(scores)
    return float(np.sort(scores) @ np.diff(ranks**n))


def summarize(log):
    """What the table says of one run. The model before training, epoch 0, does not count."""
    epochs = log[log.epoch > 0].groupby("epoch")[["loss", "saturated_fraction", "score"]].mean()
    return pd.Series(
        {
            "steps": log.step.max(),
            "loss": epochs.loss.iloc[-1],
            "saturated in epoch 1": epochs.saturated_fraction.iloc[0],
            "one evaluation": expected_best(epochs.score, 1),
            "best of 5": expected_best(epochs.score, 5),
            "best of 40": expected_best(epochs.score, 40),
            "best": epochs.score.max(),
            "last": epochs.score.iloc[-1],
        }
    )


def of_paper(row, paper_scale):
    """The best of 40 epochs in the paper, for one row of the table."""
    env_name = row.env.split("-v")[0]
    score = PAPER.get((env_name, row.K), {}).get(row.backbone)
    if score is None:
        return "-"
    if env_name == "Hopper" and not paper_scale:
        low, high = PAPER_HOPPER
        episode_return = low + score / 100 * (high - low)
        low, high = D4RL_HOPPER
        score = 100 * (episode_return - low) / (high - low)
    return f"{score:.1f}"


def score_table(log, paper_scale=False):
    """Mean ± standard deviation over the seeds, divided by n as in the paper; all cells are text."""
    runs = log.groupby([*SETTINGS, "seed", "run"], dropna=False).apply(summarize).reset_index()
    # Settings that are the same for all are left out.
    differ = [name for name in SETTINGS[3:] if runs[name].nunique(dropna=False) > 1]
    keys = [*SETTINGS[:3], *differ, "steps"]
    rows = []
    for _, group in runs.groupby(keys, dropna=False):
        if group.seed.duplicated().any():
            raise SystemExit(f"Two runs of the same seed, leave out one: {', '.join(group.run)}")
        row = group[keys].iloc[0]
        row["seeds"] = ", ".join(map(str, sorted(group.seed)))
        for name, form in FORMATS.items():
            row[name] = form.format(group[name].mean())
            if len(group) > 1:
                row[name] += " ± " + form.format(group[name].std(ddof=0))
        row["paper, best of 40"] = of_paper(row, paper_scale)
        rows.append(row)
    return pd.DataFrame(rows).astype({"steps": int}).astype(object).fillna("-").astype(str)


def by_backbone(scores, value):
    """One column of the table of scores: a row for each setting, a column for each backbone."""
    table = scores.pivot(index=["env", "K", "head_std"], columns="backbone", values=value)
    return table.fillna("-").reset_index()


def page_tables(scores):
    """The best epochs, and the losses of the last ones (means only), of one head → of the other.

    On Hopper the paper's scores stand below; for other environments its scale is not known.
    """
    scores = scores.assign(head_std=scores.get("head_std", "-"))
    scores["loss"] = scores["loss"].str.split(" ± ").str[0]
    paper = scores.drop_duplicates(["env", "K", "backbone"]).assign(head_std="the paper")
    paper["best"] = paper["paper, best of 40"]
    paper = paper[paper.env.str.startswith("Hopper-")]
    losses = by_backbone(scores, "loss").drop(columns="head_std").groupby(["env", "K"])
    return {
        "scores": by_backbone(pd.concat([scores, paper]), "best"),
        "losses": losses.agg(" → ".join).reset_index(),
    }


# ==================================================================================================
# Analyses: a table for each, from the CSVs in its folder
# ==================================================================================================
def attention_table(folder):
    """Mean attention distance in tokens after the last epoch."""
    attention = pd.read_csv(folder / "attention.csv")
    last = attention[attention.epoch == attention.epoch.max()]
    distances = last.groupby(["label", "block"], sort=False).distance.mean()
    return distances.unstack().add_prefix("block ")


def gradient_table(folder):
    """What single windows' gradients are like, and how far the parameters have moved."""
    windows = pd.read_csv(folder / "windows.csv").groupby("label", sort=False)
    pairs = pd.read_csv(folder / "pairs.csv").groupby("label", sort=False)
    sets = pd.read_csv(folder / "sets.csv")
    # All weights start at something else than zero; of the biases only those of trained models.
    weights = sets[sets["set"].str.endswith("weight")].groupby("label", sort=False)
    return pd.DataFrame(
        {
            "gradient norm, median": windows["norm"].median(),
            "lowest cosine": pairs["cosine"].min(),
            "relative distance of weights, median": weights["relative_distance"].median(),
        }
    )


def cka_table(folder):
    """CKA before and after, mean over tokens and layers."""
    cka = pd.read_csv(folder / "cka.csv")
    return cka.groupby(["label", "kind"], sort=False).cka.mean().unstack()


def information_table(folder):
    """Mutual information in nats, from held-out windows, mean over all it was asked for."""
    information = pd.read_csv(folder / "information.csv")
    asked = information[~information.shuffled].groupby(["quantity", "label"], sort=False)
    return asked.held_out.mean().map("{:.2f}".format).unstack().fillna("")


ANALYSES = {  # by a file that only this analysis leaves in its folder
    "attention.csv": ("attention", attention_table),
    "windows.csv": ("gradients", gradient_table),
    "cka.csv": ("cka", cka_table),
    "information.csv": ("information", information_table),
}


def markdown(table):
    """A table of text, as it is written in a README."""
    floats = table.select_dtypes("float").columns
    table = table.assign(**{name: table[name].map("{:.2f}".format) for name in floats}).astype(str)
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot_runs(log, title):
    """Score, loss, saturation and gradients of runs over their training steps, a colour for each."""
    grid = sns.relplot(
        log.melt(["run", "step"], list(PANELS)).dropna(),
        x="step",
        y="value",
        hue="run",
        col="variable",
        kind="line",
        palette="colorblind",
        height=3.5,
        facet_kws={"sharey": False},
        seed=0,  # of the bootstrap over the episodes of an evaluation
    )
    for name, axes in grid.axes_dict.items():
        axes.set(title="", xlabel="training step", ylabel=PANELS[name])
    grid.tight_layout()
    sns.move_legend(grid, "upper center", bbox_to_anchor=(0.45, 0), ncols=4, title=None)
    grid.figure.suptitle(title, y=1.03)
    return grid.figure


def main(args):
    log = read_logs(args.folders, args.paper_scale)
    scores = score_table(log, args.paper_scale)
    print(markdown(scores))
    tables = page_tables(scores) if args.readme else {}
    for folder in args.folders:
        for file, (name, make_table) in ANALYSES.items():
            if (folder / file).exists():
                tables[name] = make_table(folder).rename_axis(columns=None).reset_index()
                print(f"\n{folder}: {name}\n{markdown(tables[name])}")
    if args.readme:
        text = args.readme.read_text()
        for name, table in tables.items():
            before, _, rest = text.partition(f"<!-- table: {name} -->\n")
            _, end, after = rest.partition("<!-- end -->")
            if end:
                text = f"{before}<!-- table: {name} -->\n{markdown(table)}\n{end}{after}"
        args.readme.write_text(text)
    if args.figure:
        plot_runs(log, args.title).savefig(args.figure, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
