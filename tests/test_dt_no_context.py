"""`dt_no_context.py`: attention against closed forms and transformers, replaced blocks, figures, runs."""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from conftest import ASSETS, TINY, assert_one_sentence, load_data, make_model, sample_args
from matplotlib.colors import to_rgb

import dt_no_context as dt
import dt_pretrained

SCRIPT = "dt_no_context.py"
SIZE = [*TINY, "--attention-windows", "10"]


def random_windows(count=5, K=20):
    return dt.Windows(
        returns_to_go=torch.randn(count, K, 1),
        states=torch.randn(count, K, 11),
        actions=torch.rand(count, K, 3) * 2 - 1,
        timesteps=torch.arange(K).expand(count, K),
        valid=torch.ones(count, K).bool(),
    )


# ---------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [3, 60])
def test_closed_forms(n):
    """Uniform causal attention, attention to oneself, and to the first of n tokens."""
    uniform = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    first = torch.zeros(n, n)
    first[:, 0] = 1
    distance, own_token = dt.attention_statistics(torch.stack([uniform, torch.eye(n), first]))
    np.testing.assert_allclose(distance, [(n - 1) / 4, 0, (n - 1) / 2], atol=1e-5)
    harmonic = np.mean(1 / np.arange(1, n + 1))
    np.testing.assert_allclose(own_token, [harmonic, 1, 1 / n], atol=1e-6)


def test_a_block_whose_queries_vanish_attends_uniformly():
    """Through the whole function: every head of every window looks (tokens - 1) / 4 back."""
    model = make_model(dt, "random-gpt2")
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[:, :128] = 0
        block.attn.c_attn.bias.data[:128] = 0
    table = dt.attention_of_heads(model, random_windows())
    assert len(table.drop_duplicates(["block", "window", "head"])) == len(table) == 4 * 5 * 4
    np.testing.assert_allclose(table.distance, 59 / 4, rtol=1e-5)
    np.testing.assert_allclose(table.own_token, np.mean(1 / np.arange(1, 61)), rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["gpt2", "random"])
