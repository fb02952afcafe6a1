"""`analyze_repr.py` against closed forms, formulas written out, transformers' hooks, plain loops, and whole runs."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import TINY, assert_one_sentence, load_data, make_model, sample_args
from test_model import reference_backbone

import analyze_repr as ar

SCRIPT = "analyze_repr.py"
SIZE = [*TINY, "--num-epochs", "1", "--context-length", "5"]
SIZE += ["--mine-windows", "40", "--mine-batch-size", "20", "--mine-passes", "2"]


def model_and_data(backbone="gpt2"):
    return make_model(ar, backbone), load_data(ar, sample_args(ar))


# ---------------------------------------------------------------------------------------------------------------
# CKA
# ---------------------------------------------------------------------------------------------------------------
def cka_of(x, y):
    return ar.cka(ar.gram_matrices([x]), ar.gram_matrices([y])).item()


def hsic_by_its_formula(K, L):
    """The unbiased estimator as Song et al. 2012 (equation 5) and Kornblith et al.'s debiased CKA define it."""
    n = len(K)
    K, L, one = (
        K - torch.diag(K.diagonal()),
        L - torch.diag(L.diagonal()),
        torch.ones(n, dtype=torch.float64),
    )
    total = (
        torch.trace(K @ L)
        + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ K @ L @ one)
    )
    return total / (n * (n - 3))


def cka_by_its_formula(x, y):
    K, L = (v.double() @ v.double().T for v in (x, y))
    return (
        hsic_by_its_formula(K, L) / (hsic_by_its_formula(K, K) * hsic_by_its_formula(L, L)).sqrt()
    ).item()


def test_cka_is_blind_to_rotation_scale_and_translation():
    x = torch.randn(100, 40, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    assert abs(cka_of(x, 3.7 * x @ rotation + torch.randn(40)) - 1) < 1e-9
    assert cka_of(x, x * torch.linspace(0.1, 5, 40)) < 0.95  # but not to a scale per feature


def test_cka_of_independent_features_is_near_zero_and_the_biased_one_is_not():
    debiased, biased = [], []
    for _ in range(10):
        x, y = torch.randn(100, 200), torch.randn(100, 200)
        debiased.append(cka_of(x, y))
        x, y = x - x.mean(0), y - y.mean(0)
        biased.append(((x.T @ y).square().sum() / (x.T @ x).norm() / (y.T @ y).norm()).item())
    assert abs(np.mean(debiased)) < 0.02 and max(map(abs, debiased)) < 0.05 < 0.5 < np.mean(biased)


def test_all_layers_at_once_equal_the_formula_pair_by_pair():
    common = torch.randn(50, 10)
    layers = [
        torch.randn(50, width) + common @ torch.randn(10, width) * i
        for i, width in enumerate((5, 20, 80, 30))
    ]
    grams = ar.gram_matrices(layers)
    matrix = ar.cka(grams, grams)
    expected = [[cka_by_its_formula(x, y) for y in layers] for x in layers]
    np.testing.assert_allclose(matrix, expected, rtol=1e-9, atol=1e-9)
    assert np.array_equal(matrix, matrix.T) and matrix[2, 3] > 0.5
    x, y = (
        layers[1],
        layers[2],
    )  # and a U-statistic it is: an average over all quadruples of different windows
    n, K, L = 8, (x[:8] @ x[:8].T).double(), (y[:8] @ y[:8].T).double()
    terms = [
        K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
        for i, j, q, r in itertools.permutations(range(n), 4)
    ]
    assert abs(torch.stack(terms).mean() / hsic_by_its_formula(K, L) - 1) < 1e-9


def test_a_constant_layer_has_no_cka():
    assert math.isnan(cka_of(torch.full((20, 3), 0.1), torch.randn(20, 3)))


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["gpt2", "igpt"])
def test_activations_are_those_of_transformers(backbone):
    """The same weights in transformers' own model, with forward hooks of our own, on the same embedded tokens."""
    model, data = model_and_data(backbone)
    windows = data.windows(torch.arange(7) * 11, 5)
    names, positions = ar.layer_names(4), [14, 3, 13]
    ours = ar.activations(model, windows, names, positions, chunk_size=3)
    reference = reference_backbone(backbone, fresh=False)
    theirs = {}
    for name in names:
        reference.h.get_submodule(name).register_forward_hook(
            lambda module, x, y, name=name: theirs.update({name: y})
        )
    reference(inputs_embeds=model.embed(*windows[:4]), use_cache=False)
    assert list(ours) == names and len(names) == 36
    for name in names:
        expected = theirs[name][:, positions].transpose(0, 1)
        assert ours[name].shape == (3, 7, expected.shape[-1])
        torch.testing.assert_close(
            ours[name], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
        )
    assert ours["2.mlp.c_fc"].shape[-1] == 512 and not model.transformer.h[0].ln_1._forward_hooks


