"""`analyze_grads.py` against plain loops of backward passes, toys with known answers; its figures against its tables."""

import math
import shutil
import subprocess
import sys
import warnings

import imageio.v3 as imageio
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
import torch.nn as nn
from conftest import ROOT, TINY, assert_one_sentence, load_data, make_model, sample_args

import analyze_grads as ag

SCRIPT = "analyze_grads.py"
GPT2 = ag.Backbone([ag.BlockConfig(32, 2, 64, "gelu_new", dropout=0.2)] * 2, "layernorm", {})
IMAGE_BLOCK = ag.BlockConfig(16, 2, 32, "quick_gelu", "rmsnorm", dropout=0.2)
IMAGE_GPT = ag.Backbone([IMAGE_BLOCK] * 3, "rmsnorm", {})


# --------------------------------------------------------------------------------------------------
# Gradients and parameter sets
# --------------------------------------------------------------------------------------------------
def model_and_windows(backbone=GPT2, count=6, context_length=4):
    data = load_data(ag, sample_args(ag))
    starts = torch.randint(len(data.states), (count,))
    starts[0] = data.episode_ends[0] - 2  # a window that is padded
    return make_model(ag, backbone), data.windows(starts, context_length)


def plain_gradients(model, windows):
    """One backward pass per window: a list of {name: gradient}, in float64."""
    gradients = []
    for i in range(len(windows.valid)):
        model.zero_grad()
        ag.training_loss(model, ag.Windows(*(x[i : i + 1] for x in windows)))[0].backward()
        gradients.append({name: p.grad.double() for name, p in model.named_parameters()})
    model.zero_grad()
    return gradients


def blocks_as_vectors(gradients):
    names = [name for name in gradients[0] if name.startswith("transformer.h.")]
    return torch.stack([torch.cat([g[name].flatten() for name in names]) for g in gradients])


@pytest.mark.parametrize("backbone", [GPT2, IMAGE_GPT])
def test_norms_and_cosines_equal_a_plain_loop(backbone):
    model, windows = model_and_windows(backbone)
    norms, norms_in_blocks, cosines = ag.gradient_statistics(model, windows)
    gradients = plain_gradients(model, windows)
    expected = [
        torch.cat([g.flatten() for g in of_window.values()]).norm() for of_window in gradients
    ]
    np.testing.assert_allclose(norms, expected, rtol=1e-5)
    vectors = blocks_as_vectors(gradients)
    np.testing.assert_allclose(norms_in_blocks, vectors.norm(dim=1), rtol=1e-5)
    expected = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    np.testing.assert_allclose(cosines, expected, atol=1e-5)


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


def test_opposite_targets_have_cosine_minus_one_and_a_reached_target_has_none():
    states, actions = torch.randn(1, 3, 4).expand(3, 3, 4), torch.randn(1, 3, 2)
    targets = torch.cat([actions, -actions, 0 * actions])  # the toy predicts 0
    valid = torch.ones(3, 3).bool()
    windows = ag.Windows(torch.zeros(3, 3, 1), states, targets, torch.zeros(3, 3).long(), valid)
    norms, norms_in_blocks, cosines = ag.gradient_statistics(Toy(), windows)
    nan = math.nan
    expected = [[1, -1, nan], [-1, 1, nan], [nan, nan, nan]]
    np.testing.assert_allclose(cosines, expected, atol=1e-6)
    # The gradient of the mean of (W s - a)^2 over 3 steps and 2 dimensions, at W = 0.
    expected = (2 * (actions[0].T @ states[0]) / 6).norm()
    np.testing.assert_allclose(norms, [expected, expected, 0], rtol=1e-6)
    np.testing.assert_allclose(norms_in_blocks, norms)


@pytest.mark.parametrize("threshold", [0.25, float("inf")])
def test_a_set_has_the_norm_of_one_clipped_training_step(threshold):
    model, windows = model_and_windows(IMAGE_GPT)
    sets = ag.parameter_sets(model, model, windows, threshold)
    model.zero_grad()
    predicted = model(*windows[:4])
    valid = windows.valid
    ((predicted - windows.actions)[valid] ** 2).mean().backward()  # all steps count alike
    torch.nn.utils.clip_grad_norm_(model.parameters(), threshold)
    expected = {name: p.grad.norm().item() for name, p in model.transformer.h.named_parameters()}
    assert list(sets.block.astype(str) + "." + sets["set"]) == list(expected)
    np.testing.assert_allclose(sets.grad_norm, list(expected.values()), rtol=1e-5)
    np.testing.assert_allclose(sets.share, sets.grad_norm / sum(expected.values()), rtol=1e-5)


