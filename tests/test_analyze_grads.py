"""`analyze_grads.py` against plain loops of single-window backward passes, toys with known answers, and whole runs."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_one_sentence, load_data, make_model, sample_args

import analyze_grads as ag

SCRIPT = "analyze_grads.py"
SIZE = [*TINY, "--context-length", "5", "--norm-windows", "5", "--confusion-windows", "4"]


def model_and_windows(backbone="gpt2", count=6, context_length=4):
    data = load_data(ag, sample_args(ag))
    model = make_model(ag, ag.load_backbone(sample_args(ag, backbone=backbone, dropout=0.2)))
    dropout = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert max(dropout) > 0  # so that a gradient with dropout would be another one
    starts = torch.randint(len(data.states), (count,))
    starts[0] = data.episode_ends[0] - 2  # a window that is padded
    return model, data.windows(starts, context_length)


def plain_gradients(model, windows):
    """One backward pass per window: a list of {name: gradient}."""
    gradients = []
    for i in range(len(windows.valid)):
        model.zero_grad()
        ag.training_loss(model, ag.Windows(*(x[i : i + 1] for x in windows)))[0].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return gradients


@pytest.mark.parametrize("backbone", ["gpt2", "igpt", "random"])
def test_norms_and_cosines_equal_a_plain_loop(backbone):
    model, windows = model_and_windows(backbone)
    in_blocks, total, cosines = ag.gradient_statistics(model, windows, 5)
    plain = plain_gradients(model, windows)
    expected = [torch.cat([g.flatten() for g in p.values()]).norm() for p in plain]
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    sets = [name for name in plain[0] if name.startswith("transformer.h.")]
    flat = torch.stack([torch.cat([p[name].flatten() for name in sets]) for p in plain])
    np.testing.assert_allclose(in_blocks, flat.norm(dim=1), rtol=1e-4)
    flat = flat[:5].double()
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    np.testing.assert_allclose(cosines, expected, atol=1e-4)


class Toy(torch.nn.Module):
    """A linear policy that has its weights where a Transformer has its blocks."""

    def __init__(self):
        super().__init__()
        self.transformer = torch.nn.Module()
        self.transformer.h = torch.nn.ModuleList([torch.nn.Linear(4, 2, bias=False)])
        torch.nn.init.zeros_(self.transformer.h[0].weight)
        self.scale = torch.nn.Parameter(torch.ones(1))  # outside the blocks

    def forward(self, returns_to_go, states, actions, timesteps):
        return self.transformer.h[0](states) * self.scale


def test_opposite_targets_give_minus_one():
    states, actions = torch.randn(1, 3, 4).expand(2, 3, 4), torch.randn(1, 3, 2)
    targets = torch.cat([actions, -actions])
    valid = torch.ones(2, 3).bool()
    windows = ag.Windows(torch.zeros(2, 3, 1), states, targets, torch.zeros(2, 3).long(), valid)
    _, total, cosines = ag.gradient_statistics(Toy(), windows, 2)
    assert abs(cosines[0, 1] + 1) < 1e-5 and abs(cosines[0, 0] - 1) < 1e-5
    # The gradient of the mean of (W s - a)^2 over 3 steps and 2 dimensions, at W = 0.
    expected = 2 * (actions[0].T @ states[0]) / 6
    assert abs(total[0] - expected.norm()) < 1e-5


@pytest.mark.parametrize("threshold", [0.25, 3.0, 1e6, 0])
def test_clipped_norms_are_those_of_the_blocks_after_clipping_everything(threshold):
    """Against clip_grad_norm_ over all parameters: where much of the gradient is outside the blocks, little is left."""
    for scale, outside in ((0.1, 0.1), (5.0, 0.1), (5.0, 20.0)):
        model = Toy()
        for p, size in ((model.transformer.h[0].weight, scale), (model.scale, outside)):
            p.grad = torch.randn_like(p)
            p.grad *= size / p.grad.norm()
        total = np.hypot(scale, outside)
        torch.nn.utils.clip_grad_norm_(model.parameters(), threshold or float("inf"))
        expected = model.transformer.h[0].weight.grad.norm().item()
        assert (
            abs(ag.clipped_norm(np.array(scale), np.array(total), threshold) / expected - 1) < 1e-4
        )


@pytest.mark.parametrize("threshold", [0.25, 0])
def test_the_batch_gradient_is_that_of_one_clipped_training_step(threshold):
    model, windows = model_and_windows()
    norms = ag.batch_gradient_norms(model, windows, threshold)
    model.zero_grad()
    predicted = model(*windows[:4])
    valid = windows[4]
    ((predicted - windows[2])[valid] ** 2).mean().backward()  # all steps of all windows count alike
    if threshold:
        torch.nn.utils.clip_grad_norm_(model.parameters(), threshold)
    expected = {name: p.grad.norm().item() for name, p in model.transformer.h.named_parameters()}
    assert norms.keys() == expected.keys()
    np.testing.assert_allclose(list(norms.values()), list(expected.values()), rtol=1e-3)


def test_parameter_changes():
    before, after = make_model(ag, "gpt2"), make_model(ag, "gpt2")
    changes, whole = ag.parameter_changes(before, after)
    for change in (whole, *changes.values()):
        assert change["distance"] == change["relative_distance"] == 0
        assert abs(change["cosine"] - 1) < 1e-12
    weight = before.transformer.h[2].mlp.c_fc.weight.data
    perturbation = torch.randn(128, 512)
    after.transformer.h[2].mlp.c_fc.weight.data += perturbation
    changes, whole = ag.parameter_changes(before, after)
    moved = changes.pop("2.mlp.c_fc.weight")
    assert all(change["distance"] == 0 for change in changes.values()) and len(changes) == 47
    length = sum(p.norm() ** 2 for p in before.transformer.h.parameters()) ** 0.5
    assert abs(whole["distance"] - moved["distance"]) < 1e-6
    assert abs(whole["relative_distance"] - moved["distance"] / length) < 1e-4
    assert abs(moved["distance"] - perturbation.norm()) < 1e-3
    assert abs(moved["relative_distance"] - perturbation.norm() / weight.norm()) < 1e-4
    pair = (weight.flatten(), (weight + perturbation).flatten())
    assert abs(moved["cosine"] - torch.nn.functional.cosine_similarity(*pair, dim=0)) < 1e-5
    # Where there was no direction there is no cosine.
    change = ag.vector_change(torch.zeros(3), torch.ones(3))
    assert np.isnan(change["cosine"]) and np.isnan(change["relative_distance"])
    assert abs(change["distance"] - 3**0.5) < 1e-6


MEASURE = """
import resource, torch
import analyze_grads as ag
torch.manual_seed(0)
blocks = [ag.BlockConfig(384, 8, 1536, "gelu_new")] * 6
model = ag.DecisionTransformer(blocks, "layernorm", 11, 3, 1000).eval()
timesteps, valid = torch.arange(2).expand(30, 2), torch.ones(30, 2).bool()
states, actions = torch.randn(30, 2, 11), torch.rand(30, 2, 3)
windows = ag.Windows(torch.randn(30, 2, 1), states, actions, timesteps, valid)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ag.gradient_statistics(model, windows, 30)
all_gradients = 30 * 4 * sum(p.numel() for p in model.transformer.h.parameters()) / 1024
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / all_gradients)
"""


def test_memory_is_that_of_a_block_not_of_all():
    """Peak memory in a process of its own, as a share of 30 gradients of six blocks: one block is a sixth."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True
    )
    share = float(result.stdout)
    print(f"peak memory {share:.2f} of all gradients")
    assert share < 0.5


