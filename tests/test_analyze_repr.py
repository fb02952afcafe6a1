"""`analyze_repr.py` against closed forms, formulas written out, transformers' hooks, plain loops, and whole runs."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import TINY, assert_one_sentence, make_model, sample_args
from test_model import reference_backbone

import analyze_repr as ar

SCRIPT = "analyze_repr.py"
SIZE = [
    *TINY,
    "--num-epochs",
    "1",
    "--context-length",
    "5",
    "--mine-windows",
    "40",
    "--mine-batch-size",
    "20",
    "--mine-passes",
    "2",
]


def model_and_data(backbone="gpt2"):
    args = sample_args(ar)
    return make_model(ar, backbone), ar.OfflineData(args, ar.make_env(args, 1), torch.device("cpu"))


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
    assert torch.equal(matrix, matrix.T) and matrix[2, 3] > 0.5
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
    ours = ar.activations(model, windows, dict.fromkeys(names, positions), chunk_size=3)
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


def test_align():
    of_24 = np.arange(24 * 9.0)
    pairs = of_24.reshape(12, 2, 9).mean(axis=1).flatten()
    np.testing.assert_allclose(ar.align(of_24, 12), pairs)
    np.testing.assert_allclose(ar.align(of_24[:108], 12), of_24[:108])
    thirds = ar.align(np.repeat([0.0, 1.0, 5.0], 9), 2)  # the middle block lies half in either
    np.testing.assert_allclose(thirds, np.repeat([1 / 3, 11 / 3], 9))


# ---------------------------------------------------------------------------------------------------------------
# Mutual information
# ---------------------------------------------------------------------------------------------------------------
def gaussians(dimensions, rho, count):
    """x and t [count, dimensions] with correlation rho per dimension, and their mutual information in nats."""
    generator = torch.Generator().manual_seed(2)
    x, noise = torch.randn(2, count, dimensions, generator=generator)
    return x, rho * x + (1 - rho**2) ** 0.5 * noise, -0.5 * dimensions * math.log(1 - rho**2)


def estimate(cases, **settings):
    args = ar.Args(mine_repeats=1, **settings)
    x, t, truth = zip(*(gaussians(*case, 2 * args.mine_windows) for case in cases))
    held_out, training = ar.mutual_information(list(zip(x, t)), args, "cpu")[:, :, 0]
    return held_out, training, truth


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


SMALL = dict(mine_windows=90, mine_batch_size=40, mine_passes=3, mine_repeats=2, seed=5)


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
    together, alone, threes = (
        ar.mutual_information(pairs, ar.Args(mine_group=group, **SMALL), "cpu")
        for group in (100, 1, 3)
    )
    plain = [[plain_mine(*pair, seed) for seed in (5, 6)] for pair in pairs]
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(together, threes, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(together, np.moveaxis(plain, -1, 0), rtol=1e-3, atol=1e-5)
    assert np.abs(together[..., 0] - together[..., 1]).min() > 1e-5  # the seeds are different ones


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
    pairs = [(x[0], t[0]), (x[1] * 1e30, t[1]), (x[2], t[2])]
    args = ar.Args(mine_paper_settings=True, **SMALL)  # raw units, so that they can be too large
    held_out, training = ar.mutual_information(pairs, args, "cpu")
    assert (
        np.isnan(held_out[1]).all()
        and np.isfinite(held_out[[0, 2]]).all()
        and np.isfinite(training[0]).all()
    )


def test_questions_of_the_paper():
    for blocks, shown in ((12, {0, 6, 11}), (24, {0, 12, 23}), (1, {0})):
        asked = ar.questions_about_model(blocks, 20, range(20))
        context = ar.select(asked, analysis="context")
        assert {q["block"] for q in context} == shown and len(context) == len(
            shown
        ) * 2 * 59  # every token but a_K
        for q in context:
            variable, representation = (q["token"], q["step"]), ("state", 19)
            if q["quantity"] == "I(Y;T)":
                variable, representation = ("action", 19), (q["token"], q["step"])
            assert (q["variable"], q["representation"]) == (variable, representation)
        alone = ar.select(asked, analysis="no context")
        assert len(alone) == blocks * 20 * 2 and all(
            q["representation"] == ("state", q["variable"][1]) for q in alone
        )
    without_context = ar.questions_about_model(4, 1, [0])
    assert {q["token"] for q in without_context} == {"return", "state", "action"}
    assert not ar.select(without_context, analysis="context", token="action")


def test_answers_tell_a_dependent_representation_from_its_control():
    generator = torch.Generator().manual_seed(0)
    args = ar.Args(mine_windows=400, mine_batch_size=40, mine_repeats=1)
    windows = [torch.randn(800, 2, width, generator=generator) for width in (1, 4, 2)]
    keys = itertools.product([0], ar.TOKENS, (0, 1))
    representations = {key: torch.randn(800, 6, generator=generator) for key in keys}
    representations[0, "state", 1][:, :4] = (
        windows[1][:, 1] * 5
    )  # T(s_K) knows s_K, in other units, and nothing else
    answers = ar.answer(
        ar.questions_about_model(1, 2, [0, 1]), windows, representations, args, "run"
    )
    for a in answers:
        knows = a["variable"] == a["representation"] == ("state", 1) and not a["control"]
        assert (a["held_out"][0] > 1) == knows and (abs(a["held_out"][0]) < 0.2) != knows, a
    assert sum(a["control"] for a in answers) == 4


def test_windows_are_whole_and_the_held_out_ones_from_other_episodes(capsys):
    _, data = model_and_data("random")
    seen, windows = [], data.windows
    data.windows = lambda starts, K: seen.append(starts) or windows(starts, K)
    args = ar.Args(cka_windows=100, mine_windows=500)
    chosen = ar.choose_windows(data, 20, args)
    assert all(part[-1].all() for part in chosen) and [len(starts) for starts in seen] == [
        100,
        1000,
    ]
    training, held_out = seen[1].split(500)
    assert not {*data.episode_ends[training].tolist()} & {*data.episode_ends[held_out].tolist()}
    assert len(seen[1].unique()) == 1000
    with pytest.raises(SystemExit):
        ar.choose_windows(data, 20, ar.Args(mine_windows=15_000))
    assert "whole windows" in capsys.readouterr().err


def test_data_is_shuffled_within_the_halves(monkeypatch):
    """A control must not see in its held-out half what it was trained on."""
    seen = []
    monkeypatch.setattr(
        ar,
        "mutual_information",
        lambda pairs, *rest: seen.extend(pairs) or np.zeros((2, len(pairs), 1)),
    )
    windows = [torch.arange(80.0)[:, None, None].expand(80, 1, 1)] * 3
    representations = {(None, "action", 0): torch.zeros(80, 1)}
    answers = ar.answer(ar.questions_about_data([0]), windows, representations, ar.Args(), "data")
    assert [a["control"] for a in answers] == [False, True] * 2 and len(seen) == 4
    for (original, _), (shuffled, _) in (seen[:2], seen[2:]):
        assert torch.equal(shuffled[:40].sort(0).values, original[:40])
        assert torch.equal(shuffled[40:].sort(0).values, original[40:])
        assert (shuffled == original).float().mean() < 0.2


@torch.no_grad()
def test_representations_are_block_outputs_at_their_tokens(monkeypatch):
    model, data = model_and_data("gpt2")
    windows = data.windows(torch.arange(6), 3)
    monkeypatch.setattr(
        ar, "answer", lambda asked, windows, representations, *rest: representations
    )
    representations = ar.measure_information(model, windows, ar.Args(), [0, 2], "")
    x = model.embed(*windows[:4])
    positions = {
        ("return", 0): 0,
        ("state", 0): 1,
        ("action", 0): 2,
        ("return", 2): 6,
        ("state", 2): 7,
    }
    for block, module in enumerate(model.transformer.h):
        middle = x + module.attn(module.ln_1(x))
        output = module.mlp(module.ln_2(middle))
        x = middle + output
        for key, position in positions.items():
            if key[0] == "state" or block in (0, 2, 3):
                ours = representations.pop((block, *key))
                torch.testing.assert_close(ours, output[:, position], rtol=1e-4, atol=1e-4)
    assert not representations


def test_heat_maps_have_the_first_model_in_rows():
    grams = {
        "a": torch.eye(4)[:2],
        "b": torch.eye(4)[1:],
    }  # the second layer of a is the first of b
    results = []
    for name, gram in grams.items():
        result = dict(run=name, env="Hopper-v4", K=20, seed=1, sample=False)
        results.append(result | dict(grams={(when, "state"): gram for when in ("before", "after")}))
    figure = ar.plot_heat_maps(results, "state")
    panels = [axes for axes in figure.axes if axes.get_images()]
    labels = [(axes.get_ylabel()[-1], axes.get_xlabel()[-1]) for axes in panels[:5]]
    assert labels == [("a", "a"), ("b", "b"), ("a", "a"), ("b", "b"), ("a", "b")]
    np.testing.assert_array_equal(panels[4].get_images()[0].get_array(), [[0, 0, 0], [1, 0, 0]])


# ---------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------
FIGURES = [
    "cka_before_after",
    "cka_heat_maps_return",
    "cka_heat_maps_state",
    "cka_heat_maps_action",
]
FIGURES += ["mutual_information", "information_per_block", "information_in_data"]


def test_train_and_analyse(run_script, tmp_path):
    result = run_script(
        SCRIPT, *SIZE, "--backbones", "random", "igpt", "--mine-repeats", "2", "--run-name", "a"
    )
    assert result.status == 0, result.err
    folder = tmp_path / "runs" / "a"
    results = json.loads((folder / "results.json").read_text())
    assert [(row["run"], row["token"]) for row in results["cka"]] == [
        *itertools.product(("random", "igpt"), ar.TOKENS)
    ]
    for row in results["cka"]:
        assert len(row["layers"]) == 36 and row["layers_above"] == sum(
            value > 0.8 for value in row["layers"].values()
        )
    assert {a["run"] for a in results["mutual_information"]} == {"data", "random", "igpt"}
    assert all(len(a["held_out"]) == len(a["training"]) == 2 for a in results["mutual_information"])
    assert all((folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in FIGURES)
    assert "LayerNorms among them" in result.out and "I(Y;T)" in result.out

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert set(EventAccumulator(str(folder)).Reload().Tags()["images"]) == set(FIGURES)

    # Its checkpoints again, by the other door: the same windows give the same numbers.
    runs = ["--runs", "runs/a/random", "runs/a/igpt", "--mine-windows", "0", "--run-name", "b"]
    assert run_script(SCRIPT, *SIZE, *runs).status == 0
    again = json.loads((tmp_path / "runs" / "b" / "results.json").read_text())
    assert again["cka"] == results["cka"] and not again["mutual_information"]


def test_before_and_after_are_compared_at_the_right_tokens(run_script, tmp_path):
    run = [
        *TINY,
        "--num-epochs",
        "1",
        "--learning-rate",
        "0.02",
        "--warmup-steps",
        "0",
        "--backbone",
        "random",
    ]
    assert run_script("dt_pretrained.py", *run, "--run-name", "a").status == 0
    folder = tmp_path / "runs" / "a"
    args = sample_args(ar, mine_windows=0)
    (result,), information = ar.analyse([folder], args)
    _, data = model_and_data("random")
    windows, _ = ar.choose_windows(data, 20, args)
    assert not information and len(windows[0]) == 100
    models = [ar.load_model(folder / f"epoch_{epoch}.pt", "cpu")[0] for epoch in (0, 1)]
    for token, position in (("return", 57), ("state", 58), ("action", 59)):
        before, after = (
            ar.activations(model, windows, {"2.ln_2": [position]})["2.ln_2"][0] for model in models
        )
        expected = cka_by_its_formula(before, after)
        assert abs(ar.similarity(result, token)[2 * 9 + 4] - expected) < 1e-6 and expected < 0.999


def test_without_context(run_script, tmp_path):
    size = [
        *SIZE,
        "--backbones",
        "random",
        "--context-length",
        "1",
        "--cka-windows",
        "0",
        "--run-name",
        "a",
    ]
    result = run_script(SCRIPT, *size)
    assert result.status == 0, result.err
    results = json.loads((tmp_path / "runs" / "a" / "results.json").read_text())
    assert {a["step"] for a in results["mutual_information"]} == {0} and not results["cka"]
    assert (tmp_path / "runs" / "a" / "mutual_information.png").exists()


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--backbones", "/nowhere"], ["nowhere"]),
        (["--runs", "nowhere"], ["nowhere"]),
        (["--epochs", "1"], ["--epochs"]),
        (["--epochs", "0", "7"], ["--epochs"]),
        (["--cka-windows", "3"], ["--cka-windows"]),
        (["--mine-windows", "10"], ["--mine-batch-size"]),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, said, run_script):
    assert_one_sentence(run_script(SCRIPT, *SIZE, *arguments), *said)


def test_runs_that_saw_other_data_are_refused(run_script):
    for name, environment in (("a", "Hopper-v4"), ("b", "Walker2d-v4")):
        run = [
            *TINY,
            "--num-epochs",
            "1",
            "--backbone",
            "random",
            "--env",
            environment,
            "--run-name",
            name,
        ]
        assert run_script("dt_pretrained.py", *run).status == 0
    assert_one_sentence(run_script(SCRIPT, *SIZE, "--runs", "runs/a", "runs/b"), "--env")