def test_weights_are_those_the_block_uses(backbone):
    x = torch.randn(2, 60, 128)
    for block in make_model(dt, backbone).transformer.h:
        weights = dt.attention_weights(block.attn, x)
        assert not weights.triu(1).any()
        value = block.attn.c_attn(x).chunk(3, dim=-1)[2]
        value = value.unflatten(-1, (block.attn.n_head, -1)).transpose(1, 2)
        ours = block.attn.c_proj((weights @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(ours, block.attn(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backbone,folder", [("gpt2", "text-gpt2"), ("igpt", "image-gpt")])
def test_transformers_attentions(backbone, folder):
    """Every row of the table against output_attentions of transformers' own model, by plain loops."""
    import transformers

    model = make_model(dt, backbone)
    model_class = transformers.GPT2Model if backbone == "gpt2" else transformers.ImageGPTModel
    reference = model_class.from_pretrained(
        ASSETS / folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    reference.config.is_decoder = True
    reference.wpe.weight.zero_()
    windows = random_windows(count=2)
    tokens = model.embed(*windows[:4])
    result = reference(inputs_embeds=tokens, use_cache=False, output_attentions=True)
    rows = dt.attention_of_heads(model, windows).set_index(["block", "window", "head"])
    assert len(rows) == 4 * 2 * 4
    for (block, window, head), row in rows.iterrows():
        weights = result.attentions[block][window, head].numpy()
        queries = [sum(w[j] * (i - j) for j in range(i + 1)) for i, w in enumerate(weights)]
        assert abs(row.distance - np.mean(queries)) < 1e-3
        assert abs(row.own_token - np.mean([weights[i, i] for i in range(60)])) < 1e-5


def test_windows_are_whole_and_drawn_from_the_seed(tmp_path, monkeypatch):
    args = sample_args(dt, context_length=1)
    (tmp_path / "epoch_0.pt").touch()
    shown = []

    def attention_of_heads(model, windows):
        shown.append(windows)
        return pd.DataFrame()

    def draw_windows(count, seed):
        analysis = dt.Analysis(attention_windows=count)
        dt.measure_attention(tmp_path, analysis, dt.replace(args, seed=seed))
        return shown.pop()

    monkeypatch.setattr(dt, "load_model", lambda path, device: (None, args))
    monkeypatch.setattr(dt, "attention_of_heads", attention_of_heads)
    windows = draw_windows(300, seed=1)
    assert windows.states.shape == (300, 20, 11) and windows.valid.all()
    starts = torch.cat([windows.states[:, 0], windows.timesteps[:, :1]], dim=1)
    assert len(starts.unique(dim=0)) == 300
    assert torch.equal(draw_windows(300, seed=1).states, windows.states)
    assert not torch.equal(draw_windows(300, seed=2).states, windows.states)
    # All windows that lie within one episode can be drawn, and no other.
    steps = load_data(dt, args).timesteps
    count = int((steps[19:] == steps[:-19] + 19).sum())
    with pytest.raises(ValueError, match="larger sample"):
        draw_windows(count + 1, seed=1)
    assert draw_windows(count, seed=1).valid.all()


# ---------------------------------------------------------------------------------------------------------------
# Block replacement, and no context
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gpt2", "igpt"])
def test_the_replaced_block_is_the_source_and_the_others_are_not(name):
    args = sample_args(dt, backbone=name)
    pretrained = dt.load_backbone(args)
    source = make_model(dt, pretrained).transformer
    random = make_model(dt, "random").transformer
    for index in (0, 3):  # the released code does not replace block 0
        mixed = make_model(dt, dt.mixed_backbone(args, pretrained, index))
        for i, block in enumerate(mixed.transformer.h):
            expected = (source if i == index else random).h[i]
            assert str(block) == str(expected) and block.attn.n_head == expected.attn.n_head
            assert block.state_dict().keys() == expected.state_dict().keys()
            for key, weight in block.state_dict().items():
                assert torch.equal(weight, expected.state_dict()[key]) or i != index
            is_source = torch.equal(block.attn.c_attn.weight, source.h[i].attn.c_attn.weight)
            assert is_source == (i == index)
        assert str(mixed.transformer.ln_f) == str(random.ln_f)
        # Blocks of one head beside a block of four.
        heads = dt.attention_of_heads(mixed, random_windows()).groupby("block")["head"].nunique()
        assert heads.tolist() == [4 if i == index else 1 for i in range(4)]


def test_with_one_step_no_output_depends_on_another_step():
    """Each action of an evaluation comes from the current step alone, not even from that action."""
    args = sample_args(dt, context_length=1)
    model = make_model(dt, "random")
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    dt.evaluate(model, dt.make_env(args, 3), args)
    for (returns_to_go, states, actions, timesteps), output in seen[:5]:
        assert states.shape == (3, 1, 11)
        for i in range(3):
            parts = (returns_to_go, states, actions + 5, timesteps)
            alone = model(*[part[i : i + 1] for part in parts])
            torch.testing.assert_close(alone[0], output[i], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Figures: what is drawn, against the numbers. Three seeds that differ in nothing else, a model with more blocks
# and fewer heads, and a longer context.
# ---------------------------------------------------------------------------------------------------------------
RUNS = {  # blocks, heads, and what stands in every row of the log
    "study/gpt2_1": (4, 3, {"backbone": "gpt2", "K": 1, "seed": 1}),
    "study/gpt2_2": (4, 3, {"backbone": "gpt2", "K": 1, "seed": 2}),
    "study/gpt2_3": (4, 3, {"backbone": "gpt2", "K": 1, "seed": 3}),
    "study/igpt": (6, 2, {"backbone": "igpt", "K": 20, "seed": 1}),
}
SAME = {"env": "Hopper-v4", "dataset": "data", "head_std": None, "max_grad_norm": 0.25}
SAME["return_scale"] = 1000.0


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """log, attention."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("figures") / "runs"
    attention = []
    for run, (blocks, heads, settings) in RUNS.items():
        rows = []
        for epoch in (0, 1, 4):
            for i in range(epoch > 0 and 25):
                metrics = dict(zip(dt.METRICS, rng.random(4)))
                rows.append({"epoch": epoch, "step": 100 * epoch - i, **metrics})
            for value in rng.normal(1000 * rng.random(), 100, size=30):
                rows.append({"epoch": epoch, "step": 100 * epoch, "return": value, "score": 1})
        (folder / run).mkdir(parents=True)
        pd.DataFrame(rows).assign(**SAME, **settings).to_csv(folder / run / "log.csv", index=False)
        index = [(4, 0, 1), range(blocks), range(12), range(heads)]
        index = pd.MultiIndex.from_product(index, names=["epoch", "block", "window", "head"])
        values = {"distance": 15 * rng.random(len(index)), "own_token": rng.random(len(index))}
        attention.append(pd.DataFrame(values, index).reset_index().assign(run=str(folder / run)))
    log = dt.read_logs([folder / run for run in RUNS])
    labels = log[["run", "label"]].drop_duplicates()
    yield log, pd.concat(attention).merge(labels)
    plt.close("all")


def colors_of(log):
    return dict(zip(log.label.unique(), sns.color_palette("colorblind")))


def legend_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.texts]


def test_learning_curves(tables):
    """Lines are means, in the order of the runs; bands are intervals of episodes, and only there."""
    log, _ = tables
    labels = list(log.label.unique())
    assert labels == [f"gpt2, K 1, seed {seed}" for seed in (1, 2, 3)] + ["igpt, K 20, seed 1"]
    figure = dt.plot_learning_curves(log, "title")
    assert [text for text in legend_of(figure) if text in labels] == labels
    for axes, name in zip(figure.axes, ["return", "loss", "saturated_fraction"]):
        lines = [line for line in axes.lines if len(line.get_xdata())]
        assert len(lines) == len(labels)
        bands = [
            band for band in axes.collections if np.isfinite(band.get_datalim(axes.transData)).all()
        ]
        assert len(bands) == (len(labels) if name == "return" else 0)
        for line, label in zip(lines, labels):
            rows = log[log.label == label].dropna(subset=name)
            expected = rows.groupby("step")[name].mean()
            np.testing.assert_array_equal(line.get_xdata(), expected.index)
            np.testing.assert_allclose(line.get_ydata(), expected)
            assert to_rgb(line.get_color()) == colors_of(log)[label]
            assert line.is_dashed() == label.startswith("igpt")
    for band, label in zip(figure.axes[0].collections, labels):
        episodes = log[(log.label == label) & (log.step == 400)]["return"].dropna()
        corners = band.get_paths()[0].vertices
        low, high = np.sort(corners[corners[:, 0] == 400][:, 1])[[0, -1]]
        assert low < episodes.mean() < high
        expected = 2 * 1.96 * episodes.std() / np.sqrt(len(episodes))
        assert 0.75 < (high - low) / expected < 1.25


def test_gaps(tables):
    """Against plain loops: the first epoch that was asked for is what the others are compared with."""
    _, attention = tables
    gaps = dt.distance_gaps(attention).set_index(["label", "block", "window", "epoch"]).gap
    assert set(gaps.index.get_level_values("epoch")) == {0, 1}
    assert len(gaps) == 2 * 12 * (3 * 4 + 6)
    of_head = attention.set_index(["label", "block", "window", "epoch"]).distance.sort_index()
    for (label, block, window, epoch), gap in gaps.items():
        after = np.mean(of_head[label, block, window, epoch])
        before = np.mean(of_head[label, block, window, 4])
        np.testing.assert_allclose(gap, abs(after - before))


def test_boxes(tables):
    """Each box has the quartiles and whiskers of its own block and run, and stands at that block."""
    log, attention = tables
    labels = list(log.label.unique())
    figure = dt.plot_attention_gaps(attention, "title")
    gaps = dt.distance_gaps(attention)
    assert legend_of(figure) == labels and len(figure.axes) == 2
    assert figure.get_suptitle() == "title"
    for axes in figure.axes:
        epoch = int(axes.get_title().split()[-1])
        assert [text.get_text() for text in axes.get_xticklabels()] == list("012345")
        drawn = set()
        boxes = [box for container in axes.containers for box in container.boxes]
        medians = [median for container in axes.containers for median in container.medians]
        whiskers = [line for container in axes.containers for line in container.whiskers]
        for i, (box, median) in enumerate(zip(boxes, medians)):
            (label,) = [name for name in labels if colors_of(log)[name] == box.get_facecolor()[:3]]
            block = round(median.get_xdata().mean())
            drawn.add((label, block))
            of_box = (gaps.label == label) & (gaps.block == block) & (gaps.epoch == epoch)
            values = gaps[of_box].gap
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
            np.testing.assert_allclose(median.get_ydata(), middle)
            edges = box.get_path().vertices[:, 1]
            np.testing.assert_allclose([edges.min(), edges.max()], [low, high])
            inside = values[values.between(low - 1.5 * (high - low), high + 1.5 * (high - low))]
            ends = np.concatenate([line.get_ydata() for line in whiskers[2 * i : 2 * i + 2]])
            np.testing.assert_allclose([ends.min(), ends.max()], [inside.min(), inside.max()])
        assert drawn == {*attention[["label", "block"]].itertuples(index=False, name=None)}


def test_dots_of_heads(tables):
    """A dot for each head, beside its block and at the mean over the windows, in its run's color."""
    log, attention = tables
    figure = dt.plot_attention_heads(attention, "title")
    assert legend_of(figure)[-4:] == list(log.label.unique())
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == [
        "attention distance (tokens)",
        "weight on the own token",
    ]
    panels = itertools.product(["distance", "own_token"], [0, 1, 4])
    for axes, (name, epoch) in zip(figure.axes, panels, strict=True):
        assert axes.get_title() == f"epoch {epoch}"
        drawn = {}
        for dots in axes.collections:
            for (x, value), color in zip(dots.get_offsets().data, dots.get_facecolors()):
                drawn.setdefault(to_rgb(color[:3]), []).append((round(x), value))
        for label, color in colors_of(log).items():
            rows = attention[(attention.label == label) & (attention.epoch == epoch)]
            means = rows.groupby(["block", "head"])[name].mean().reset_index()
            expected = sorted(zip(means.block, means[name]))
            np.testing.assert_allclose(sorted(drawn[to_rgb(color)]), expected)


# ---------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "first,second,labels",
    [
        ({"seed": 1}, {"seed": 2}, ["gpt2, seed 1", "gpt2, seed 2"]),
        ({"epoch": 7}, {"epoch": 8}, ["gpt2, epochs 7", "gpt2, epochs 8"]),
        ({"env": "A"}, {"env": "B"}, ["gpt2, env A", "gpt2, env B"]),
        ({}, {"head_std": 0.02}, ["gpt2, head_std default", "gpt2, head_std 0.02"]),
        (
            {"max_grad_norm": np.inf},
            {},
            ["gpt2, max_grad_norm inf", "gpt2, max_grad_norm 0.25"],
        ),
        ({"backbone": "a/c500"}, {"backbone": "b/c500"}, ["a/c500", "b/c500"]),
        ({}, {}, ["gpt2 (one/random)", "gpt2 (two/random)"]),
    ],
)
def test_labels_tell_runs_apart(first, second, labels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [Path("runs/one/random"), Path("runs/two/random")]
    for folder, settings in zip(folders, [first, second]):
        folder.mkdir(parents=True)
        row = {"epoch": 0, "return": 1.0, **SAME, "backbone": "gpt2", "K": 1, "seed": 0, **settings}
        pd.DataFrame([row] * 3).to_csv(folder / "log.csv", index=False)
    log = dt.read_logs(folders)
    assert log.label.tolist() == [labels[0]] * 3 + [labels[1]] * 3
    assert log.run.unique().tolist() == ["one/random", "two/random"]
    for value in {*first.values(), *second.values()} - {0.02, np.inf, 7, 8}:
        assert str(value) in dt.describe(log)


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--replace-blocks", "0", "4"], ["--replace-blocks", "0 to 3"]),
        (["--runs", "nowhere"], ["nowhere"]),
    ],
)
def test_mistakes_end_with_one_sentence_before_training(arguments, words, run_script, tmp_path):
    result = run_script(SCRIPT, *SIZE, "--env", "Hopper-v5", *arguments)
    assert_one_sentence(result, *words)
    assert not list(tmp_path.rglob("*.pt"))


def test_a_run_and_finished_runs_side_by_side(run_script, tmp_path, figures_as_dots):
    """With K = 1, and then beside a run of dt_pretrained.py with K = 20 in another environment."""
    runs = tmp_path / "runs"
    args = sample_args(
        dt_pretrained, backbone="random", num_epochs=1, steps_per_epoch=4, num_eval_episodes=2
    )
    dt_pretrained.train(args, runs / "earlier", dt_pretrained.load_backbone(args))
    result = run_script(SCRIPT, *SIZE, "--run-name", "a")
    assert result.status == 0, result.err
    alone = pd.read_csv(runs / "a" / "attention.csv")
    assert set(pd.read_csv(runs / "a" / "log.csv").K) == {1}
    assert alone.groupby("epoch").size().to_dict() == {0: 160, 1: 160, 2: 160}  # 4 x 10 x 4
    figures = ("learning_curves.png", "attention_gaps.png", "attention_heads.png")
    for name in figures:
        assert (runs / "a" / name).read_bytes().startswith(b"\x89PNG")

    both = ["--runs", "runs/a", "runs/earlier", "--run-name", "b"]
    result = run_script(SCRIPT, *SIZE, *both)
    assert result.status == 0, result.err
    assert {path.name for path in (runs / "b").glob("*.*g")} == set(figures)
    assert not list((runs / "b").glob("*.pt"))
    attention = pd.read_csv(runs / "b" / "attention.csv")
    sizes = attention.groupby(["label", "epoch"]).size().to_dict()
    assert sizes == {
        ("gpt2, env Hopper-v4, K 1, head_std 0.02, epochs 2", 0): 160,
        ("gpt2, env Hopper-v4, K 1, head_std 0.02, epochs 2", 1): 160,
        ("gpt2, env Hopper-v4, K 1, head_std 0.02, epochs 2", 2): 160,
        ("random, env Hopper-v5, K 20, head_std default, epochs 1", 0): 40,
        ("random, env Hopper-v5, K 20, head_std default, epochs 1", 1): 40,
    }
    # The seed is the same, and so are the windows.
    values = ["block", "window", "head", "epoch", "distance", "own_token"]
    pd.testing.assert_frame_equal(attention[attention.run == "a"][values], alone[values])
    # The closing table.
    for name in ("a", "earlier"):
        log = pd.read_csv(runs / name / "log.csv")
        scores = log[log.epoch > 0].groupby("epoch").score.mean()
        (row,) = [line.split() for line in result.out.splitlines() if log.backbone[0] in line][-1:]
        assert [float(row[-5]), float(row[-1])] == [
            round(scores.iloc[-1], 3),
            round(scores.max(), 3),
        ]


def test_replaced_blocks(run_script, tmp_path, monkeypatch):
    """A run for each block, as random models in what Adam is given; what is finished is kept."""
    command = [*SIZE, "--num-epochs", "1", "--run-name", "study", "--attention-windows", "0"]
    assert run_script(SCRIPT, *command, "--replace-blocks", "2").status == 0
    study = tmp_path / "runs" / "study"
    before = (study / "block_2" / "latest.pt").stat().st_mtime_ns
    result = run_script(SCRIPT, *command, "--replace-blocks", "2", "0", "2")
    assert result.status == 0 and result.out.count("block_2 goes on") == 1
    assert (study / "block_2" / "latest.pt").stat().st_mtime_ns == before
    for block in (0, 2):
        checkpoint = dt.read_checkpoint(study / f"block_{block}" / "latest.pt", "cpu")
        assert checkpoint["optimizer"]["param_groups"][0]["eps"] == 1e-8
        blocks = checkpoint["architecture"]["configs"]
        assert [i for i in range(4) if blocks[i]["n_head"] == 4] == [block]
        model, args = dt.load_model(study / f"block_{block}" / "epoch_0.pt", "cpu")
        source = dt.load_backbone(sample_args(dt, backbone="gpt2")).weights
        ours = model.transformer.h[block].attn.c_attn.weight
        assert torch.equal(ours, source[f"h.{block}.attn.c_attn.weight"])
        assert args.backbone == f"random with block {block} of gpt2"
    assert not list(study.glob("*.pt"))

    # Under torchrun only the first process goes past the training.
    monkeypatch.setenv("RANK", "1")
    second = [*SIZE, "--num-epochs", "1", "--backbone", "random", "--run-name", "second"]
    assert run_script(SCRIPT, *second).status == 0
    assert not (tmp_path / "runs" / "second").exists()


def test_many_models_in_one_process_are_all_compiled(tmp_path, monkeypatch):
    """torch compiles one function eight times (here once), then leaves it to Python, with a warning."""
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode: compile_model(model, backend="eager"))
    args = sample_args(dt, backbone="random", compile=True)
    args = dt.replace(args, num_epochs=1, steps_per_epoch=2, num_eval_episodes=1)
    pretrained = dt.load_backbone(dt.replace(args, backbone="gpt2"))
    limit = {"recompile_limit": 1, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limit):
        for block in (0, 1):
            dt.train(args, tmp_path / str(block), dt.mixed_backbone(args, pretrained, block))
