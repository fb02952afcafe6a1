"""Make the tables of the results from run folders, so that no number is typed.

    python tests/tools/results_table.py runs/*                      # prints them
    python tests/tools/results_table.py runs/* --readme README.md   # and puts them between its <!-- table --> marks

A folder counts by the summary.json or results.json that it holds; anything else in `runs`, and a run that is not
finished, is passed over.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

# The paper's Tables 1 and 2: normalized return of the best of 40 epochs, medium data.
PAPER = {
    ("Hopper", 20): {"gpt2": 79.5, "igpt": 2.6, "random": 67.7},
    ("HalfCheetah", 20): {"gpt2": 48.4, "igpt": 1.3, "random": 48.6},
    ("Walker2d", 20): {"gpt2": 71.2, "igpt": 4.3, "random": 71.0},
    ("Hopper", 1): {"gpt2": 81.3, "random": -0.3},
    ("HalfCheetah", 1): {"gpt2": 47.9, "random": 49.2},
    ("Walker2d", 1): {"gpt2": 71.2, "random": 35.6},
}
D4RL = {
    "Hopper": (-20.272305, 3234.3),
    "HalfCheetah": (-280.178953, 12135.0),
    "Walker2d": (1.629008, 4592.3),
}
# The released code (compute_normalized_score.py) normalizes by the mean returns of D4RL's random-v2 and expert-v2 data,
# not by D4RL's constants. It prints them for Hopper only, in compute_normalized_score.ipynb.
PAPER_HOPPER = (18.398905, 3511.3577)


def on_d4rl_scale(score):
    """The paper's Hopper score as D4RL's constants would have it."""
    return normalized("Hopper", PAPER_HOPPER[0] + score / 100 * (PAPER_HOPPER[1] - PAPER_HOPPER[0]))


def normalized(env_name, episode_return):
    """D4RL's score of a return; nan where the returns of a random policy and of an expert are not known."""
    random, expert = D4RL.get(env_name, (math.nan, math.nan))
    return 100 * (episode_return - random) / (expert - random)


@dataclass
class Args:
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders of any of the scripts"""
    readme: Path | None = None
    """file whose <!-- table: name --> marks are filled"""


def markdown(rows):
    """Rows [list of dicts with the same keys] as a markdown table, in their order."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])] if rows else []
    return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows])


def spread(values, form):
    """Mean ± standard deviation (over n - 1) of the seeds; one value stands alone."""
    text = format(np.mean(values), form)
    return text + (f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else "")


def over_seeds(rows, keys, formats):
    """One row for each combination of `keys`: seeds, and mean ± deviation of the columns of `formats` over them."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    table = []
    for values, group in sorted(groups.items()):
        seeds = [row["seed"] for row in group]
        if len(set(seeds)) < len(seeds):
            raise SystemExit(
                f"There are two runs of {', '.join(map(str, values))} with the same seed; give one of them."
            )
        line = dict(zip(keys, values), seeds=", ".join(map(str, sorted(seeds))))
        table.append(
            line
            | {name: spread([row[name] for row in group], form) for name, form in formats.items()}
        )
    return table


def read(folders, name):
    files = [folder / name for folder in folders if (folder / name).is_file()]
    return {file.parent: json.loads(file.read_text()) for file in files}


def score_table(folders):
    """Tables 1 and 2: one row per environment, K and backbone, with the mean of the seeds' intervals over episodes."""
    rows = []
    for summary in read(folders, "summary.json").values():
        args, records = summary["args"], summary["epochs"]
        if records[-1]["epoch"] < args["num_epochs"]:
            continue  # still at work, or interrupted
        scores = [record["normalized_score"] for record in records]
        row = {
            "environment": args["env"],
            "K": args["context_length"],
            "backbone": Path(args["backbone"]).name,
        }
        row |= {
            "steps": records[-1]["step"],
            "seed": args["seed"],
            "last loss": records[-1]["loss"],
        }
        interval = [records[-1]["return_low"], records[-1]["return_high"]]
        rows.append(
            row | {"best score": max(scores[1:]), "last score": scores[-1], "interval": interval}
        )
    keys = ("environment", "K", "backbone", "steps")
    table = over_seeds(rows, keys, {"last loss": ".3f", "best score": ".1f", "last score": ".1f"})
    for row in table:
        env_name = row["environment"].rsplit("-v", 1)[0]
        intervals = [
            other["interval"] for other in rows if all(other[key] == row[key] for key in keys)
        ]
        low, high = normalized(env_name, np.mean(intervals, axis=0))
        row["its 95 % interval over episodes"] = f"{low:.1f} to {high:.1f}"
        paper = PAPER.get((env_name, row["K"]), {}).get(row["backbone"])
        row["paper, best of 40, its scale"] = "-" if paper is None else paper
        row["D4RL's scale"] = (
            f"{on_d4rl_scale(paper):.1f}" if paper is not None and env_name == "Hopper" else "-"
        )
    return table


def no_context_results(folders):
    return [
        study for study in read(folders, "results.json").values() if "attention_distance" in study
    ]


