"""Make the tables of the README's results from run folders, so that no number is typed.

    python tests/results_table.py runs/*                      # prints them
    python tests/results_table.py runs/* --readme README.md   # and puts them between its <!-- table --> marks

A folder counts by the summary.json or results.json that it holds; anything else in `runs` is passed over.
"""

import json
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
BACKBONES = ("gpt2", "igpt", "igpt-as-gpt2", "random", "random-gpt2")


@dataclass
class Args:
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders of any of the scripts"""
    readme: Path | None = None
    """file whose <!-- table: name --> marks are filled"""


def markdown(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def spread(values, form=".1f"):
    """Mean ± standard deviation (over n - 1) of the seeds; one value stands alone."""
    values = [value for value in values if value is not None]
    text = format(np.mean(values), form) if values else "-"
    return text + (f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else "")


def read(folders, name):
    files = [folder / name for folder in folders if (folder / name).is_file()]
    return {file.parent: json.loads(file.read_text()) for file in files}


def score_table(folders):
    """Table 1 and 2: one row per environment, K and backbone, over seeds."""
    groups = {}
    for folder, summary in read(folders, "summary.json").items():
        args = json.loads((folder / "args.json").read_text())
        if not args.get("member"):
            groups.setdefault((summary["env"], summary["context_length"], summary["backbone"]), []).append(summary)
    order = lambda key: (key[0], -key[1], BACKBONES.index(key[2]) if key[2] in BACKBONES else 9, key[2])  # noqa: E731
    rows = []
    for env, K, backbone in sorted(groups, key=order):
        runs = groups[env, K, backbone]
        if len({run["steps"] for run in runs}) > 1:
            raise SystemExit(f"error: the runs of {backbone} on {env} with K = {K} differ in length; give those of one length.")
        if len({run["seed"] for run in runs}) < len(runs):
            raise SystemExit(
                f"error: there are two runs of {backbone} on {env} with K = {K} and the same seed; give one of them."
            )
        paper = PAPER.get((env.rsplit("-v", 1)[0], K), {}).get(backbone)
        rows.append(
            (
                env, str(K), f"`{backbone}`", ", ".join(str(run["seed"]) for run in runs), f"{runs[0]['steps']:,}",
                spread([run["epochs"][-1]["loss"] for run in runs], ".3f"),
                spread([run["best_normalized_score"] for run in runs]), spread([run["final_normalized_score"] for run in runs]),
                "-" if paper is None else f"{paper:.1f}",
            )
        )  # fmt: skip
    columns = ("environment", "K", "backbone", "seeds", "steps", "last loss", "best score", "last score", "paper, best of 40")
    return markdown(columns, rows)


def attention_table(folders):
    """Section 5.6.2: median gap per block of the K = 1 runs, mean over seeds."""
    groups = {}
    for results in read(folders, "results.json").values():
        measured = isinstance(results, dict) and results.get("attention_distance", {}).get("attention")
        if measured:
            (first, _), (last, gaps) = list(measured["gap"].items())[:: len(measured["gap"]) - 1]
            run = results["runs"][0]
            seeds = groups.setdefault((run["env"], run["name"], f"{first} and {last}"), {})
            seeds[run["seed"]] = np.median(gaps, axis=0)
    rows = []
    for (env, name, epochs), seeds in sorted(groups.items(), key=lambda group: (group[0][0], BACKBONES.index(group[0][1]))):
        gaps = ", ".join(f"{gap:.2f}" for gap in np.mean(list(seeds.values()), axis=0))
        rows.append((env, f"`{name}`", ", ".join(map(str, sorted(seeds))), epochs, gaps))
    return markdown(("environment", "backbone", "seeds", "epochs", "median gap per block, tokens"), rows)


def block_table(folders):
    """Section 5.6.1: the random model with one block replaced, over seeds."""
    groups = {}
    for results in read(folders, "results.json").values():
        if isinstance(results, dict) and any(
            run["name"].startswith("block_") for run in results.get("runs", []) if "name" in run
        ):
            for run in results["runs"]:
                groups.setdefault(run["name"], []).append(run)
    rows = [
        (f"`{name}`", ", ".join(str(run["seed"]) for run in runs), spread([run["epochs"][2]["loss"] for run in runs], ".3f"),
         spread([run["epochs"][-1]["loss"] for run in runs], ".3f"), spread([run["best_normalized_score"] for run in runs]))
        for name, runs in groups.items()
    ]  # fmt: skip
    return markdown(("model", "seeds", "loss of epoch 2", "last loss", "best score"), rows)


def gradient_results(folders, clipping):
    """What analyze_grads.py found, in studies of clipping (of several thresholds) or in the others."""
    studies = [results for results in read(folders, "results.json").values() if isinstance(results, list)]
    return [study for study in studies if (len({r["max_grad_norm"] for r in study}) > 1) == clipping]


def clipping_table(folders):
    """App. G.3: with and without clipping."""
    rows = []
    for r in sum(gradient_results(folders, clipping=True), []):
        records = r["records"][1:]
        losses = " → ".join(f"{record['loss']:.3f}" for record in records)
        clip = f"{r['max_grad_norm']:g}" if r["max_grad_norm"] else "none"
        scores = [f"{function(record['normalized_score'] for record in records):.1f}" for function in (max, lambda x: [*x][-1])]
        rows.append((f"`{r['label']}`", clip, f"{records[-1]['step']:,}", losses, *scores))
    return markdown(("backbone", "clipping at", "steps", "loss per epoch", "best score", "last score"), rows)


def gradient_table(folders):
    """Sections 5.3 and 5.4."""
    rows = []
    for results in gradient_results(folders, clipping=False):
        for r in results:
            norms = sum(share for name, share in r["set_shares"].items() if ".ln_" in name)
            first = sum(share for name, share in r["set_shares"].items() if name.startswith("0.ln_1."))
            rows.append(
                (
                    f"`{r['label']}`", str(r["epoch"]), f"{np.median(r['norm_before']):.2f}", f"{r['clipped_windows']:.0%}",
                    f"{r['confusion']:.2f}", f"{first:.2%}", f"{norms:.1%}", f"{r['distance']:.1f}",
                    f"{r['relative_distance']:.2f}", f"{r['cosine']:.3f}",
                )
            )  # fmt: skip
    columns = ("backbone", "epoch", "median gradient norm", "windows clipped", "confusion", "share of `0.ln_1`")
    columns += ("of all LayerNorms", "l2 distance", "relative", "cosine")
    return markdown(columns, rows)


def representation_tables(folders):
    """Sections 5.1 and 5.2, Apps. E and H.2: CKA, and information at the settings of each run."""
    similarity, information = [], []
    for results in read(folders, "results.json").values():
        if not isinstance(results, dict) or "data" not in results:
            continue
        args = results["args"]
        settings = "the paper's" if args["mine_paper_settings"] else f"{args['mine_windows']:,} windows"
        for run in results["runs"]:
            if "cka" in run:
                norms = [value for name, value in zip(run["layers"], run["cka"]["state"]) if ".ln_" in name]
                others = [value for name, value in zip(run["layers"], run["cka"]["state"]) if ".ln_" not in name]
                means = [f"{np.mean(run['cka'][token]):.2f}" for token in ("return", "state", "action")]
                similarity.append((f"`{run['name']}`", *means, f"{np.mean(norms):.2f}", f"{np.mean(others):.2f}"))
        for quantity, run in ((quantity, run) for quantity in ("I(X;T)", "I(Y;T)") for run in results["runs"]):
            context = [a for a in run["information"] if a["analysis"] == "context" and a["quantity"] == quantity]
            blocks = sorted({a["block"] for a in context})
            columns = [[a for a in context if a["block"] == b and not a["control"]] for b in blocks]
            columns.append([a for a in context if a["control"]])
            if context:
                information.append((settings, quantity, f"`{run['name']}`", *map(both_estimates, columns)))
        for quantity in ("I(s;a)", "I(R;a)"):
            of_data = [a for a in results["data"] if a["quantity"] == quantity]
            columns = [[a for a in of_data if a["control"] == control] for control in (False, True)]
            if of_data:
                information.append(
                    (settings, quantity, "the data", *("", both_estimates(columns[0]), "", both_estimates(columns[1])))
                )
    columns = ("backbone", "CKA return token", "state token", "action token", "state, LayerNorms", "state, other layers")
    heads = ("settings", "information", "of", "shallow", "middle", "deep", "data shuffled")
    return markdown(columns, similarity), markdown(heads, information)


def both_estimates(answers):
    """Held-out and training estimate as text, each the mean over tokens, steps and repeats."""
    return " / ".join(f"{np.nanmean(np.array([a[e] for a in answers], dtype=float)):.2f}" for e in ("held_out", "training"))


def main(args):
    similarity, information = representation_tables(args.folders)
    tables = dict(scores=score_table(args.folders), attention=attention_table(args.folders), blocks=block_table(args.folders))
    tables |= dict(
        gradients=gradient_table(args.folders),
        clipping=clipping_table(args.folders),
        similarity=similarity,
        information=information,
    )
    text = args.readme.read_text() if args.readme else ""
    for name, table in tables.items():
        if table.count("\n") == 1:
            continue  # no run of this kind
        print(f"\n{name}\n{table}")
        mark = f"<!-- table: {name} -->"
        text = re.sub(rf"{mark}\n.*?\n?<!-- end -->", lambda _: f"{mark}\n{table}\n<!-- end -->", text, flags=re.DOTALL)
    if args.readme:
        args.readme.write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