def test_parameter_changes():
    before, windows = model_and_windows()
    after = make_model(ag, GPT2)
    weight = before.transformer.h[1].mlp.c_fc.weight.data
    perturbation = torch.randn(32, 64)
    after.transformer.h[1].mlp.c_fc.weight.data += perturbation
    after.transformer.h[0].ln_1.bias.data += 1  # which was zero
    sets = ag.parameter_sets(after, before, windows, 0.25).set_index(["block", "set"])
    moved = sets.loc[1, "mlp.c_fc.weight"]
    assert abs(moved.distance - perturbation.norm()) < 1e-4
    assert abs(moved.relative_distance - perturbation.norm() / weight.norm()) < 1e-4
    cosine = torch.nn.functional.cosine_similarity
    expected = cosine(weight.flatten(), (weight + perturbation).flatten(), dim=0)
    assert abs(moved.cosine - expected) < 1e-5
    # Where there was no direction there is no cosine.
    bias = sets.loc[0, "ln_1.bias"]
    assert (
        abs(bias.distance - 32**0.5) < 1e-6
        and np.isnan([bias.cosine, bias.relative_distance]).all()
    )
    rest = sets.drop([(1, "mlp.c_fc.weight"), (0, "ln_1.bias")])
    assert len(rest) == 22 and (rest.distance == 0).all()
    np.testing.assert_allclose(rest.cosine.dropna(), 1, atol=1e-12)


MEASURE = """
import resource, torch
import analyze_grads as ag
blocks = [ag.BlockConfig(256, 4, 1024, "gelu_new")] * 6
model = ag.DecisionTransformer(blocks, "layernorm", 11, 3, 1000).eval()
timesteps, valid = torch.arange(2).expand(20, 2), torch.ones(20, 2).bool()
states, actions = torch.randn(20, 2, 11), torch.rand(20, 2, 3)
windows = ag.Windows(torch.randn(20, 2, 1), states, actions, timesteps, valid)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ag.gradient_statistics(model, windows)
all_gradients = 20 * 4 * sum(p.numel() for p in model.transformer.h.parameters()) / 1024
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / all_gradients)
"""


def test_memory_is_that_of_a_block_not_of_all():
    """Peak memory in a process of its own, as a share of the gradients of six blocks: one block is a sixth."""
    command = [sys.executable, "-c", MEASURE]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    share = float(result.stdout)
    print(f"peak memory {share:.2f} of all gradients")
    assert share < 0.32


# --------------------------------------------------------------------------------------------------
# Runs side by side: three seeds, and one of another architecture, K and clipping
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "runs"
    size = {"num_epochs": 1, "steps_per_epoch": 4, "batch_size": 4, "num_eval_episodes": 3}
    size |= {"compile": False, "context_length": 5}
    for seed in (1, 2, 3):
        args = sample_args(ag, backbone="random", seed=seed, **size)
        ag.train(args, folder / f"seed{seed}" / "random", GPT2)
    size["context_length"] = 3
    args = sample_args(ag, backbone="igpt", seed=1, max_grad_norm=float("inf"), **size)
    ag.train(args, folder / "igpt", IMAGE_GPT)
    return [*sorted(folder.glob("seed*/random")), folder / "igpt"]


@pytest.fixture(scope="module")
def tables(runs):
    """What the script would keep of these runs at epoch 1, and their log."""
    log = ag.read_logs(runs)
    analysis = ag.Analysis(norm_windows=12, confusion_windows=5)
    args = sample_args(ag, seed=7)
    results = []
    for run, label in zip(runs, log.label.unique()):
        of_run = ag.analyze(run, 1, analysis, args)
        results.append([table.assign(run=str(run), label=label) for table in of_run])
    return [pd.concat(parts, ignore_index=True) for parts in zip(*results)], log


