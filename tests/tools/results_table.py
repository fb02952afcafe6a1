"""Make the tables of the results from run folders, so that no number is typed.

    python tests/tools/results_table.py runs/*                      # prints them
    python tests/tools/results_table.py runs/* --readme README.md   # and puts them between its marks

A folder counts by the summary.json or results.json that it holds; anything else, and a run that is
not finished, is passed over. In the file, `<!-- table: NAME -->` and `<!-- end -->` enclose a table.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
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
D4RL = {
    "Hopper": (-20.272305, 3234.3),
    "HalfCheetah": (-280.178953, 12135.0),
    "Walker2d": (1.629008, 4592.3),
}
# The released code (compute_normalized_score.py) normalizes by the mean returns of D4RL's random-v2
# and expert-v2 data, not by D4RL's constants. It prints them in its notebook, for Hopper only.
PAPER_HOPPER = (18.398905, 3511.3577)


@dataclass
class Args:
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders of any of the scripts"""
    readme: Path | None = None
    """file whose <!-- table: NAME --> marks are filled"""


def normalized(env_name, episode_return):
    """D4RL's score of a return; nan where the returns of random policy and expert are not known."""
    random, expert = D4RL.get(env_name, (math.nan, math.nan))
    return 100 * (episode_return - random) / (expert - random)


def on_d4rl_scale(score):
    """The paper's Hopper score as D4RL's constants would have it."""
    low, high = PAPER_HOPPER
    return normalized("Hopper", low + score / 100 * (high - low))


def expected_best(scores, n):
    """Expected best of `n` evaluations drawn from these (Expected Online Performance, ICML 2022).

    The probability that the best is the i-th smallest of N is (i / N)^n - ((i - 1) / N)^n.
    """
    ranks = np.arange(len(scores) + 1) / len(scores)
    return float(np.sort(scores) @ np.diff(ranks**n))


def markdown(rows):
    """Rows [list of dicts with the same keys] as a markdown table, in their order."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    for row in rows:
        lines.append("| " + " | ".join(map(str, row.values())) + " |")
    return "\n".join(lines)


def spread(values, form):
    """Mean ± standard deviation of the seeds; one value stands alone.

    The deviation is over n, as in the paper.
    """
    text = format(np.mean(values), form)
    return text + (f" ± {np.std(values):{form}}" if len(values) > 1 else "")


def over_seeds(rows, keys, formats):
    """One row per combination of `keys`: seeds, and mean ± deviation of `formats` over them."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    table = []
    for values, group in sorted(groups.items()):
        seeds = [row["seed"] for row in group]
        if len(set(seeds)) < len(seeds):
            which = ", ".join(map(str, values))
            raise SystemExit(f"There are two runs of {which} with the same seed; give one of them.")
        line = {**dict(zip(keys, values)), "seeds": ", ".join(map(str, sorted(seeds)))}
        for name, form in formats.items():
            line[name] = spread([row[name] for row in group], form)
        table.append(line)
    return table


def read(folders, name):
    """The JSON file `name` of each folder that has one: {folder: content}."""
    files = [folder / name for folder in folders if (folder / name).is_file()]
    return {file.parent: json.loads(file.read_text()) for file in files}


def finished_runs(folders):
    """(arguments, records) of each run that has come to its end."""
    runs = []
    for summary in read(folders, "summary.json").values():
        if summary["epochs"][-1]["epoch"] >= summary["args"]["num_epochs"]:
            runs.append((summary["args"], summary["epochs"]))
    return runs


def backbone_name(args):
    """With what differs from the defaults."""
    name = Path(args["backbone"]).name
    if args["head_std"] is not None:
        name += f", head {args['head_std']:g}"
    if args["max_grad_norm"] == 0:
        name += ", not clipped"
    return name


