"""`analyze_repr.py` against closed forms, formulas written out, transformers' hooks, plain loops, and whole runs."""

import itertools
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
import torch.nn as nn
import transformers
from conftest import ASSETS, TINY, assert_one_sentence, load_data, make_model, sample_args

import analyze_repr as ar

SCRIPT = "analyze_repr.py"
SIZE = [*TINY, "--num-epochs", "1", "--context-length", "3", "--cka-windows", "20"]
SIZE += ["--mine-windows", "40", "--mine-batch-size", "20", "--mine-passes", "1"]


# ---------------------------------------------------------------------------------------------------------------
# CKA
# ---------------------------------------------------------------------------------------------------------------
def cka_of(x, y):
    return (ar.gram_matrix(x) @ ar.gram_matrix(y)).item()


def hsic_by_its_formula(K, L):
    """The unbiased estimator as Song et al. 2012 (equation 5) and Kornblith et al.'s debiased CKA define it."""
    n = len(K)
    K = K - torch.diag(K.diagonal())
    L = L - torch.diag(L.diagonal())
    one = torch.ones(n, dtype=torch.float64)
    total = torch.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3))


def cka_by_its_formula(x, y):
    K = x.double() @ x.double().T
    L = y.double() @ y.double().T
    lengths = hsic_by_its_formula(K, K) * hsic_by_its_formula(L, L)
    return (hsic_by_its_formula(K, L) / lengths.sqrt()).item()


def test_cka_equals_its_formula():
    common = torch.randn(50, 10)
    layers = []
    for i, width in enumerate((5, 20, 80, 30)):
        layers.append(torch.randn(50, width) + i * common @ torch.randn(10, width))
    grams = torch.stack([ar.gram_matrix(layer) for layer in layers])
    expected = [[cka_by_its_formula(x, y) for y in layers] for x in layers]
    np.testing.assert_allclose(grams @ grams.T, expected, rtol=1e-9, atol=1e-9)
    assert expected[2][3] > 0.5
    # And a U-statistic it is: a mean over all quadruples of different windows.
    K = (layers[1][:8] @ layers[1][:8].T).double()
    L = (layers[2][:8] @ layers[2][:8].T).double()
    terms = []
    for i, j, q, r in itertools.permutations(range(8), 4):
        terms.append(K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q]))
    assert abs(torch.stack(terms).mean() / hsic_by_its_formula(K, L) - 1) < 1e-9


