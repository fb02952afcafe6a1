"""`analyze_repr.py` against closed forms, formulas written out, transformers' own hooks, plain loops, and whole runs."""

import json
import math
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT
from test_interruptions import finish, start, wait_for
from test_model import reference_backbone

import analyze_repr as ar

SCRIPT = "analyze_repr.py"
SIZE = ["--sample", "--num-epochs", "1", "--steps-per-epoch", "4", "--num-eval-episodes", "2"]
SIZE += ["--mine-windows", "40", "--mine-batch-size", "20", "--mine-passes", "2"]


def model_and_data(backbone="gpt2"):
    torch.manual_seed(0)
    args = ar.resolve(ar.Args(backbone=backbone, sample=True, device="cpu", env="Hopper-v5"))
    model, _, _, _ = ar.make_model(args, dict(state_dim=11, act_dim=3, max_timestep=1000))
    return model.eval(), ar.load_data(args, ar.make_env(args, 1))


# ---------------------------------------------------------------------------------------------------------------
# CKA
# ---------------------------------------------------------------------------------------------------------------
def cka_of(x, y):
    return ar.cka(ar.gram_matrices([x]), ar.gram_matrices([y])).item()


def hsic_by_its_formula(K, L):
    """The unbiased estimator as Song et al. 2012 (equation 5) and Kornblith et al.'s debiased CKA define it."""
    n = len(K)
    K, L, one = K - torch.diag(K.diagonal()), L - torch.diag(L.diagonal()), torch.ones(n, dtype=torch.float64)
    total = torch.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ K @ L @ one)
    return total / (n * (n - 3))


def cka_by_its_formula(x, y):
    K, L = (v.double() @ v.double().T for v in (x, y))
    return (hsic_by_its_formula(K, L) / (hsic_by_its_formula(K, K) * hsic_by_its_formula(L, L)).sqrt()).item()


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
    layers = [torch.randn(50, width) + common @ torch.randn(10, width) * i for i, width in enumerate((5, 20, 80, 30))]
    grams = ar.gram_matrices(layers)
    matrix = ar.cka(grams, grams)
    expected = [[cka_by_its_formula(x, y) for y in layers] for x in layers]
    np.testing.assert_allclose(matrix, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(matrix, matrix.T) and matrix[2, 3] > 0.5
    x, y = layers[1], layers[2]  # and a U-statistic it is: an average over all quadruples of different windows
    n, K, L = 8, (x[:8] @ x[:8].T).double(), (y[:8] @ y[:8].T).double()
    terms = [
        K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])
        for i in range(n) for j in range(n) for q in range(n) for r in range(n) if len({i, j, q, r}) == 4
    ]  # fmt: skip
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
        reference.h.get_submodule(name).register_forward_hook(lambda module, x, y, name=name: theirs.update({name: y}))
    reference(inputs_embeds=model.embed(*windows[:4]), use_cache=False)
    assert list(ours) == names and len(names) == 36
    for name in names:
        expected = theirs[name][:, positions].transpose(0, 1)
        assert ours[name].shape == (3, 7, expected.shape[-1])
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
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
    args = ar.Args(device="cpu", **settings)
    x, t, truth = zip(*(gaussians(*case, 2 * args.mine_windows) for case in cases))
    return *ar.mutual_information(x, t, [(i, i) for i in range(len(cases))], args), truth


@pytest.mark.parametrize("dimensions,rhos", [(1, (0, 0.6, 0.9)), (10, (0, 0.3, 0.6))])
def test_gaussians_have_the_information_of_the_closed_form(dimensions, rhos):
    held_out, training, truth = estimate([(dimensions, rho) for rho in rhos], mine_repeats=1)
    for rho, *values in zip(rhos, held_out[0], training[0], truth):
        print(
            f"dimension {dimensions}, correlation {rho}: held out {values[0]:.2f}, training {values[1]:.2f}, truth {values[2]:.2f}"
        )
    assert all(abs(a - b) < max(0.1, 0.15 * b) for a, b in zip(held_out[0], truth)) and abs(held_out[0, 0]) < 0.1