def score_tables(folders):
    """Tables 1 and 2, with nn.Linear's head and with a smaller one: two tables."""
    rows = []
    for args, records in finished_runs(folders):
        scores = [record["normalized_score"] for record in records[1:]]
        rows.append(
            {
                "environment": args["env"],
                "K": args["context_length"],
                "starting point": backbone_name(args),
                "steps": records[-1]["step"],
                "seed": args["seed"],
                "last loss": records[-1]["loss"],
                "saturated in epoch 1": records[1]["saturated_fraction"],
                "score of one evaluation": expected_best(scores, 1),
                "best of 5": expected_best(scores, 5),
                "best of 40": expected_best(scores, 40),
                "last score": scores[-1],
            }
        )
    keys = ("environment", "K", "starting point", "steps")
    formats = {
        "last loss": ".3f",
        "saturated in epoch 1": ".0%",
        "score of one evaluation": ".1f",
        "best of 5": ".1f",
        "best of 40": ".1f",
        "last score": ".1f",
    }
    table = over_seeds(rows, keys, formats)
    default, small_head = [], []
    for row in table:
        if "head" in row["starting point"]:
            small_head.append(row)
            continue
        env_name = row["environment"].rsplit("-v", 1)[0]
        paper = PAPER.get((env_name, row["K"]), {}).get(row["starting point"])
        row["paper, best of 40"] = "-" if paper is None else paper
        on_our_scale = paper is not None and env_name == "Hopper"
        row["on D4RL's scale"] = f"{on_d4rl_scale(paper):.1f}" if on_our_scale else "-"
        default.append(row)
    return default, small_head


LOOKS = {
    "on_returns": "weight on returns",
    "on_states": "on states",
    "on_actions": "on actions",
    "entropy": "entropy, nats",
    "own_token": "on the own token",
}


def attention_tables(folders):
    """Section 5.6.2: median gap per block, and what the heads look at, means over all of them."""
    gaps, looks = [], []
    seen = set()  # a run may be part of several studies
    for study in read(folders, "results.json").values():
        if "attention" not in study:
            continue
        lengths = {run["run"]: run["K"] for run in study["runs"]}
        last = {}
        for row in study["attention"]:
            last[row["run"]] = max(row["epoch"], last.get(row["run"], 0))
        for row in study["attention"]:
            key = {
                "starting point": row["label"],
                "K": lengths[row["label"]],
                "epoch": row["epoch"],
                "block": row["block"],
                "seed": row["seed"],
            }
            measurement = (row["run"], row["epoch"], row["block"])
            if row["label"].startswith("block") or measurement in seen:
                continue
            seen.add(measurement)
            if row["epoch"] == last[row["run"]]:
                gaps.append({**key, "gap": row["median_gap"]})
            look = {**key, "most of a head": np.nanmax(row["own_token"])}
            for name, title in LOOKS.items():
                look[title] = np.nanmean(row[name])
            looks.append(look)
    table = {}
    for row in over_seeds(gaps, ("starting point", "K", "epoch", "block"), {"gap": ".2f"}):
        key = (row["starting point"], row["K"], row["epoch"])
        line = {"starting point": key[0], "K": key[1], "epoch": key[2], "seeds": row["seeds"]}
        table.setdefault(key, line)[f"block {row['block']}"] = row["gap"]
    keys = ("starting point", "K", "epoch", "seed")
    of_models = {}
    for look in looks:
        of_models.setdefault(tuple(look[key] for key in keys), []).append(look)
    rows = []
    for values, blocks in of_models.items():
        row = dict(zip(keys, values))
        for title in LOOKS.values():
            row[title] = np.mean([block[title] for block in blocks])
        row["most of a head"] = max(block["most of a head"] for block in blocks)
        rows.append(row)
    formats = dict.fromkeys([*LOOKS.values(), "most of a head"], ".2f")
    return list(table.values()), over_seeds(rows, keys[:-1], formats)


def block_table(folders):
    """Section 5.6.1: the random model with one block replaced."""
    rows = []
    for study in read(folders, "results.json").values():
        if "attention" in study and any(r["run"].startswith("block ") for r in study["runs"]):
            rows += study["runs"]
    formats = {"last_loss": ".3f", "best_score": ".1f", "last_score": ".1f"}
    return over_seeds(rows, ("run",), formats)


def read_gradients(folders):
    """The results of all analyses of gradients."""
    results = []
    for study in read(folders, "results.json").values():
        if isinstance(study, list):
            results.append(study)
    return results