def attention_table(folders):
    """Section 5.6.2: median gap per block of the K = 1 runs."""
    rows = []
    for folder, study in read(folders, "results.json").items():
        if "attention_distance" not in study:
            continue
        args = json.loads((folder / "args.json").read_text())
        last = max((row["epoch"] for row in study["attention_distance"]), default=0)
        for row in study["attention_distance"]:
            if row["epoch"] == last and not row["run"]:
                keys = dict(
                    environment=args["env"],
                    backbone=Path(args["backbone"]).name,
                    epoch=last,
                    seed=args["seed"],
                )
                rows.append(keys | dict(block=row["block"], gap=row["median_gap"]))
    table = {}
    for row in over_seeds(rows, ("environment", "backbone", "epoch", "block"), dict(gap=".2f")):
        key = (row["environment"], row["backbone"], row["epoch"])
        line = dict(environment=key[0], backbone=key[1], epoch=key[2], seeds=row["seeds"])
        table.setdefault(key, line)[f"gap of block {row['block']}, tokens"] = row["gap"]
    return list(table.values())


def block_table(folders):
    """Section 5.6.1: the random model with one block replaced."""
    rows = []
    for study in no_context_results(folders):
        if any(run["run"].startswith("block_") for run in study["runs"]):
            rows += study["runs"]
    return over_seeds(rows, ("run",), dict(last_loss=".3f", best_score=".1f", last_score=".1f"))


def gradient_tables(folders):
    """Sections 5.3 and 5.4, and App. G.3 where one study has several thresholds."""
    rows, clipping = [], []
    for study in read(folders, "results.json").values():
        if not isinstance(study, list):
            continue
        for r in study:
            key = dict(backbone=r["backbone"], clip=r["clip"], epoch=r["epoch"])
            norms = sum(values["share"] for name, values in r["sets"].items() if ".ln_" in name)
            first = sum(
                values["share"] for name, values in r["sets"].items() if name.startswith("0.ln_1.")
            )
            row = {
                "gradient norm, median": f"{r['median_norm']:.2f}",
                "confusion": f"{r['confusion']:.2f}",
            }
            row |= {"share of 0.ln_1": f"{first:.1%}", "of all LayerNorms": f"{norms:.1%}"}
            row |= {
                "l2 distance": f"{r['distance']:.1f}",
                "relative": f"{r['relative_distance']:.2f}",
            }
            rows.append(key | row | {"cosine": f"{r['cosine']:.3f}"})
            if len({result["clip"] for result in study}) > 1:
                records = r["records"][1:]
                losses = " → ".join(f"{record['loss']:.3f}" for record in records)
                scores = [record["normalized_score"] for record in records]
                best, last = f"{max(scores):.1f}", f"{scores[-1]:.1f}"
                clipping.append(
                    key | {"loss per epoch": losses, "best score": best, "last score": last}
                )
    return rows, clipping


def representation_tables(folders):
    """Sections 5.1 and 5.2, App. E and H.2: CKA, and information held out / read off the training windows."""
    similarity, information = [], []
    for folder, study in read(folders, "results.json").items():
        if "cka" not in study:
            continue
        args = json.loads((folder / "args.json").read_text())
        windows = (
            "the paper's settings"
            if args["mine_paper_settings"]
            else f"{args['mine_windows']:,} windows"
        )
        for row in study["cka"]:
            norms = [value for name, value in row["layers"].items() if ".ln_" in name]
            others = [value for name, value in row["layers"].items() if ".ln_" not in name]
            means = {
                "CKA": row["mean_cka"],
                "LayerNorms": np.nanmean(norms),
                "other layers": np.nanmean(others),
            }
            similarity.append(
                dict(run=row["run"], token=row["token"]) | {k: f"{v:.2f}" for k, v in means.items()}
            )
        groups = {}
        for a in study["mutual_information"]:
            key = (windows, a["quantity"], a["analysis"], a["run"])
            groups.setdefault(key, {True: [], False: []})[a["control"]].append(a)
        for key, answers in groups.items():
            row = dict(zip(("settings", "information", "analysis", "of"), key))
            both = {control: both_estimates(group) for control, group in answers.items()}
            information.append(row | {"nats": both[False], "data shuffled": both[True]})
    return similarity, information


def both_estimates(answers):
    """Held-out and training estimate as text, each the mean over blocks, tokens, steps and repeats."""
    return " / ".join(
        f"{np.nanmean([a[name] for a in answers]):.2f}" for name in ("held_out", "training")
    )


def main(args):
    tables = dict(scores=score_table(args.folders), attention=attention_table(args.folders))
    tables["blocks"] = block_table(args.folders)
    tables["gradients"], tables["clipping"] = gradient_tables(args.folders)
    tables["similarity"], tables["information"] = representation_tables(args.folders)
    text = args.readme.read_text() if args.readme else ""
    for name, rows in tables.items():
        if not rows:
            continue  # no run of this kind
        print(f"\n{name}\n{markdown(rows)}")
        mark = f"<!-- table: {name} -->"
        filled = f"{mark}\n{markdown(rows)}\n<!-- end -->".replace("\\", "\\\\")
        text = re.sub(rf"{mark}\n.*?\n?<!-- end -->", filled, text, flags=re.DOTALL)
    if args.readme:
        args.readme.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