def test_the_papers_settings_cannot_tell_dependence_from_none():
    settings = dict(mine_windows=100, mine_batch_size=50, mine_passes=1000, mine_paper_settings=True, mine_repeats=1)
    held_out, training, truth = estimate([(10, rho) for rho in (0, 0.3, 0.6)], **settings)
    print(f"paper's settings: training {training[0].round(2)}, held out {held_out[0].round(2)}, truth {np.round(truth, 2)}")
    assert training[0].min() > 3 and np.ptp(training[0]) < 0.7 < 2 < truth[2] - truth[0]
    assert held_out[0, 0] < -1


SMALL = dict(mine_windows=90, mine_batch_size=40, mine_passes=3, mine_repeats=2, device="cpu", seed=5)


def plain_mine(x, t, seed):
    """One estimator as a textbook writes it; the moving average corrects the gradient of the logarithm."""
    start = ar.StatisticsNetworks(x.shape[1] + t.shape[1], [seed])
    network = nn.Sequential(*(layer for w in start.weights for layer in (nn.Linear(*w.shape[1:]), nn.ReLU())))[:-1]
    for layer, weight, bias in zip(network[::2], start.weights, start.biases):
        layer.weight.data, layer.bias.data = weight[0].T.detach().clone(), bias[0, 0].detach().clone()
    optimizer, generator, average = torch.optim.Adam(network.parameters(), 1e-4), torch.Generator().manual_seed(seed), None
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
        of = torch.arange(half) + first
        partners = torch.randperm(half, generator=generator) + first
        joint = network(torch.cat([x[of], t[of]], 1)).mean()
        values.append((joint - network(torch.cat([x[partners], t[of]], 1)).exp().mean().log()).item())
    return values