def test_align_depth():
    of_24 = np.arange(24 * 9.0)
    pairs = of_24.reshape(12, 2, 9).mean(axis=1).flatten()
    np.testing.assert_allclose(ar.align_depth(of_24, 12), pairs)
    np.testing.assert_allclose(ar.align_depth(of_24[:108], 12), of_24[:108])
    thirds = ar.align_depth(
        np.repeat([0.0, 1.0, 5.0], 9), 2
    )  # the middle block lies half in either
    np.testing.assert_allclose(thirds, np.repeat([1 / 3, 11 / 3], 9))


# ---------------------------------------------------------------------------------------------------------------
# Mutual information
# ---------------------------------------------------------------------------------------------------------------
def gaussians(dimensions, rho, count):
    """x and t [count, dimensions] with correlation rho per dimension, and their mutual information in nats."""
    generator = torch.Generator().manual_seed(2)
    x, noise = torch.randn(2, count, dimensions, generator=generator)
    return x, rho * x + (1 - rho**2) ** 0.5 * noise, -0.5 * dimensions * math.log(1 - rho**2)


CPU = torch.device("cpu")


def estimate(cases, **settings):
    args = ar.Args(**settings)
    x, t, truth = zip(*(gaussians(*case, 2 * args.mine_windows) for case in cases))
    held_out, training = ar.mine(torch.stack(x), torch.stack(t), args, CPU)
    return held_out.numpy(), training.numpy(), truth


@pytest.mark.parametrize("dimensions,rhos", [(1, (0, 0.9)), (10, (0, 0.6))])
def test_gaussians_have_the_information_of_the_closed_form(dimensions, rhos):
    held_out, training, truth = estimate([(dimensions, rho) for rho in rhos])
    for rho, *values in zip(rhos, held_out, training, truth):
        numbers = "held out {:.2f}, training {:.2f}, truth {:.2f}".format(*values)
        print(f"dimension {dimensions}, correlation {rho}: {numbers}")
    assert (
        all(abs(a - b) < max(0.1, 0.15 * b) for a, b in zip(held_out, truth))
        and abs(held_out[0]) < 0.1
    )


def test_the_papers_settings_memorize():
    """A fifth of their passes finds "information" in independent variables, and less than none held out."""
    settings = dict(mine_windows=100, mine_batch_size=50, mine_passes=200, mine_paper_settings=True)
    held_out, training, truth = estimate([(10, rho) for rho in (0, 0.6)], **settings)
    print(
        f"paper's settings: training {training.round(2)}, held out {held_out.round(2)}, truth {np.round(truth, 2)}"
    )
    assert training.min() > 2 and held_out[0] < -1 and truth[0] == 0


SMALL = dict(mine_windows=90, mine_batch_size=40, mine_passes=3)