def test_cka_is_blind_to_rotation_scale_and_translation():
    x = torch.randn(100, 40, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    assert abs(cka_of(x, 3.7 * x @ rotation + torch.randn(40)) - 1) < 1e-9
    assert cka_of(x, x * torch.linspace(0.1, 5, 40)) < 0.95  # but not to a scale per feature


def test_cka_of_independent_features_is_near_zero_and_the_biased_one_is_not():
    debiased = []
    biased = []
    for _ in range(10):
        x, y = torch.randn(2, 100, 200)
        debiased.append(cka_of(x, y))
        x = x - x.mean(0)
        y = y - y.mean(0)
        biased.append(((x.T @ y).square().sum() / (x.T @ x).norm() / (y.T @ y).norm()).item())
    assert abs(np.mean(debiased)) < 0.02 and max(map(abs, debiased)) < 0.05 < 0.5 < np.mean(biased)


def test_a_constant_layer_has_no_cka():
    assert math.isnan(cka_of(torch.full((20, 3), 0.1), torch.randn(20, 3)))


@torch.no_grad()
@pytest.mark.parametrize(
    "backbone,folder", [("gpt2", "text-gpt2"), ("igpt", "image-gpt")], ids=["gpt2", "igpt"]
)
def test_activations_are_those_of_transformers(backbone, folder):
    """The same weights in transformers' own model, with forward hooks of our own, on the same embedded tokens."""
    model = make_model(ar, backbone)
    windows = load_data(ar, sample_args(ar)).windows(torch.arange(260) * 11, 5)
    theirs = transformers.AutoModel.from_pretrained(ASSETS / folder, dtype=torch.float32).eval()
    theirs.wpe.weight.zero_()
    theirs.config.is_decoder = True  # else transformers 5 gives ImageGPT no causal mask
    names = [f"{block}.{layer}" for block in range(4) for layer in ar.LAYERS]
    seen = {}
    for name in names:
        theirs.h.get_submodule(name).register_forward_hook(
            lambda module, x, y, name=name: seen.update({name: y})
        )
    theirs(inputs_embeds=model.embed(*windows[:4]), use_cache=False)

    ours = ar.activations(model, windows, names, steps=[0, 3])
    assert list(ours) == names
    for name in names:
        for i, step in enumerate([0, 3]):
            for j in range(3):
                expected = seen[name][:, 3 * step + j]
                atol = 1e-4 * expected.abs().max().item()
                torch.testing.assert_close(ours[name][:, i, j], expected, rtol=1e-4, atol=atol)
    assert ours["2.mlp.c_fc"].shape == (260, 2, 3, 512)  # more than are computed at once
    assert not model.transformer.h[0].ln_1._forward_hooks

    # For CKA only the last step's three tokens are kept, return, state and action.
    grams = ar.gram_matrices(model, windows)
    for j, token in enumerate(("return", "state", "action")):
        x, y = seen["1.ln_2"][:, 12 + j], seen["3.mlp.dropout"][:, 12 + j]
        assert abs(grams[token][9 + 4] @ grams[token][35] - cka_by_its_formula(x, y)) < 1e-4


def random_grams(num_layers, seed):
    """Gram matrices of made-up layers, for each token, and the layers [layers, windows, width]."""
    generator = torch.Generator().manual_seed(seed)
    grams = {}
    layers = {}
    for token in ar.TOKENS:
        layers[token] = torch.randn(num_layers, 12, 4, generator=generator)
        grams[token] = torch.stack([ar.gram_matrix(layer) for layer in layers[token]])
    return grams, layers


def test_cka_table_compares_each_layer_with_itself():
    before, x = random_grams(216, seed=0)
    after, y = random_grams(216, seed=1)
    table = ar.cka_table(before, after)
    assert len(table) == 3 * 216 and table.depth.between(0, 1).all()
    for token in ar.TOKENS:
        rows = table[table.token == token].set_index(["block", "layer"])
        assert rows.depth.is_monotonic_increasing
        norm = rows.loc[(3, "ln_2")]  # the fifth of nine layers
        assert norm.kind == "LayerNorm" and norm.depth == (3 * 9 + 4 + 0.5) / 216
        assert abs(norm.cka - cka_by_its_formula(x[token][31], y[token][31])) < 1e-9
        assert rows.loc[(23, "mlp.dropout")].kind == "other"
    assert (table.kind == "LayerNorm").sum() == 3 * 24 * 2


# ---------------------------------------------------------------------------------------------------------------
# Mutual information
# ---------------------------------------------------------------------------------------------------------------
def gaussians(dimensions, rho, count):
    """x and t [count, dimensions] with correlation rho per dimension, and their mutual information in nats."""
    generator = torch.Generator().manual_seed(2)
    x, noise = torch.randn(2, count, dimensions, generator=generator)
    return x, rho * x + (1 - rho**2) ** 0.5 * noise, -0.5 * dimensions * math.log(1 - rho**2)


def estimate(cases, **settings):
    analysis = ar.Analysis(**settings)
    x, t, truth = zip(*(gaussians(*case, 2 * analysis.mine_windows) for case in cases))
    held_out, training = ar.mine(torch.stack(x), torch.stack(t), analysis, seed=666)
    for case, *values in zip(cases, held_out, training, truth):
        numbers = "held out {:.2f}, training {:.2f}, truth {:.2f}".format(*values)
        print("dimension {}, correlation {}: {}".format(*case, numbers))
    return held_out, training, truth


def test_gaussians_have_the_information_of_the_closed_form():
    settings = {"mine_windows": 2000, "mine_batch_size": 50, "mine_passes": 5}
    held_out, training, truth = estimate([(5, 0), (5, 0.3), (5, 0.6)], **settings)
    assert abs(held_out[0]) < 0.05 and abs(held_out[1] - 0.24) < 0.07
    assert abs(held_out[2] - truth[2]) < 0.2 * truth[2] and truth[2] > 1
    assert training[2] < 1.1 * truth[2]  # it is a lower bound


def test_the_papers_settings_memorize():
    """Some of its passes find "information" in independent variables, and less than none held out."""
    settings = {"mine_windows": 100, "mine_batch_size": 50, "mine_passes": 80}
    held_out, training, truth = estimate([(10, 0)], standardize=False, **settings)
    assert training > 1 and held_out < -0.3 and truth == (0,)


SMALL = {"mine_windows": 90, "mine_batch_size": 40, "mine_passes": 3}  # 40, 40 and 10 windows


def plain_mine(x, t, seed, standardize):
    """One estimator as a textbook writes it; the moving average corrects the gradient of the logarithm."""
    torch.manual_seed(seed)
    layers = []
    for layer in ar.StatisticsNetworks(1, x.shape[1] + t.shape[1]).layers:
        linear = nn.Linear(layer.shape[1] - 1, layer.shape[2])
        linear.weight.data = layer[0, :-1].T.detach().clone()
        linear.bias.data = layer[0, -1].detach().clone()
        layers += [linear, nn.ReLU()]
    torch.manual_seed(seed)  # nn.Linear has drawn numbers, too
    ar.StatisticsNetworks(1, x.shape[1] + t.shape[1])
    network = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    average = None
    if standardize:
        x = (x - x[:90].mean(0)) / x[:90].std(0)
        t = (t - t[:90].mean(0)) / t[:90].std(0)
    for _ in range(3):
        order = torch.randperm(90)
        for batch in (order[:40], order[40:80], order[80:]):
            partners = batch[torch.randperm(len(batch))]
            joint = network(torch.cat([x[batch], t[batch]], 1))
            exponentials = network(torch.cat([x[partners], t[batch]], 1)).exp()
            mean = exponentials.mean().item()
            average = mean if average is None else 0.99 * average + 0.01 * mean
            optimizer.zero_grad()
            (exponentials.mean() / average - joint.mean()).backward()
            optimizer.step()
    values = []
    for first in (90, 0):
        windows = torch.arange(90) + first
        partners = torch.randperm(90) + first
        joint = network(torch.cat([x[windows], t[windows]], 1)).mean()
        marginal = network(torch.cat([x[partners], t[windows]], 1)).exp().mean().log()
        values.append((joint - marginal).item())
    return values


@pytest.mark.parametrize("standardize", [True, False])
def test_side_by_side_equals_a_plain_loop_of_one(standardize):
    analysis = ar.Analysis(**SMALL, standardize=standardize)
    x, t, _ = zip(*(gaussians(3, rho, 180) for rho in (0, 0.5, 0.9)))
    t = [3 * values + 1 for values in t]  # other units
    by_seed = []
    for seed in (5, 6):
        together = np.stack(ar.mine(torch.stack(x), torch.stack(t), analysis, seed), axis=1)
        plain = [plain_mine(*pair, seed, standardize) for pair in zip(x, t)]
        np.testing.assert_allclose(together, plain, rtol=1e-3, atol=1e-5)
        by_seed.append(together)
    assert np.abs(by_seed[0] - by_seed[1]).min() > 1e-5  # the seeds are different ones


def test_networks_start_as_nn_linear_does():
    torch.manual_seed(3)
    layers = ar.StatisticsNetworks(2, 300).layers
    linear = nn.Linear(300, 400)
    assert [tuple(layer.shape) for layer in layers] == [
        (2, 301, 400),
        (2, 401, 400),
        (2, 401, 400),
        (2, 401, 1),
    ]
    assert torch.equal(layers[1][0], layers[1][1])
    for ours, theirs in ((layers[0][1, :-1], linear.weight), (layers[0][1, -1], linear.bias)):
        assert abs(ours.std() / theirs.std() - 1) < 0.1
        assert ours.abs().max() < 300**-0.5 < ours.abs().max() * 1.05


def test_a_diverged_estimator_does_not_touch_the_others():
    x, t, _ = gaussians(2, 0.5, 180)
    analysis = ar.Analysis(**SMALL, standardize=False)  # raw units, so that they can be too large
    alone = ar.mine(x[None], t[None], analysis, seed=0)
    beside = ar.mine(torch.stack([x * 1e30, x]), torch.stack([t, t]), analysis, seed=0)
    assert not np.isfinite(beside[0][0])
    np.testing.assert_allclose([beside[0][1], beside[1][1]], np.ravel(alone), rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Whose information
# ---------------------------------------------------------------------------------------------------------------
def asked(num_blocks, num_steps, monkeypatch):
    """What MINE is asked about: {analysis: [(quantity, name of x, name of t)]}, and all that is said of it.

    Data and outputs are replaced by numbers that tell where they come from; a name is (block, token, step).
    """
    codes = torch.arange(3)[:, None] * 100 + torch.arange(num_steps)  # [tokens, K]
    data = codes[:, None, :, None].expand(-1, 8, -1, 1)  # [tokens, windows, K, 1]
    windows = ar.Windows(data[0], data[1], data[2], timesteps=None, valid=None)

    def outputs(model, windows, layers, steps):
        block, rest = layers[0].split(".", 1)
        assert rest == "mlp.dropout" and len(layers) == 1
        return {layers[0]: (data + 10_000 * (int(block) + 1)).permute(1, 2, 0, 3)[:, steps]}

    monkeypatch.setattr(ar, "activations", outputs)

    def name_of(value):
        block, rest = divmod(int(value), 10_000)
        token, step = divmod(rest, 100)
        return (None if block == 0 else block - 1, ar.TOKENS[token], step)

    model = SimpleNamespace(transformer=SimpleNamespace(h=range(num_blocks)))
    steps = list(range(num_steps))
    questions = [*ar.questions_about_data(windows, steps)]
    questions += ar.questions_about_model(model, windows, steps)
    pairs = {"data": [], "same step": [], "context": []}
    for about, x, t in questions:
        for a, b in zip(x, t, strict=True):
            pairs[about["part"]].append((about["quantity"], name_of(a[0]), name_of(b[0])))
    return pairs, [about for about, _, _ in questions]


@pytest.mark.parametrize("num_blocks,shown", [(12, {0, 6, 11}), (24, {0, 12, 23}), (1, {0})])
def test_what_mine_is_asked_about(num_blocks, shown, monkeypatch):
    pairs, abouts = asked(num_blocks, 20, monkeypatch)
    expected = []
    for step in range(20):
        expected.append(("I(s_t; a_t)", (None, "state", step), (None, "action", step)))
        expected.append(("I(R_t; a_t)", (None, "return", step), (None, "action", step)))
    assert sorted(pairs["data"], key=str) == sorted(expected, key=str)

    expected = []
    for block, step in itertools.product(range(num_blocks), range(20)):
        at_state = (block, "state", step)
        expected.append(("I(s_t; T(s_t))", (None, "state", step), at_state))
        expected.append(("I(a_t; T(s_t))", (None, "action", step), at_state))
    assert sorted(pairs["same step"], key=str) == sorted(expected, key=str)

    expected = []  # every token but a_K with T(s_K), and a_K with T of every token but a_K
    for block, step, token in itertools.product(shown, range(20), ar.TOKENS):
        if (token, step) != ("action", 19):
            expected.append(("I(x_t; T(s_K))", (None, token, step), (block, "state", 19)))
            expected.append(("I(a_K; T(x_t))", (None, "action", 19), (block, token, step)))
    assert sorted(pairs["context"], key=str) == sorted(expected, key=str)
    in_context = [about for about in abouts if about["part"] == "context"]
    assert {about["block"] for about in in_context} == shown and len(in_context) == 6 * len(shown)


def test_without_context_there_is_no_action_to_ask_about(monkeypatch):
    _, abouts = asked(4, 1, monkeypatch)
    assert {about["token"] for about in abouts if about["part"] == "context"} == {
        "return",
        "state",
    }


def test_answers_beside_a_control_with_shuffled_windows(monkeypatch):
    seen = []

    def spy(x, t, analysis, seed):
        seen.append((x, t))
        return np.arange(len(x)) + 0.5, np.arange(len(x)) + 100.0

    monkeypatch.setattr(ar, "mine", spy)
    x = torch.arange(240.0).reshape(3, 80, 1)
    t = -x
    questions = [
        ({"quantity": "I", "block": 2}, x, t),
        ({"quantity": "J", "block": 2}, x[:2], t[:2]),
    ]
    table = ar.answer(questions, [0, 8, 19], ar.Analysis(), seed=1)
    first = table[table.quantity == "I"]
    assert first.step.tolist() == [-19, -11, 0, 0] and (first.block == 2).all()
    assert first.shuffled.tolist() == [False, False, False, True]
    assert first.held_out.tolist() == [0.5, 1.5, 2.5, 3.5] and first.training.iloc[0] == 100
    assert table[table.quantity == "J"].step.tolist() == [-19, -11, -11]  # without a_K
    asked_x, asked_t = seen[0]
    assert torch.equal(asked_x[:3], x) and torch.equal(asked_t, torch.cat([t, t[-1:]]))
    # A control must not see in its held-out half what it was trained on.
    shuffled = asked_x[3]
    assert torch.equal(shuffled[:40].sort(0).values, x[2, :40])
    assert torch.equal(shuffled[40:].sort(0).values, x[2, 40:])
    assert (shuffled == x[2]).float().mean() < 0.2


def test_a_dependent_representation_is_told_from_its_control():
    """T knows s_K, in other units, and nothing else; the control sees other windows' s_K."""
    analysis = ar.Analysis(mine_windows=400, mine_batch_size=40, mine_passes=10)
    x, t = torch.randn(2, 2, 800, 4, generator=torch.Generator().manual_seed(0))
    t[1] = x[1] * 5
    table = ar.answer([({}, x, t)], [0, 19], analysis, seed=666)
    independent, dependent, control = table.held_out
    assert abs(independent) < 0.2 and dependent > 0.5 and abs(control) < 0.2


# ---------------------------------------------------------------------------------------------------------------
# Windows
# ---------------------------------------------------------------------------------------------------------------
def test_windows_are_whole_and_the_held_out_ones_from_other_episodes(monkeypatch):
    args = sample_args(ar)
    data = load_data(ar, args)
    seen = []
    windows = ar.OfflineData.windows
    monkeypatch.setattr(
        ar.OfflineData,
        "windows",
        lambda data, starts, K: seen.append(starts) or windows(data, starts, K),
    )
    chosen = ar.choose_windows(args, ar.Analysis(mine_windows=500), seed=1)
    assert [len(part.valid) for part in chosen] == [100, 1000]
    assert all(part.valid.all() for part in chosen)
    training, held_out = seen[1].split(500)
    ends = data.episode_ends.unique().tolist()
    assert {ends.index(end) % 2 for end in data.episode_ends[training].tolist()} == {0}
    assert {ends.index(end) % 2 for end in data.episode_ends[held_out].tolist()} == {1}
    assert len(seen[1].unique()) == 1000
    ar.choose_windows(args, ar.Analysis(mine_windows=500), seed=1)
    ar.choose_windows(args, ar.Analysis(mine_windows=500), seed=2)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[4])


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_windows_are_refused_with_numbers_that_work(count, monkeypatch):
    """One episode leaves nothing held out: only --mine-windows 0 works."""
    load_episodes = ar.load_episodes
    monkeypatch.setattr(ar, "load_episodes", lambda *args: load_episodes(*args)[:count])
    lengths = [
        len(e.rewards) for e in load_episodes(sample_args(ar), ar.make_env(sample_args(ar), 1))
    ]
    whole = [length - 19 for length in lengths[:count]]
    even, odd = sum(whole[::2]), sum(whole[1::2])
    with pytest.raises(SystemExit) as refused:
        ar.choose_windows(sample_args(ar), ar.Analysis(), seed=0)
    said = str(refused.value)
    assert f"--cka-windows can be at most {even + odd}, --mine-windows {min(even, odd)} " in said
    analysis = ar.Analysis(cka_windows=even + odd, mine_windows=min(even, odd))
    for_cka, for_mine = ar.choose_windows(sample_args(ar), analysis, seed=0)
    assert len(for_cka.valid) == even + odd and len(for_mine.valid) == 2 * min(even, odd)


# ---------------------------------------------------------------------------------------------------------------
# Figures: three seeds of one backbone side by side, one of them twice as deep
# ---------------------------------------------------------------------------------------------------------------
ANALYSIS = ar.Analysis(cka_threshold=0.23, cka_windows=12, mine_windows=40)
PAPERS = ar.replace(ANALYSIS, mine_estimate="training")
SEEDS = ["gpt2, seed 1", "gpt2, seed 2", "gpt2, seed 3"]
BLOCKS = dict(zip(SEEDS, (12, 24, 12)))
COLORS = dict(zip(SEEDS, sns.color_palette("colorblind", 3)))


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folders = []
    for seed in (1, 2, 3):
        folders.append(tmp_path_factory.getbasetemp() / "runs" / f"seed{seed}" / "gpt2")
        folders[-1].mkdir(parents=True)
        settings = {"env": "Hopper-v4", "dataset": "made up", "backbone": "gpt2", "K": 20}
        settings |= {"return_scale": 1000.0, "head_std": None, "max_grad_norm": 0.25}
        settings |= {"seed": seed, "epoch": [0, 40]}
        pd.DataFrame(settings).to_csv(folders[-1] / "log.csv")
    return ar.read_logs(folders)


def drawn(axes, color):
    """The points of the lines of one color, as sorted tuples."""
    points = []
    for line in axes.get_lines():
        # error bars bring a line that is not drawn
        if line.get_color() == color and line.get_linestyle() != "None":
            points += [tuple(point) for point in line.get_xydata() if not np.isnan(point[1])]
    return sorted(points)


def assert_drawn(axes, table, x, y):
    """What is drawn for each run is what stands in its rows."""
    for label, color in COLORS.items():
        rows = table[table.label == label]
        expected = sorted(zip(rows[x].astype(float), rows[y].astype(float)))
        np.testing.assert_allclose(drawn(axes, color), expected)


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def cka_of_seeds():
    """A table as the experiment makes it, and the Gram matrices."""
    grams = {}
    tables = []
    for i, label in enumerate(SEEDS):
        before, _ = random_grams(9 * BLOCKS[label], seed=2 * i)
        after, _ = random_grams(9 * BLOCKS[label], seed=2 * i + 1)
        grams[f"{label}, epoch 0"] = before
        grams[f"{label}, epoch 40"] = after
        tables.append(ar.cka_table(before, after).assign(label=label))
    return pd.concat(tables, ignore_index=True), grams


def test_figure_of_cka_before_and_after(log):
    cka, _ = cka_of_seeds()
    assert log.label.unique().tolist() == SEEDS
    figure = ar.plot_cka(cka, ANALYSIS, ar.describe(log))
    assert legend_of(figure) == ["label", *SEEDS, "kind", "LayerNorm", "other"]
    for axes, token in zip(figure.axes, ar.TOKENS, strict=True):
        assert axes.get_title() == f"{token} token of the last step"
        assert_drawn(axes, cka[cka.token == token], "depth", "cka")
        norms = [len(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "D"]
        assert [length for length in norms if length > 0] == [24, 48, 24]  # 0: of the legend
        dotted = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
        assert len(dotted) == 1 and set(dotted[0].get_ydata()) == {0.23}
    for words in ("Hopper-v4", "made up", "gpt2", "K 20", "seed 1, 2, 3", "12 windows"):
        assert words in figure.get_suptitle()


def test_heat_maps_of_pairs(log):
    _, grams = cka_of_seeds()
    pairs = [(name, name) for name in grams]
    pairs += [("gpt2, seed 1, epoch 40", "gpt2, seed 2, epoch 40")]
    figure = ar.plot_heat_maps(grams, pairs, "state", ANALYSIS, ar.describe(log))
    panels = [axes for axes in figure.axes if axes.get_xlabel()]
    for axes, (a, b) in zip(panels, pairs, strict=True):
        assert (axes.get_ylabel(), axes.get_xlabel()) == (f"layer of {a}", f"layer of {b}")
        image = axes.get_images()[0]
        np.testing.assert_allclose(image.get_array(), grams[a]["state"] @ grams[b]["state"].T)
        # The first layer of the first model is at the bottom left.
        assert image.origin == "lower" and image.get_clim() == (0, 1)


def information_of_seeds():
    """A table as the experiment makes it, with numbers by chance."""
    rng = np.random.default_rng(0)

    def made_up(x, t, analysis, seed):
        return rng.random(len(x)), rng.random(len(x))

    x = torch.zeros(3, 8, 1)
    about = {"part": "data", "token": "state", "quantity": "I(s_t; a_t)"}
    questions = {"data": [(about, x, x)]}
    for label, num_blocks in BLOCKS.items():
        asked = []
        for block in range(num_blocks):
            about = {"part": "same step", "token": "state", "block": block}
            about["depth"] = (block + 0.5) / num_blocks
            asked.append(({**about, "quantity": "I(s_t; T(s_t))"}, x, x))
            asked.append(({**about, "quantity": "I(a_t; T(s_t))"}, x, x))
            places = {0: "shallow", num_blocks // 2: "middle", num_blocks - 1: "deep"}
            if block not in places:
                continue
            for token, quantity in itertools.product(
                ar.TOKENS, ("I(x_t; T(s_K))", "I(a_K; T(x_t))")
            ):
                about = {
                    "part": "context",
                    "token": token,
                    "block": block,
                    "place": places[block],
                    "quantity": quantity,
                }
                count = 2 if token == "action" else 3
                asked.append((about, x[:count], x[:count]))
        questions[label] = asked
    tables = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ar, "mine", made_up)
        for label, asked in questions.items():
            tables.append(ar.answer(asked, [0, 9, 19], ANALYSIS, seed=0).assign(label=label))
    return pd.concat(tables, ignore_index=True)


def test_figure_of_information_with_context(log):
    information = information_of_seeds()
    context = information[information.part == "context"]
    figure = ar.plot_information(
        information, "context", "step", ANALYSIS, ar.describe(log), row="quantity", col="place"
    )
    assert set(legend_of(figure)) == {"label", *SEEDS, "token", *ar.TOKENS, "shuffled"}
    quantities = ("I(x_t; T(s_K))", "I(a_K; T(x_t))")
    blocks = {"shallow": 0, "middle": context.label.map(BLOCKS) // 2}  # 6 of 12, 12 of 24
    blocks["deep"] = context.label.map(BLOCKS) - 1
    panels = itertools.product(quantities, blocks)
    for axes, (quantity, place) in zip(figure.axes, panels, strict=True):
        assert axes.get_title() == f"{quantity} | {place}"
        shown = (context.block == blocks[place]) & (context.quantity == quantity)
        assert shown.sum() == 3 * (3 + 3 + 2 + 3)  # seeds, steps of three tokens, and shuffled
        rows = context[shown & ~context.shuffled]
        means = context[shown & context.shuffled].groupby(["label", "step"]).held_out.mean()
        assert_drawn(axes, pd.concat([rows, means.reset_index()]), "step", "held_out")
    assert figure.axes[0].get_ylabel() == "information, nats"
    for words in ("seed 1, 2, 3", "MINE: 40 windows, 20 passes, held-out"):
        assert words in figure.get_suptitle()


def test_figure_of_information_of_the_same_step(log):
    information = information_of_seeds()
    same_step = information[information.part == "same step"]
    figure = ar.plot_information(
        information, "same step", "depth", PAPERS, ar.describe(log), col="quantity"
    )
    assert legend_of(figure) == ["label", *SEEDS, "token", "state", "shuffled"]
    assert "40 windows, 20 passes, training" in figure.get_suptitle()
    for axes, quantity in zip(figure.axes, ("I(s_t; T(s_t))", "I(a_t; T(s_t))"), strict=True):
        assert axes.get_title() == quantity
        rows = same_step[same_step.quantity == quantity]
        means = rows.groupby(["label", "block", "shuffled"]).training.mean().reset_index()
        means["depth"] = (means.block + 0.5) / means.label.map(BLOCKS)
        assert_drawn(axes, means, "depth", "training")
        # A bar around each mean, one deviation to either side; the controls have none.
        heights = []
        for bars in axes.collections:
            if tuple(bars.get_color()[0][:3]) == COLORS[SEEDS[1]]:
                heights += [np.ptp(bar[:, 1]) for bar in bars.get_segments() if len(bar)]
        of_seed = rows[(rows.label == SEEDS[1]) & ~rows.shuffled]
        deviations = of_seed.groupby("block").training.std()
        np.testing.assert_allclose([height for height in heights if height > 0], 2 * deviations)


def test_figure_of_information_in_the_data(log):
    information = information_of_seeds()
    data = information[information.part == "data"]
    figure = ar.plot_information(
        information, "data", "step", PAPERS, ar.describe(log), col="quantity"
    )
    (axes,) = figure.axes
    points = drawn(axes, sns.color_palette("colorblind", 1)[0])
    np.testing.assert_allclose(points, sorted(zip(data.step, data.training)))
    assert legend_of(figure) == ["label", "data", "token", "state", "shuffled"]


# ---------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------
FIGURES = ["cka_before_after", "cka_heat_maps_action", "cka_heat_maps_return"]
FIGURES += ["cka_heat_maps_state", "information_in_data", "information_of_same_step"]
FIGURES += ["information_with_context"]


def test_train_and_analyze(run_script, tmp_path, monkeypatch, figures_as_dots):
    """Two checkpoints whose folders have the same last name, and one that is named twice."""
    for name in ("a", "b"):
        shutil.copytree(ASSETS / "text-gpt2", tmp_path / name / "checkpoint-500")
    backbones = ["--backbones", "a/checkpoint-500", "b/checkpoint-500", "a/checkpoint-500"]
    fast = ["--learning-rate", "0.02", "--warmup-steps", "0", "--seed", "5"]
    fast += ["--save-epochs", "1"]  # epoch 0 is kept all the same
    result = run_script(SCRIPT, *SIZE, *fast, *backbones, "--run-name", "study")
    assert result.status == 0, result.err
    assert result.out.count("epoch 1: return") == 2
    folder = tmp_path / "runs" / "study"
    runs = ["study/a_checkpoint-500", "study/b_checkpoint-500"]
    cka = pd.read_csv(folder / "cka.csv")
    assert cka.run.unique().tolist() == runs and len(cka) == 2 * 3 * 36
    labels = [f"{name}/checkpoint-500" for name in "ab"]
    assert cka.label.unique().tolist() == labels
    information = pd.read_csv(folder / "information.csv")
    assert information.run.unique().tolist() == ["data", *runs]
    columns = "run label part block depth place token quantity step shuffled held_out training"
    assert set(information.columns) == set(columns.split())
    assert set(information.step) == {-2, 0}
    assert sorted(path.stem for path in folder.glob("*.png")) == FIGURES

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert sorted(EventAccumulator(str(folder)).Reload().Tags()["images"]) == FIGURES

    # The closing tables are means of what is in the files.
    means = cka.groupby(["label", "token", "kind"]).cka.mean()
    above = (cka.cka > 0.23).groupby([cka.label, cka.token, cka.kind]).mean()
    row = (labels[0], "return")
    words = [line.split() for line in result.out.splitlines()]
    expected = [
        means[*row, "LayerNorm"],
        means[*row, "other"],
        above[*row, "LayerNorm"],
        above[*row, "other"],
    ]
    first = [*labels[0].split(), "return"]
    shown = next(line[len(first) :] for line in words if line[: len(first)] == first)
    np.testing.assert_allclose([float(value) for value in shown], expected, atol=6e-4)
    of_data = information[(information.part == "data") & ~information.shuffled]
    mean = of_data[of_data.quantity == "I(R_t; a_t)"].held_out.mean()
    assert any(line[:3] == ["I(R_t;", "a_t)", f"{mean:.3f}"] for line in words)

    # Held against the formula, from the checkpoints: the same windows before and after.
    models = [ar.load_model(folder / "a_checkpoint-500" / f"epoch_{e}.pt", "cpu") for e in (0, 1)]
    analysis = ar.Analysis(cka_windows=20, mine_windows=40, mine_batch_size=20, mine_passes=1)
    windows, mine_windows = ar.choose_windows(models[1][1], analysis, seed=5)
    x, y = (
        ar.activations(model, windows, ["2.ln_2"], [2])["2.ln_2"][:, 0, 1] for model, _ in models
    )
    row = (
        (cka.label == labels[0]) & (cka.token == "state") & (cka.block == 2) & (cka.layer == "ln_2")
    )
    assert (
        abs(cka[row].cka.item() - cka_by_its_formula(x, y)) < 1e-6 and cka[row].cka.item() < 0.999
    )

    # Mutual information is asked of the model after fine-tuning.
    questions = ar.questions_about_model(models[1][0], mine_windows, [0, 2])
    asked = ar.answer(itertools.islice(questions, 1), [0, 2], analysis, seed=5)
    of_run = information[(information.run == runs[0]) & (information.block == 0)]
    np.testing.assert_allclose(of_run.held_out[:3], asked.held_out, atol=1e-6)

    # Its checkpoints again, by the other door, with whatever K is given: the same numbers.
    finished = ["--sample", "--cka-windows", "20", "--seed", "5", "--mine-windows", "0"]
    finished += ["--runs", *(f"runs/{run}" for run in runs)]
    assert run_script(SCRIPT, *finished, "--run-name", "again").status == 0
    again = tmp_path / "runs" / "again"
    pd.testing.assert_frame_equal(pd.read_csv(again / "cka.csv"), cka, rtol=1e-9)
    assert not (again / "information.csv").exists()

    # Under torchrun only the first process goes past training.
    monkeypatch.setenv("RANK", "1")
    assert run_script(SCRIPT, *finished, "--run-name", "second").status == 0
    assert not (tmp_path / "runs" / "second").exists()
    monkeypatch.delenv("RANK")

    # An epoch that was not kept.
    (folder / "a_checkpoint-500" / "epoch_0.pt").unlink()
    assert_one_sentence(run_script(SCRIPT, *finished), "a_checkpoint-500/epoch_0.pt")


def test_without_context_at_the_papers_settings(run_script, tmp_path, figures_as_dots):
    size = [*SIZE, "--backbones", "random", "--context-length", "1"]
    size += ["--no-standardize", "--mine-estimate", "training"]
    result = run_script(SCRIPT, *size, "--run-name", "a")
    assert result.status == 0, result.err
    folder = tmp_path / "runs" / "a"
    assert set(pd.read_csv(folder / "cka.csv").label) == {"random"}
    information = pd.read_csv(folder / "information.csv")
    assert set(information.step) == {0}
    assert set(information.label) == {"data", "random"}
    assert (folder / "information_with_context.png").exists()


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--backbones", "/nowhere"], ["nowhere"]),
        (["--backbone", "gpt2"], ["--backbones"]),
        (["--backbone=gpt2"], ["--backbones"]),
        (["--runs", "nowhere"], ["nowhere"]),
        (["--mine-windows", "100000"], ["--mine-windows"]),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, said, run_script, tmp_path):
    assert_one_sentence(run_script(SCRIPT, *SIZE, *arguments), *said)
    assert not (tmp_path / "runs").exists()  # before any training


def test_runs_that_saw_other_data_are_refused(run_script, tmp_path, log):
    for name, scale in (("a", 1000.0), ("b", 1.0)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        changed = log[log.seed == 1].drop(columns=["run", "label"])
        changed = changed.assign(K=20 if name == "a" else 1, return_scale=scale)
        changed.to_csv(tmp_path / "runs" / name / "log.csv")
    result = run_script(SCRIPT, "--sample", "--runs", "runs/a", "runs/b")
    assert_one_sentence(result, "differ in K, return_scale,", "the same windows")