def test_clipped_norms_are_those_of_the_blocks_after_clipping_everything(runs, tables):
    """A run's K, the seed of the analysis, and clip_grad_norm_ on the gradient of each window."""
    (windows, pairs, _), log = tables
    for run, label in zip(runs, log.label.unique()):
        model, args = ag.load_model(run / "epoch_1.pt", "cpu")
        data = load_data(ag, args)
        starts = np.random.default_rng(7).integers(len(data.states), size=12)
        plain = plain_gradients(model, data.windows(torch.as_tensor(starts), args.context_length))
        expected = []
        for gradient in plain:
            for name, p in model.named_parameters():
                p.grad = gradient[name].float()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            gradients = [p.grad for p in model.transformer.h.parameters()]
            expected.append(torch.nn.utils.get_total_norm(gradients))
        of_run = windows[windows.label == label]
        np.testing.assert_allclose(of_run.clipped_block_norm, expected, rtol=1e-4)
        vectors = torch.nn.functional.normalize(blocks_as_vectors(plain)[:5])
        of_run = pairs[pairs.label == label]
        assert len(of_run) == 10 and (of_run.window < of_run.other_window).all()
        for pair in of_run.itertuples():
            assert abs(vectors[pair.window] @ vectors[pair.other_window] - pair.cosine) < 1e-5