def plain_mine(x, t, seed):
    """One estimator as a textbook writes it; the moving average corrects the gradient of the logarithm."""
    generator = torch.Generator().manual_seed(seed)
    start = ar.StatisticsNetworks(1, x.shape[1] + t.shape[1], generator)
    network = nn.Sequential(
        *(layer for w in start.weights for layer in (nn.Linear(*w.shape[1:]), nn.ReLU()))
    )[:-1]
    for layer, weight, bias in zip(network[::2], start.weights, start.biases):
        layer.weight.data, layer.bias.data = (
            weight[0].T.detach().clone(),
            bias[0, 0].detach().clone(),
        )
    optimizer, average = torch.optim.Adam(network.parameters(), 1e-4), None
    half, n = SMALL["mine_windows"], SMALL["mine_batch_size"]
    x, t = ((v - v[:half].mean(0)) / v[:half].std(0) for v in (x, t))
    for _ in range(SMALL["mine_passes"]):
        order = torch.randperm(half, generator=generator)
        for batch in (order[:n], order[n : 2 * n]):
            partners = batch[torch.randperm(n, generator=generator)]
            joint = network(torch.cat([x[batch], t[batch]], 1))
            exponentials = network(torch.cat([x[partners], t[batch]], 1)).exp()
            mean = exponentials.mean().item()
            average = mean if average is None else 0.99 * average + 0.01 * mean
            optimizer.zero_grad()
            (exponentials.mean() / average - joint.mean()).backward()
            optimizer.step()
    values = []
    for first in (half, 0):
        windows = torch.arange(half) + first
        partners = torch.randperm(half, generator=generator) + first
        joint = network(torch.cat([x[windows], t[windows]], 1)).mean()
        values.append(
            (joint - network(torch.cat([x[partners], t[windows]], 1)).exp().mean().log()).item()
        )
    return values