# ---------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------
def test_train_and_analyse(run_script, tmp_path):
    run = [*SIZE, "--backbones", "igpt", "--max-grad-norms", "0.25", "0", "--run-name", "a"]
    result = run_script(SCRIPT, *run)
    assert result.status == 0, result.err
    folder = tmp_path / "runs" / "a"
    results = json.loads((folder / "results.json").read_text())
    trained = [("igpt", 0.25), ("igpt", 0)]
    of_runs = [(r["args"]["backbone"], r["args"]["max_grad_norm"]) for r in results]
    assert of_runs == trained
    for r in results:
        clip = r["args"]["max_grad_norm"]
        assert (
            len(r["norm_before"]) == 5
            and len(r["cosines"]) == 6
            and r["confusion"] == min(r["cosines"])
        )
        clipped = np.mean(np.array(r["norm_before"]) > clip) if clip else 0
        assert max(r["norm_after"]) <= (clip or np.inf) * 1.0001 and np.all(
            np.array(r["norm_after"]) < r["norm_before"]
        )
        assert r["clipped_windows"] == clipped and r["median_norm"] == np.median(r["norm_before"])
        assert abs(r["mean_cosine"] - np.mean(r["cosines"])) < 1e-9
        assert abs(sum(values["share"] for values in r["sets"].values()) - 1) < 1e-6
        assert r["distance"] > 0 and 0 < r["cosine"] < 1
        assert (
            abs(
                sum(values["distance"] ** 2 for values in r["sets"].values()) ** 0.5 - r["distance"]
            )
            < 1e-6
        )
    names = ("gradient_windows", "gradient_shares", "gradient_per_set", "clipping")
    for name in (*names, "parameter_change"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "confusion" in result.out

    # The study goes on, and other windows are measured.
    result = run_script(SCRIPT, *run, "--num-epochs", "2", "--norm-windows", "4")
    assert result.status == 0, result.err
    longer = json.loads((folder / "results.json").read_text())
    assert [(r["args"]["backbone"], r["epoch"]) for r in longer] == [("igpt", 2), ("igpt", 2)]
    assert all(len(r["norm_before"]) == 4 for r in longer)
    for threshold in ("0", "0.25"):
        assert len(ag.read_run(folder / f"igpt_clip_{threshold}").records) == 3


def test_shares_are_stacked_by_kind_and_confusion_is_drawn_as_bars():
    """The figures hold the numbers: a bar of five parts that sum to 1, and the lowest cosine."""
    sets = {
        "0.ln_1.weight": 0.4,
        "0.ln_1.bias": 0.1,
        "1.ln_2.weight": 0.2,
        "0.attn.c_attn.weight": 0.05,
        "1.mlp.c_fc.bias": 0.25,
    }
    result = {
        "run": "a, epoch 1",
        "args": {
            "env": "Hopper-v4",
            "backbone": "gpt2",
            "context_length": 20,
            "seed": 1,
            "max_grad_norm": 0.25,
            "sample": True,
        },
        "sets": {name: {"share": share} for name, share in sets.items()},
        "norm_before": [1.0, 2.0],
        "norm_after": [0.1, 0.2],
        "cosines": [-0.4, 0.5],
        "confusion": -0.4,
    }
    figure = ag.plot_shares([result])
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    np.testing.assert_allclose(widths, [0.4, 0.1, 0.2, 0.05, 0.25])
    bars = ag.plot_windows([result]).axes[3].patches
    assert [bar.get_height() for bar in bars] == [-0.4]


def test_analyse_earlier_runs(run_script, tmp_path):
    """Checkpoints of the other scripts, a mixed model among them."""
    size = [*TINY, "--num-epochs", "1"]
    assert (
        run_script("dt_pretrained.py", *size, "--backbone", "gpt2", "--run-name", "b").status == 0
    )
    mixed = ["--replace-blocks", "1", "--attention-windows", "4", "--run-name", "c"]
    assert run_script("dt_no_context.py", *size, *mixed).status == 0
    runs = ["--runs", "runs/b", "runs/c/block_1", "--epochs", "0", "1", "--run-name", "a"]
    result = run_script(SCRIPT, *SIZE, *runs)
    assert result.status == 0, result.err
    results = json.loads((tmp_path / "runs" / "a" / "results.json").read_text())
    expected = [
        ("b, epoch 0", 20),
        ("b, epoch 1", 20),
        ("block_1, epoch 0", 1),
        ("block_1, epoch 1", 1),
    ]
    assert [(r["run"], r["args"]["context_length"]) for r in results] == expected
    assert (
        results[0]["distance"] == 0
        and abs(results[0]["cosine"] - 1) < 1e-9
        and results[1]["distance"] > 0
    )


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--backbones", str(ROOT)], [str(ROOT)]),
        (["--runs", "nowhere"], ["nowhere"]),
        (["--confusion-windows", "1"], ["--confusion-windows"]),
        (["--confusion-windows", "9"], ["--norm-windows"]),
        (["--epochs", "7"], ["--epochs 7"]),
        (["--backbones"], ["--backbones"]),
        (["--max-grad-norms"], ["--max-grad-norms"]),
        (["--max-grad-norms", "0.25", "-1"], ["--max-grad-norms"]),
        (["--env", "Hoper-v4"], ["Hoper-v4"]),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, said, run_script):
    assert_one_sentence(run_script(SCRIPT, *SIZE, *arguments), *said)


def test_bars_stand_at_their_parameter_sets():
    """In the order of the network; a set that a model lacks leaves its place empty."""
    results = []
    for backbone in ("gpt2", "igpt"):
        model = make_model(ag, backbone)
        names = [name for name, _ in model.transformer.h.named_parameters()]
        args = {"backbone": backbone, "max_grad_norm": 0.25, "seed": 1, "context_length": 20}
        args |= {"env": "Hopper-v4", "sample": True}
        # Each set has a value of its own, the same in both models.
        sets = {name: {"norm": 1 + sum(map(ord, name)) / 1000} for name in names}
        results.append({"run": backbone, "args": args, "sets": sets})
    every_name = list(results[0]["sets"])  # GPT-2 has them all
    (axes,) = ag.plot_sets(results, {"norm": "norm"}, "test").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == every_name
    for result, bars in zip(results, axes.containers):
        shown = {}
        for bar in bars:
            if np.isfinite(bar.get_height()):
                tick = round(bar.get_x() + bar.get_width() / 2)
                shown[every_name[tick]] = {"norm": bar.get_height()}
        assert shown == result["sets"]
    assert len(results[1]["sets"]) < len(every_name)