def gradient_table(folders):
    """Sections 5.3 and 5.4."""
    rows = []
    for study in read_gradients(folders):
        for result in study:
            args = result["args"]
            shares = {name: values["share"] for name, values in result["sets"].items()}
            first = [share for name, share in shares.items() if name.startswith("0.ln_1.")]
            norms = [share for name, share in shares.items() if ".ln_" in name]
            rows.append(
                {
                    "starting point": backbone_name(args),
                    "clipped at": args["max_grad_norm"] or "-",
                    "epoch": result["epoch"],
                    "gradient norm, median": f"{result['median_norm']:.2f}",
                    "windows clipped": f"{result['clipped_windows']:.0%}",
                    "lowest cosine": f"{result['confusion']:.2f}",
                    "share of first LayerNorm": f"{sum(first):.1%}",
                    "of all LayerNorms": f"{sum(norms):.1%}",
                    "distance moved": f"{result['distance']:.1f}",
                    "relative": f"{result['relative_distance']:.2f}",
                    "cosine": f"{result['cosine']:.3f}",
                }
            )
    rows.sort(key=lambda row: (row["starting point"], str(row["clipped at"]), row["epoch"]))
    unique = []
    for row in rows:
        if row not in unique:  # a run may be part of several studies
            unique.append(row)
    return unique


def clipping_table(folders):
    """App. G.3: runs that differ by their clipping threshold."""
    finished = finished_runs(folders)
    unclipped = {args["backbone"] for args, _ in finished if args["max_grad_norm"] == 0}
    rows = []
    for args, records in finished:
        comparable = args["context_length"] == 20 and args["head_std"] is None
        if args["backbone"] in unclipped and comparable:
            rows.append(
                {
                    "starting point": Path(args["backbone"]).name,
                    "clipped at": args["max_grad_norm"] or "-",
                    "environment": args["env"],
                    "seed": args["seed"],
                    "loss per epoch": " → ".join(f"{r['loss']:.3f}" for r in records[1:]),
                    "score per epoch": " → ".join(
                        f"{r['normalized_score']:.1f}" for r in records[1:]
                    ),
                }
            )
    return sorted(rows, key=lambda row: (row["starting point"], row["seed"], row["environment"]))


def similarity_table(folders):
    """Section 5.1: CKA before and after fine-tuning."""
    rows = []
    for study in read(folders, "results.json").values():
        if "cka" not in study:
            continue
        for row in study["cka"]:
            norms = [value for name, value in row["layers"].items() if ".ln_" in name]
            others = [value for name, value in row["layers"].items() if ".ln_" not in name]
            rows.append(
                {
                    "run": Path(row["run"]).name,
                    "token": row["token"],
                    "all layers": f"{row['mean_cka']:.2f}",
                    "LayerNorms": f"{np.nanmean(norms):.2f}",
                    "other layers": f"{np.nanmean(others):.2f}",
                }
            )
    return rows


def information_table(folders):
    """Section 5.2, App. E and H.2: held out / read off the training windows."""
    rows = []
    for study in read(folders, "results.json").values():
        if "mutual_information" not in study:
            continue
        args = study["args"]
        settings = f"{args['mine_windows']:,} windows"
        if args["mine_paper_settings"]:
            settings = "the paper's"
        groups = {}
        for row in study["mutual_information"]:
            key = (settings, row["of"], row["analysis"], Path(row["run"]).name)
            groups.setdefault(key, {True: [], False: []})[row["control"]].append(row)
        for (settings, of, analysis, run), group in groups.items():
            rows.append(
                {
                    "settings": settings,
                    "information": of,
                    "of": analysis,
                    "run": run,
                    "nats": both_estimates(group[False]),
                    "data shuffled": both_estimates(group[True]),
                }
            )
    return rows


def both_estimates(rows):
    """Held-out and training estimate as text, means over blocks, tokens and steps."""
    held_out = np.nanmean([row["held_out"] for row in rows])
    training = np.nanmean([row["training"] for row in rows])
    return f"{held_out:.2f} / {training:.2f}"


def main(args):
    scores, small_head = score_tables(args.folders)
    gaps, looks = attention_tables(args.folders)
    tables = {
        "scores": scores,
        "head": small_head,
        "attention": gaps,
        "heads": looks,
        "blocks": block_table(args.folders),
        "gradients": gradient_table(args.folders),
        "clipping": clipping_table(args.folders),
        "similarity": similarity_table(args.folders),
        "information": information_table(args.folders),
    }
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