def test_side_by_side_equals_one_at_a_time_and_a_plain_loop():
    x, t, _ = zip(*(gaussians(3, rho, 180) for rho in (0, 0.5, 0.9)))
    pairs = [(x[0], t[0]), (x[1], t[1]), (x[2], t[2]), (x[0], t[2])]
    by_seed = []
    for seed in (5, 6):
        args = ar.Args(seed=seed, **SMALL)
        together = torch.stack(ar.mine(*map(torch.stack, zip(*pairs)), args, CPU))  # [2, pairs]
        alone = [torch.cat(ar.mine(a[None], b[None], args, CPU)) for a, b in pairs]
        plain = [plain_mine(a, b, seed) for a, b in pairs]
        np.testing.assert_allclose(together.T, torch.stack(alone), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(together.T, plain, rtol=1e-3, atol=1e-5)
        by_seed.append(together)
    assert (by_seed[0] - by_seed[1]).abs().min() > 1e-5  # the seeds are different ones


def test_networks_start_as_nn_linear_does():
    networks, linear = (
        ar.StatisticsNetworks(2, 300, torch.Generator().manual_seed(3)),
        nn.Linear(300, 400),
    )
    assert [tuple(w.shape[1:]) for w in networks.weights] == [
        (300, 400),
        (400, 400),
        (400, 400),
        (400, 1),
    ]
    assert torch.equal(networks.weights[1][0], networks.weights[1][1])
    for ours, theirs in (
        (networks.weights[0][1], linear.weight),
        (networks.biases[0], linear.bias),
    ):
        assert (
            abs(ours.std() / theirs.std() - 1) < 0.1
            and ours.abs().max() < 300**-0.5 < ours.abs().max() * 1.05
        )


def test_a_diverged_estimator_is_missing_and_the_others_are_not():
    x, t, _ = zip(*(gaussians(2, 0.5, 180) for _ in range(3)))
    x = torch.stack([x[0], x[1] * 1e30, x[2]])
    args = ar.Args(mine_paper_settings=True, **SMALL)  # raw units, so that they can be too large
    held_out, training = ar.mine(x, torch.stack(t), args, CPU)
    assert held_out[1].isnan() and held_out[[0, 2]].isfinite().all() and training[0].isfinite()


# ---------------------------------------------------------------------------------------------------------------
# Whose information
# ---------------------------------------------------------------------------------------------------------------
def asked_by(function, monkeypatch, num_blocks, num_steps):
    """What a function asks MINE about: [(of, block, token, number of steps, x name, t name)].

    The model's outputs and the data are replaced by numbers that tell where they come from.
    """
    data = {name: 100.0 * (i + 1) for i, name in enumerate(ar.TOKENS)}
    windows = SimpleNamespace()
    monkeypatch.setattr(
        ar,
        "data_variables",
        lambda windows, steps: {
            name: (value + torch.tensor(steps))[:, None, None].expand(-1, 8, 1)
            for name, value in data.items()
        },
    )
    monkeypatch.setattr(
        ar,
        "block_output",
        lambda model, windows, block, steps: {
            name: (10_000.0 * (block + 1) + value + torch.tensor(steps))[:, None, None].expand(
                -1, 8, 1
            )
            for name, value in data.items()
        },
    )

    def name_of(value):
        value = int(value)
        block, rest = divmod(value, 10_000)
        token, step = divmod(rest, 100)
        return (None if block == 0 else block - 1, ar.TOKENS[token - 1], step)

    asked = []

    def spy(x, t, args, device):
        asked.append([(name_of(a[0, 0]), name_of(b[0, 0])) for a, b in zip(x, t)])
        return torch.zeros(len(x)), torch.zeros(len(x))

    monkeypatch.setattr(ar, "mine", spy)
    model = SimpleNamespace(transformer=SimpleNamespace(h=range(num_blocks)))
    steps = list(range(num_steps))
    arguments = [windows, steps, ar.Args(), CPU]
    if function is not ar.information_in_data:
        arguments.insert(0, model)
    rows = function(*arguments)
    return rows, [pair for batch in asked for pair in batch]


@pytest.mark.parametrize("num_blocks,shown", [(12, {0, 6, 11}), (24, {0, 12, 23}), (1, {0})])
def test_questions_with_context(num_blocks, shown, monkeypatch):
    """Fig. 2: every token but a_K with T(s_K), and a_K with T of every token but a_K."""
    rows, asked = asked_by(ar.information_with_context, monkeypatch, num_blocks, 20)
    expected = []
    for block in shown:
        for step in range(20):
            for token in ar.TOKENS:
                if (token, step) != ("action", 19):
                    expected.append(((None, token, step), (block, "state", 19)))
                    expected.append(((None, "action", 19), (block, token, step)))
        expected.append(((None, "state", 19), (block, "state", 19)))  # the controls
        expected.append(((None, "action", 19), (block, "state", 19)))
    assert sorted(asked, key=str) == sorted(expected, key=str)
    assert {row["block"] for row in rows} == shown and len(rows) == len(asked)
    assert sum(row["control"] for row in rows) == 2 * len(shown)


def test_questions_about_the_same_step_and_about_the_data(monkeypatch):
    rows, asked = asked_by(ar.information_of_same_step, monkeypatch, 4, 20)
    expected = []
    for block in range(4):
        for step in [*range(20), 19]:  # and the control at the last
            expected.append(((None, "state", step), (block, "state", step)))
            expected.append(((None, "action", step), (block, "state", step)))
    assert sorted(asked, key=str) == sorted(expected, key=str) and len(rows) == len(asked)
    rows, asked = asked_by(ar.information_in_data, monkeypatch, 4, 20)
    expected = []
    for step in [*range(20), 19]:
        expected.append(((None, "state", step), (None, "action", step)))
        expected.append(((None, "return", step), (None, "action", step)))
    assert sorted(asked, key=str) == sorted(expected, key=str) and len(rows) == len(asked)


def test_without_context_there_is_no_action_to_ask_about(monkeypatch):
    rows, _ = asked_by(ar.information_with_context, monkeypatch, 4, 1)
    assert {row["token"] for row in rows} == {"return", "state"}


def test_a_dependent_representation_is_told_from_its_control():
    """T knows s_K, in other units, and nothing else; the control sees other windows' s_K."""
    generator = torch.Generator().manual_seed(0)
    args = ar.Args(mine_windows=400, mine_batch_size=40)
    x = torch.randn(2, 800, 4, generator=generator)
    t = torch.randn(2, 800, 6, generator=generator)
    t[1, :, :4] = x[1] * 5
    about = {"of": "I(X;T)"}
    rows = ar.estimate(about, x, t, args, CPU) + ar.estimate_control(about, x, t, args, CPU)
    assert all(row["of"] == "I(X;T)" for row in rows)
    assert [row["control"] for row in rows] == [False, False, True]
    assert abs(rows[0]["held_out"]) < 0.2 and rows[1]["held_out"] > 1
    assert abs(rows[2]["held_out"]) < 0.2


def test_data_is_shuffled_within_the_halves(monkeypatch):
    """A control must not see in its held-out half what it was trained on."""
    seen = []
    monkeypatch.setattr(ar, "mine", lambda x, t, *rest: seen.append(x) or (torch.zeros(1),) * 2)
    x = torch.arange(80.0)[None, :, None]
    ar.estimate_control({}, x, x, ar.Args(), CPU)
    shuffled = seen[0][0]
    assert torch.equal(shuffled[:40].sort(0).values, x[0, :40])
    assert torch.equal(shuffled[40:].sort(0).values, x[0, 40:])
    assert (shuffled == x[0]).float().mean() < 0.2


def test_windows_are_whole_and_the_held_out_ones_from_other_episodes(capsys):
    _, data = model_and_data("random")
    seen, windows = [], data.windows
    data.windows = lambda starts, K: seen.append(starts) or windows(starts, K)
    args = ar.Args(cka_windows=100, mine_windows=500)
    chosen = ar.choose_windows(data, 20, args)
    assert all(part.valid.all() for part in chosen)
    assert [len(starts) for starts in seen] == [100, 1000]
    training, held_out = seen[1].split(500)
    episodes = [{*data.episode_ends[starts].tolist()} for starts in (training, held_out)]
    assert not episodes[0] & episodes[1]
    assert len(torch.cat([training, held_out]).unique()) == 1000
    with pytest.raises(SystemExit):
        ar.choose_windows(data, 20, ar.Args(mine_windows=15_000))
    assert "whole windows" in capsys.readouterr().err


@torch.no_grad()
def test_representations_are_block_outputs_at_their_tokens():
    model, data = model_and_data("gpt2")
    windows = data.windows(torch.arange(6), 3)
    x = model.embed(*windows[:4])
    for block, module in enumerate(model.transformer.h):
        middle = x + module.attn(module.ln_1(x))
        output = module.mlp(module.ln_2(middle))
        x = middle + output
        ours = ar.block_output(model, windows, block, [0, 2])
        for i, token in enumerate(ar.TOKENS):
            expected = torch.stack([output[:, i], output[:, 6 + i]])
            torch.testing.assert_close(ours[token], expected, rtol=1e-4, atol=1e-4)
    variables = ar.data_variables(windows, [0, 2])
    assert torch.equal(variables["return"][1], windows.returns_to_go[:, 2])
    assert torch.equal(variables["state"][0], windows.states[:, 0])
    assert torch.equal(variables["action"][1], windows.actions[:, 2])


def test_heat_maps_have_the_first_model_in_rows():
    args = {"env": "Hopper-v4", "context_length": 20, "seed": 1, "sample": False}
    runs = [ar.Run(Path("runs") / name, args, [], []) for name in "ab"]
    # The second layer of a is the first of b.
    grams = [{"state": torch.eye(4)[:2]}, {"state": torch.eye(4)[1:]}]
    figure = ar.plot_heat_maps(runs, grams, grams, "state")
    panels = [axes for axes in figure.axes if axes.get_images()]
    labels = [(axes.get_ylabel(), axes.get_xlabel()) for axes in panels[:5]]
    a, b = ("layer, a, seed 1", "layer, b, seed 1")
    assert labels == [(a, a), (b, b), (a, a), (b, b), (a, b)]
    image = panels[4].get_images()[0].get_array()
    np.testing.assert_array_equal(image, [[0, 0, 0], [1, 0, 0]])


# ---------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------
FIGURES = ["cka_before_after", "cka_heat_maps_return", "cka_heat_maps_state"]
FIGURES += ["cka_heat_maps_action", "information_with_context", "information_of_same_step"]
FIGURES += ["information_in_data"]


def test_train_and_analyze(run_script, tmp_path):
    result = run_script(SCRIPT, *SIZE, "--backbones", "random", "igpt", "--run-name", "a")
    assert result.status == 0, result.err
    folder = tmp_path / "runs" / "a"
    results = json.loads((folder / "results.json").read_text())
    runs = ("runs/a/random", "runs/a/igpt")
    expected = [*itertools.product(runs, ar.TOKENS)]
    assert [(row["run"], row["token"]) for row in results["cka"]] == expected
    for row in results["cka"]:
        assert len(row["layers"]) == 36
        assert row["layers_above"] == sum(value > 0.8 for value in row["layers"].values())
    assert {row["run"] for row in results["mutual_information"]} == {"data", *runs}
    assert all((folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in FIGURES)
    assert "LayerNorms" in result.out and "I(Y;T)" in result.out

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert set(EventAccumulator(str(folder)).Reload().Tags()["images"]) == set(FIGURES)

    # Its checkpoints again, by the other door: the same windows give the same numbers.
    finished = ["--runs", *runs, "--mine-windows", "0", "--run-name", "b"]
    assert run_script(SCRIPT, *SIZE, *finished).status == 0
    again = json.loads((tmp_path / "runs" / "b" / "results.json").read_text())
    assert again["cka"] == results["cka"] and not again["mutual_information"]


def test_before_and_after_are_compared_at_the_right_tokens(run_script, tmp_path):
    run = [*TINY, "--num-epochs", "1", "--learning-rate", "0.02", "--warmup-steps", "0"]
    run += ["--backbone", "random", "--run-name", "a"]
    assert run_script("dt_pretrained.py", *run).status == 0
    folder = tmp_path / "runs" / "a"
    finished = ["--sample", "--runs", "runs/a", "--mine-windows", "0", "--run-name", "b"]
    assert run_script(SCRIPT, *finished).status == 0
    results = json.loads((tmp_path / "runs" / "b" / "results.json").read_text())
    args = ar.Args(mine_windows=0)
    windows, _ = ar.choose_windows(model_and_data("random")[1], 20, args)
    models = [ar.load_model(folder / f"epoch_{epoch}.pt", "cpu") for epoch in (0, 1)]
    for row, position in zip(results["cka"], (57, 58, 59)):  # return, state, action
        x, y = (ar.activations(model, windows, ["2.ln_2"], [position]) for model in models)
        expected = cka_by_its_formula(x["2.ln_2"][0], y["2.ln_2"][0])
        assert abs(row["layers"]["2.ln_2"] - expected) < 1e-6 and expected < 0.999


def test_without_context(run_script, tmp_path):
    size = [*SIZE, "--backbones", "random", "--context-length", "1", "--cka-windows", "0"]
    result = run_script(SCRIPT, *size, "--run-name", "a")
    assert result.status == 0, result.err
    results = json.loads((tmp_path / "runs" / "a" / "results.json").read_text())
    assert {row["step_index"] for row in results["mutual_information"]} == {0} and not results[
        "cka"
    ]
    assert (tmp_path / "runs" / "a" / "information_with_context.png").exists()


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--backbones", "/nowhere"], ["nowhere"]),
        (["--backbones"], ["--backbones"]),
        (["--runs", "nowhere"], ["nowhere"]),
        (["--epochs", "1"], ["--epochs"]),
        (["--epochs", "0", "7"], ["--epochs"]),
        (["--cka-windows", "3"], ["--cka-windows"]),
        (["--mine-windows", "10"], ["--mine-batch-size"]),
        (["--mine-steps", "0"], ["--mine-steps"]),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, said, run_script):
    assert_one_sentence(run_script(SCRIPT, *SIZE, *arguments), *said)


def test_the_papers_settings_are_what_the_released_code_has(run_script, monkeypatch):
    """100 windows, batches of 50, 1,000 passes: seen by the first pair that MINE is asked about."""
    seen = []

    class Passes:
        def __init__(self, passes, **options):
            if options.get("desc") == "MINE":
                seen.append(passes)
                raise KeyboardInterrupt
            self.passes = passes

        def __iter__(self):
            return iter(self.passes)

        def set_postfix(self, *arguments, **options):
            pass

        write = staticmethod(lambda *arguments, **options: None)

    monkeypatch.setattr("tqdm.tqdm", Passes)
    size = [*TINY, "--num-epochs", "1", "--backbones", "random", "--mine-paper-settings"]
    with pytest.raises(KeyboardInterrupt):
        run_script(SCRIPT, *size)
    assert seen == [range(1000)]


def test_a_backbone_named_twice_is_trained_once(run_script, tmp_path):
    size = [*SIZE, "--backbones", "random", "random", "--mine-windows", "0", "--run-name", "a"]
    result = run_script(SCRIPT, *size)
    assert result.status == 0 and result.out.count("epoch 1: return") == 1, result.err


def test_runs_that_saw_other_data_are_refused(run_script):
    for name, environment in (("a", "Hopper-v4"), ("b", "Walker2d-v4")):
        run = [*TINY, "--num-epochs", "1", "--backbone", "random", "--env", environment]
        assert run_script("dt_pretrained.py", *run, "--run-name", name).status == 0
    result = run_script(SCRIPT, *SIZE, "--runs", "runs/a", "runs/b")
    assert_one_sentence(result, "runs/b", "another env")