def test_side_by_side_equals_one_at_a_time_and_a_plain_loop():
    x, t, _ = zip(*(gaussians(3, rho, 180) for rho in (0, 0.5, 0.9)))
    pairs = [(0, 0), (1, 1), (2, 2), (0, 2)]
    together = np.stack(ar.mutual_information(x, t, pairs, ar.Args(mine_group=100, **SMALL)))
    alone = np.stack(ar.mutual_information(x, t, pairs, ar.Args(mine_group=1, **SMALL)))
    threes = np.stack(ar.mutual_information(x, t, pairs, ar.Args(mine_group=3, **SMALL)))
    plain = [[plain_mine(x[i], t[j], seed) for i, j in pairs] for seed in (5, 6)]
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(together, threes, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(together, np.moveaxis(plain, -1, 0), rtol=1e-3, atol=1e-5)
    assert np.abs(together[:, 0] - together[:, 1]).min() > 1e-5  # the seeds are different ones


def test_networks_start_as_nn_linear_does():
    networks, linear = ar.StatisticsNetworks(300, [3, 3, 4]), nn.Linear(300, 400)
    assert [tuple(w.shape[1:]) for w in networks.weights] == [(300, 400), (400, 400), (400, 400), (400, 1)]
    assert torch.equal(networks.weights[1][0], networks.weights[1][1]) and not torch.equal(*networks.weights[1][1:])
    for ours, theirs in ((networks.weights[0][2], linear.weight), (networks.biases[0], linear.bias)):
        assert abs(ours.std() / theirs.std() - 1) < 0.1 and ours.abs().max() < 300**-0.5 < ours.abs().max() * 1.05


def test_a_diverged_estimator_is_missing_and_the_others_are_not():
    x, t, _ = zip(*(gaussians(2, 0.5, 180) for _ in range(3)))
    x = [x[0], x[1] * 1e30, x[2]]
    args = ar.Args(mine_paper_settings=True, **SMALL)  # raw units, so that they can be too large
    held_out, training = ar.mutual_information(x, t, [(i, i) for i in range(3)], args)
    assert np.isnan(held_out[:, 1]).all() and np.isfinite(held_out[:, [0, 2]]).all() and np.isfinite(training[:, 0]).all()


def test_questions_of_the_paper():
    for blocks, shown in ((12, {0, 6, 11}), (24, {0, 12, 23}), (1, {0})):
        asked = ar.questions(blocks, 20, range(20))
        context = ar.select(asked, analysis="context", control=False)
        assert {q["block"] for q in context} == shown and len(context) == len(shown) * 2 * 59  # every token but a_K
        assert all(
            q["representation"] == ("state", 19) and q["variable"] == (q["token"], q["step"])
            for q in ar.select(context, quantity="I(X;T)")
        )
        assert all(
            q["variable"] == ("action", 19) and q["representation"] == (q["token"], q["step"])
            for q in ar.select(context, quantity="I(Y;T)")
        )
        alone = ar.select(asked, analysis="no context", control=False)
        assert len(alone) == blocks * 20 * 2 and all(q["representation"] == ("state", q["variable"][1]) for q in alone)
        assert len(ar.select(asked, control=True)) == len(shown) * 2 + 2
    assert {q["token"] for q in ar.questions(4, 1, [0])} == {"return", "state", "action"}
    assert not [q for q in ar.questions(4, 1, [0]) if q["analysis"] == "context" and q["token"] == "action"]


def test_answers_tell_a_dependent_representation_from_its_control():
    generator = torch.Generator().manual_seed(0)
    args = ar.Args(device="cpu", mine_windows=800, mine_batch_size=80, mine_repeats=1)
    windows = [torch.randn(1600, 2, width, generator=generator) for width in (1, 4, 2)]
    representations = {(0, token, step): torch.randn(1600, 6, generator=generator) for token in ar.TOKENS for step in (0, 1)}
    representations[0, "state", 1][:, :4] = windows[1][:, 1] * 5  # T(s_K) knows s_K, in other units, and nothing else
    answers = ar.answer(ar.questions(1, 2, [0, 1]), windows, representations, args, "")
    for a in answers:
        knows = a["variable"] == a["representation"] == ("state", 1) and not a["control"]
        assert (a["held_out"][0] > 1) == knows and (abs(a["held_out"][0]) < 0.2) != knows, a
    assert sum(a["control"] for a in answers) == 4


def test_windows_are_whole_and_the_held_out_ones_from_other_episodes():
    _, data = model_and_data("random")
    starts, odd = ar.whole_windows(data, 20)
    assert data.windows(starts, 20)[-1].all() and len(starts) == len(data.states) - 19 * data.num_episodes
    ends = [set(data.episode_ends[starts[half]].tolist()) for half in (odd, ~odd)]
    assert not ends[0] & ends[1] and len(ends[0] | ends[1]) == data.num_episodes
    chosen = ar.choose(starts[odd], 500, torch.Generator().manual_seed(0), "MINE")
    assert len(chosen.unique()) == 500 and set(data.episode_ends[chosen].tolist()) <= ends[0]
    with pytest.raises(SystemExit):
        ar.choose(starts, len(starts) + 1, torch.Generator(), "MINE")


def test_data_is_shuffled_within_the_halves(monkeypatch):
    """A control must not see in its held-out half what it was trained on."""
    seen = {}
    monkeypatch.setattr(ar, "mutual_information", lambda x, t, pairs, *rest: seen.update(x=x) or np.zeros((2, 1, len(pairs))))
    windows = [torch.arange(80.0)[:, None, None].expand(80, 1, 1)] * 3
    representations = {(0, token, 0): torch.zeros(80, 1) for token in ar.TOKENS}
    ar.answer(ar.questions(1, 1, [0]), windows, representations, ar.Args(mine_windows=40), "")
    original, shuffled = (x[:, 0] for x in seen["x"])
    assert torch.equal(shuffled[:40].sort().values, original[:40]) and torch.equal(shuffled[40:].sort().values, original[40:])
    assert (shuffled == original).float().mean() < 0.2


@torch.no_grad()
def test_representations_are_block_outputs_at_their_tokens(monkeypatch):
    model, data = model_and_data("gpt2")
    architecture = dict(config=vars(ar.load_backbone(ar.resolve(ar.Args(backbone="gpt2", sample=True)))[0]))
    architecture |= dict(state_dim=11, act_dim=3, max_timestep=1000)
    checkpoint = dict(architecture=architecture, model=model.state_dict())
    windows = data.windows(torch.arange(6), 3)
    monkeypatch.setattr(ar, "answer", lambda asked, windows, representations, *rest: representations)
    representations = ar.measure_information(checkpoint, windows, ar.Args(device="cpu", mine_steps=2), "")
    x = model.embed(*windows[:4])
    for block, module in enumerate(model.transformer.h):
        middle = x + module.attn(module.ln_1(x))
        output = module.mlp(module.ln_2(middle))
        x = middle + output
        for key, position in ((("return", 0), 0), (("state", 0), 1), (("action", 0), 2), (("return", 2), 6), (("state", 2), 7)):
            if key[0] == "state" or block in (0, 2, 3):
                torch.testing.assert_close(representations.pop((block, *key)), output[:, position], rtol=1e-4, atol=1e-4)
    assert not representations


def test_heat_maps_have_the_first_model_in_rows():
    grams = {"a": torch.eye(4)[:2], "b": torch.eye(4)[1:]}  # the second layer of a is the first of b
    results = [dict(name=name, grams={(when, "state"): g for when in ("before", "after")}) for name, g in grams.items()]
    maps = ar.heat_maps(results, "state")
    assert [m[:3] for m in maps] == [
        ("a, before", "a", "a"), ("b, before", "b", "b"), ("a, after", "a", "a"), ("b, after", "b", "b"),
        ("a and b, after", "a", "b"),
    ]  # fmt: skip
    np.testing.assert_array_equal(maps[-1][3], [[0, 0, 0], [1, 0, 0]])


# ---------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------
FIGURES = ["cka_before_after", "cka_heat_maps_return", "cka_heat_maps_state", "cka_heat_maps_action"]
FIGURES += ["mutual_information", "mutual_information_no_context", "mutual_information_data"]


def test_train_and_analyse(run_script, tmp_path):
    result = run_script(SCRIPT, *SIZE, "--backbones", "random", "igpt", "--mine-repeats", "2", "--run-name", "a")
    assert result.status == 0, result.err
    folder = tmp_path / "runs" / "a"
    results, arrays = json.loads((folder / "results.json").read_text()), np.load(folder / "cka.npz")
    assert [r["label"] for r in results["runs"]] == ["random", "igpt"] and len(arrays) == 3 * (2 + 2 + 1)
    for r in results["runs"]:
        assert len(r["layers"]) == 36 and all(len(values) == 36 for values in r["cka"].values())
        assert r["above_threshold"]["state"] == [n for n, v in zip(r["layers"], r["cka"]["state"]) if v > 0.8]
        assert all(len(a["held_out"]) == len(a["training"]) == 2 for a in r["information"])
        after = arrays[f"state: {r['label']}, after"]
        assert after.shape == (36, 36) and np.allclose(after.diagonal(), 1) and np.allclose(after, after.T)
    assert all((folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in FIGURES)
    assert "LayerNorms among them" in result.out and "0 of " in result.out and "I(Y;T)" in result.out

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["images"]) == set(FIGURES)

    # Its checkpoints again, by the other door and in two ways: the same windows give the same numbers.
    for name, options in (("b", ["--mine-repeats", "2"]), ("c", ["--mine-windows", "0", "--epochs", "0", "0"])):
        assert run_script(SCRIPT, *SIZE, *options, "--runs", "runs/a/random", "runs/a/igpt", "--run-name", name).status == 0
    again, same = (json.loads((tmp_path / "runs" / name / "results.json").read_text()) for name in ("b", "c"))
    assert again["runs"] == results["runs"] and again["data"] == results["data"]
    assert all(abs(value - 1) < 1e-9 for r in same["runs"] for values in r["cka"].values() for value in values)
    assert not (tmp_path / "runs" / "c" / "mutual_information.png").exists() and not same["data"]


def test_before_after_tokens_and_halves(run_script, tmp_path, monkeypatch):
    """What `analyse` compares: the right checkpoints at the right tokens, and information on two sets of episodes."""
    options = [*SIZE[:7], "--learning-rate", "0.02", "--warmup-steps", "0", "--run-name", "a"]
    assert run_script("dt_pretrained.py", *options, "--backbone", "random").status == 0
    chosen, asked, choose = [], [], ar.choose
    monkeypatch.setattr(ar, "choose", lambda *inputs: chosen.append(choose(*inputs)) or chosen[-1])
    monkeypatch.setattr(ar, "measure_information", lambda checkpoint, *rest: asked.append(checkpoint) or [])
    monkeypatch.setattr(ar, "measure_information_in_data", lambda *inputs: [])
    args = ar.resolve(ar.Args(sample=True, device="cpu", mine_windows=300, backbone="random"))
    (result,), _ = ar.analyse([tmp_path / "runs" / "a"], args)
    _, data = model_and_data("random")
    episodes = [set(data.episode_ends[starts].tolist()) for starts in chosen[1:]]
    assert len(chosen[0]) == 100 and asked[0]["epoch"] == 1 and not episodes[0] & episodes[1]
    windows, layer = data.windows(chosen[0], 20), 2 * 9 + 4
    for token, position in (("return", 57), ("state", 58), ("action", 59)):
        checkpoints = [torch.load(tmp_path / "runs" / "a" / "checkpoints" / f"epoch_{epoch}.pt") for epoch in (0, 1)]
        models = [ar.rebuild_model(checkpoint, "cpu") for checkpoint in checkpoints]
        before, after = (ar.activations(model, windows, {"2.ln_2": [position]})["2.ln_2"][0] for model in models)
        expected = cka_by_its_formula(before, after)
        assert abs(ar.similarity(result, token)[layer] - expected) < 1e-6 and expected < 0.999


def test_without_context_and_one_block(run_script, tmp_path):
    size = [*SIZE, "--backbones", "random", "--n-layer", "1", "--context-length", "1", "--cka-windows", "0"]
    result = run_script(SCRIPT, *size, "--run-name", "a")
    assert result.status == 0, result.err
    results = json.loads((tmp_path / "runs" / "a" / "results.json").read_text())
    assert len(results["runs"][0]["information"]) == 2 + 4 + 4 and len(results["data"]) == 4
    assert (tmp_path / "runs" / "a" / "mutual_information.png").exists() and not (tmp_path / "runs" / "a" / "cka.npz").exists()


def test_the_papers_settings_are_a_flag():
    args = ar.check(ar.Args(mine_paper_settings=True, mine_repeats=2))
    assert (args.mine_windows, args.mine_batch_size, args.mine_passes, args.mine_repeats) == (100, 50, 1000, 2)
    assert list(ar.estimate_names(args)) == ["training", "held_out"] and "the paper's settings" in ar.with_settings(args, "")
    assert list(ar.estimate_names(ar.Args())) == ["held_out", "training"]


def test_interrupted_in_the_analysis(tmp_path):
    """The training before it has finished and gives the signals back."""
    size = [*SIZE, "--backbones", "random", "--mine-passes", "100000", "--cka-windows", "0"]
    in_terminal = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - jobs in the background ignore Ctrl-C
    process = start(tmp_path, *size, "--run-name", "a", program=(ROOT / SCRIPT,), preexec_fn=in_terminal)
    wait_for(tmp_path / "runs" / "a" / "random" / "summary.json", process)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    status, out, said = finish(process)
    assert status == 128 + signal.SIGINT and said[-1].startswith("interrupted"), said
    assert "python analyze_repr.py --runs runs/a/random" in out


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--backbones", "nope"], ["nope"]),
        (["--runs", "nowhere"], ["nowhere"]),
        (["--epochs", "1"], ["--epochs"]),
        (["--epochs", "0", "7"], ["--epochs 7"]),
        (["--cka-windows", "3"], ["--cka-windows"]),
        (["--mine-windows", "10"], ["--mine-batch-size"]),
        (["--mine-windows", "0", "--cka-windows", "0"], ["nothing"]),
        (["--mine-windows", "15000"], ["whole windows", "--mine-windows"]),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, said, run_script, tmp_path):
    result = run_script(SCRIPT, *SIZE, "--backbones", "random", *arguments)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.status == 2 and len(errors) == 1 and "Traceback" not in result.err, result.err
    assert all(word in errors[0] for word in said)


def test_runs_that_saw_other_data_are_refused(run_script):
    for name, environment in (("a", "Hopper-v4"), ("b", "Walker2d-v4")):
        options = ["--backbone", "random", "--env", environment, "--run-name", name]
        assert run_script("dt_pretrained.py", *SIZE[:7], *options).status == 0
    result = run_script(SCRIPT, *SIZE, "--runs", "runs/a", "runs/b")
    assert result.status == 2 and "their env differs" in result.err