def test_a_window_without_gradient(runs, tmp_path):
    """All actions saturated: norms are 0, cosines are undefined, and nothing warns."""
    shutil.copytree(runs[0], tmp_path / "saturated")
    checkpoint = torch.load(tmp_path / "saturated" / "epoch_1.pt")
    checkpoint["model"]["embed_action.weight"] *= 1e6
    torch.save(checkpoint, tmp_path / "saturated" / "epoch_1.pt")
    analysis = ag.Analysis(norm_windows=3, confusion_windows=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        windows, pairs, _ = ag.analyze(tmp_path / "saturated", 1, analysis, sample_args(ag))
        assert (windows["norm"] == 0).all() and (windows.clipped_block_norm == 0).all()
        assert pairs.cosine.isna().all()
        names = {"run": "saturated", "label": "saturated"}
        figure = ag.plot_windows(windows.assign(**names), pairs.assign(**names), "nothing to draw")
        figure.draw_without_rendering()


def labels_of(axes):
    """{position: label} of the ticks on the vertical axis."""
    axes.figure.draw_without_rendering()
    names = [text.get_text() for text in axes.get_yticklabels()]
    return {round(position): name for position, name in zip(axes.get_yticks(), names)}


def colors_of(labels):
    return dict(zip(labels, sns.color_palette("colorblind")))


def test_boxes_and_bars_of_windows(tables):
    """Four labels, four boxes: quartiles of the numbers themselves, whiskers of 1.5 interquartile ranges."""
    (windows, pairs, _), log = tables
    labels = list(log.label.unique())
    figure = ag.plot_windows(windows, pairs, ag.describe(log))
    label_at = labels_of(figure.axes[0])  # the others share this axis
    assert list(label_at.values()) == labels
    for axes in figure.axes[1:]:
        assert axes.get_shared_y_axes().joined(axes, figure.axes[0])
    assert figure.axes[0].get_xscale() == "log"  # but nothing is computed of logarithms
    drawn = ((windows, "norm"), (windows, "clipped_block_norm"), (pairs, "cosine"))
    for axes, (table, column) in zip(figure.axes, drawn):
        found = []
        for container in axes.containers:
            for i, (box, median) in enumerate(zip(container.boxes, container.medians)):
                label = label_at[round(np.mean(median.get_ydata()))]
                found.append(label)
                values = table[table.label == label][column]
                low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
                np.testing.assert_allclose(median.get_xdata(), middle)
                ends = box.get_path().vertices[:, 0]
                np.testing.assert_allclose([ends.min(), ends.max()], [low, high])
                reach = 1.5 * (high - low)
                within = values[(values >= low - reach) & (values <= high + reach)]
                whiskers = [w.get_xdata()[1] for w in container.whiskers[2 * i : 2 * i + 2]]
                np.testing.assert_allclose(whiskers, [within.min(), within.max()])
                np.testing.assert_allclose(box.get_facecolor()[:3], colors_of(labels)[label])
        assert found == labels
    bars = {}
    for bar in figure.axes[3].patches:
        bars[label_at[round(bar.get_y() + bar.get_height() / 2)]] = bar
    assert list(bars) == labels
    for label, bar in bars.items():
        assert bar.get_width() == pairs[pairs.label == label].cosine.min()
        np.testing.assert_allclose(bar.get_facecolor()[:3], colors_of(labels)[label])
    thresholds = [line for line in figure.axes[1].lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in thresholds] == [0.25, np.inf]
    assert all(np.isfinite(axes.get_xlim()).all() for axes in figure.axes)
    assert "12 single windows" in figure.get_suptitle() and "seed 1, 2, 3" in figure.get_suptitle()


def test_shares_are_stacked_by_kind(tables):
    (_, _, sets), log = tables
    axes = ag.plot_shares(sets, "title").axes[0]
    kinds = [text.get_text() for text in axes.get_legend().get_texts()]
    labels = labels_of(axes)
    assert list(labels.values()) == list(log.label.unique())
    assert kinds == ["0.ln_1.weight", "0.ln_1.bias", "other LayerNorms", "attention", "mlp"]
    for position, label in labels.items():
        of_run = sets[sets.label == label]
        shares = of_run.set_index(of_run.block.astype(str) + "." + of_run["set"]).share
        expected = [shares.get("0.ln_1.weight"), shares.get("0.ln_1.bias", 0)]
        layer_norms = shares[shares.index.str.contains("ln_")].sum()
        expected.append(layer_norms - sum(expected))
        expected.append(shares[shares.index.str.contains("attn")].sum())
        expected.append(shares[shares.index.str.contains("mlp")].sum())
        bars = [container[position] for container in axes.containers]
        assert all(round(bar.get_y() + bar.get_height() / 2) == position for bar in bars)
        np.testing.assert_allclose([bar.get_width() for bar in bars], expected, atol=1e-12)
        np.testing.assert_allclose(bars[-1].get_x() + bars[-1].get_width(), 1)  # end to end


def test_heat_maps_have_each_cell_at_its_labels(tables):
    """In the order of the network, and with ImageGPT's ten sets and three blocks beside GPT-2's twelve and two."""
    (_, _, sets), log = tables
    columns = {"distance": "l2", "relative_distance": "relative", "cosine": "cos"}
    figure = ag.plot_sets(sets, columns, "title")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [*log.label.unique()] * 3
    limits = []
    for i, axes in enumerate(panels):
        of_run = sets[sets.label == axes.get_title()].set_index(["set", "block"])
        rows = [text.get_text() for text in axes.get_yticklabels()]
        blocks = [int(text.get_text()) for text in axes.get_xticklabels()]
        assert blocks == ([0, 1, 2] if "igpt" in axes.get_title() else [0, 1])
        assert rows == list(of_run.loc[(slice(None), 0), :].index.get_level_values("set"))
        assert rows[0] == "ln_1.weight" and rows[-1] == "mlp.c_proj.bias"
        mesh = axes.images[0]
        cells = np.ma.filled(mesh.get_array().reshape(len(rows), len(blocks)), np.nan)
        for y, name in enumerate(rows):
            for x, block in enumerate(blocks):
                expected = of_run.loc[(name, block), list(columns)[i // 4]]
                np.testing.assert_equal(cells[y, x], expected)
        limits.append((mesh.norm.vmin, mesh.norm.vmax))
    for row in (limits[:4], limits[4:8], limits[8:]):  # the same colors for all runs
        assert len(set(row)) == 1
    values = sets.distance[sets.distance > 0]
    assert limits[0] == (values.min(), values.max())


def test_nothing_has_moved_at_epoch_zero(runs):
    """Distances of zero have no logarithm, but a figure."""
    analysis = ag.Analysis(norm_windows=2, confusion_windows=2)
    _, _, sets = ag.analyze(runs[0], 0, analysis, sample_args(ag))
    assert (sets.distance == 0).all()
    ag.plot_sets(sets.assign(label="a"), {"distance": "l2"}, "").draw_without_rendering()


def test_learning_curves_have_a_line_for_each_run(tables):
    """Loss and norm as logged and without a band; the return with one, of its episodes."""
    _, log = tables
    labels = list(log.label.unique())
    figure = ag.plot_learning_curves(log, "title")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    for axes, column in zip(figure.axes, ("loss", "return", "grad_norm")):
        lines = [line for line in axes.lines if len(line.get_xdata())]
        assert len(lines) == 4
        for label, line in zip(labels, lines):
            expected = log[log.label == label].groupby("step")[column].mean().dropna()
            np.testing.assert_array_equal(line.get_xdata(), expected.index)
            np.testing.assert_allclose(line.get_ydata(), expected)
            np.testing.assert_allclose(line.get_color(), colors_of(labels)[label])
        bands = [path for band in axes.collections for path in band.get_paths()]
        assert len(bands) == (4 if column == "return" else 0)


# --------------------------------------------------------------------------------------------------
# The script
# --------------------------------------------------------------------------------------------------
FIGURES = (
    "gradient_windows",
    "gradient_shares",
    "gradient_per_set",
    "parameter_change",
    "learning_curves",
)
SIZE = [*TINY, "--context-length", "3", "--norm-windows", "4", "--confusion-windows", "3"]


def test_backbones_of_the_same_name_then_one_of_their_runs(run_script, tmp_path, monkeypatch):
    """a/checkpoint and b/checkpoint are trained and told apart; one run is looked at once more."""
    import transformers

    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=8, n_positions=16)
    for name in ("a/checkpoint", "b/checkpoint"):
        model = transformers.GPT2Model(config)
        for block in model.h:
            nn.init.normal_(block.mlp.c_fc.bias)  # a bias that does not start at zero
            nn.init.normal_(block.mlp.c_proj.bias)
        model.save_pretrained(tmp_path / name)
    result = run_script(
        SCRIPT,
        *SIZE,
        "--backbones",
        "a/checkpoint",
        "b/checkpoint",
        "--epochs",
        "2",
        "--run-name",
        "s",
    )
    assert result.status == 0, result.err  # trained longer than the one epoch of the defaults
    folder = tmp_path / "runs" / "s"
    windows, pairs, sets = (
        pd.read_csv(folder / f"{name}.csv") for name in ("windows", "pairs", "sets")
    )
    assert len(windows) == 2 * 4 and len(pairs) == 2 * 3 and len(sets) == 2 * 24
    for table in (windows, pairs, sets):
        assert list(table.run.unique()) == ["s/a_checkpoint", "s/b_checkpoint"]
        assert list(table.label.unique()) == ["a/checkpoint, epoch 2", "b/checkpoint, epoch 2"]
        assert (table.epoch == 2).all()
    for name in FIGURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    median = windows[windows.run == "s/b_checkpoint"]["norm"].median()
    line = next(
        line for line in result.out.splitlines() if line.startswith("b/checkpoint, epoch 2")
    )
    assert f" {median:.4f}".rstrip("0") in line
    weights = sets[(sets.run == "s/b_checkpoint") & ~sets["set"].str.endswith("bias")]
    assert line.endswith(f" {weights.relative_distance.median():.4f}".rstrip("0"))

    trained = "runs/s/b_checkpoint"
    # A picture of one pixel: to paint them takes seconds.
    dot = np.zeros((1, 1, 3), np.uint8)
    savefig = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(savefig, lambda figure, path, **options: imageio.imwrite(path, dot))
    result = run_script(SCRIPT, *SIZE, "--runs", trained, "--epochs", "0", "2", "--run-name", "t")
    assert result.status == 0, result.err
    again = pd.read_csv(tmp_path / "runs" / "t" / "windows.csv")
    assert list(again.label) == ["b/checkpoint, epoch 0"] * 4 + ["b/checkpoint, epoch 2"] * 4
    pd.testing.assert_frame_equal(
        again[4:].reset_index(drop=True), windows[4:].reset_index(drop=True)
    )


def test_other_processes_of_torchrun_leave_the_analysis_to_the_first(
    run_script, runs, tmp_path, monkeypatch
):
    monkeypatch.setenv("RANK", "1")
    result = run_script(SCRIPT, *SIZE, "--runs", runs[0], "--run-name", "r")
    assert result.status == 0 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--backbone", "gpt2"], ["--backbones"]),
        (["--backbone=gpt2"], ["--backbones"]),
        (["--backbones", "random", str(ROOT)], [str(ROOT)]),
        (["--runs", "nowhere"], ["nowhere"]),
        (["--env", "Hoper-v4"], ["Hoper-v4"]),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, said, run_script, tmp_path):
    assert_one_sentence(run_script(SCRIPT, *SIZE, *arguments), *said)
    assert not (tmp_path / "runs").exists()  # nothing was trained


def test_an_epoch_that_was_not_kept(run_script, runs):
    assert_one_sentence(run_script(SCRIPT, *SIZE, "--runs", runs[0], "--epochs", "5"), "epoch_5.pt")
