"""`analyze_grads.py` against plain loops of single-window backward passes, toys with known answers, and whole runs."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_interruptions import finish, start, wait_for

import analyze_grads as ag

SCRIPT = "analyze_grads.py"
SIZE = ["--sample", "--steps-per-epoch", "6", "--num-eval-episodes", "2", "--norm-windows", "5", "--confusion-windows", "4"]


def model_and_windows(backbone="gpt2", count=6, context_length=4):
    torch.manual_seed(0)
    args = ag.resolve(ag.Args(backbone=backbone, sample=True, device="cpu", env="Hopper-v5"))
    data = ag.load_data(args, ag.make_env(args, 1))
    model, _, _, _ = ag.make_model(args, dict(state_dim=11, act_dim=3, max_timestep=1000))
    starts = torch.randint(len(data.states), (count,))
    starts[0] = data.episode_ends[0] - 2  # a window that is padded
    return model.eval(), data.windows(starts, context_length)


def plain_gradients(model, windows):
    """One backward pass per window: a list of {name: gradient}."""
    gradients = []
    for i in range(len(windows[0])):
        window = [x[i : i + 1] for x in windows]
        model.zero_grad()
        ag.training_loss(model, window, window[-1].sum())[0].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return gradients


@pytest.mark.parametrize("backbone", ["gpt2", "igpt", "random"])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_norms_and_cosines_equal_a_plain_loop(backbone, chunk_size):
    model, windows = model_and_windows(backbone)
    norms, total, cosines = ag.gradient_statistics(model, windows, 5, chunk_size)
    plain = plain_gradients(model, windows)
    np.testing.assert_allclose(total, [torch.cat([g.flatten() for g in p.values()]).norm() for p in plain], rtol=1e-4)
    sets = [name for name in plain[0] if name.startswith("transformer.h.")]
    assert list(norms) == [name.removeprefix("transformer.h.") for name in sets]
    for name in sets:
        expected = [p[name].norm().item() for p in plain]
        np.testing.assert_allclose(norms[name.removeprefix("transformer.h.")], expected, rtol=1e-3, atol=1e-7)
    flat = torch.stack([torch.cat([p[name].flatten() for name in sets]) for p in plain[:5]]).double()
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    np.testing.assert_allclose(cosines, expected, atol=1e-4)


class Toy(torch.nn.Module):
    """A linear policy that has its weights where a Transformer has its blocks."""

    def __init__(self):
        super().__init__()
        self.transformer = torch.nn.Module()
        self.transformer.h = torch.nn.ModuleList([torch.nn.Linear(4, 2, bias=False)])
        torch.nn.init.zeros_(self.transformer.h[0].weight)

    def forward(self, returns_to_go, states, actions, timesteps):
        return self.transformer.h[0](states)


def test_opposite_targets_give_minus_one():
    states, actions = torch.randn(1, 3, 4).expand(2, 3, 4), torch.randn(1, 3, 2)
    windows = (torch.zeros(2, 3, 1), states, torch.cat([actions, -actions]), torch.zeros(2, 3).long(), torch.ones(2, 3).bool())
    _, total, cosines = ag.gradient_statistics(Toy(), windows, 2, 1)
    assert abs(cosines[0, 1] + 1) < 1e-5 and abs(cosines[0, 0] - 1) < 1e-5
    expected = 2 * (actions[0].T @ states[0]) / 6  # of the mean of (W s - a)^2 over 3 steps and 2 dimensions, at W = 0
    assert abs(total[0] - expected.norm()) < 1e-5


@pytest.mark.parametrize("threshold", [0.25, 3.0, 1e6, 0])
def test_clipped_norms_are_those_of_clip_grad_norm(threshold):
    for norm in (0.01, 0.3, 5.0, 80.0):
        p = torch.nn.Parameter(torch.zeros(7))
        p.grad = torch.randn(7)
        p.grad *= norm / p.grad.norm()
        torch.nn.utils.clip_grad_norm_([p], threshold or float("inf"))
        ours = ag.clipped_norm(np.array(norm), threshold)
        assert abs(ours - p.grad.norm().item()) < 1e-4 * norm
        assert not threshold or ours <= threshold
        assert not threshold or norm < threshold or ours == threshold


def test_parameter_change():
    model, _ = model_and_windows("gpt2")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    changes, whole = ag.parameter_change(before, before)
    assert all(change == dict(distance=0.0, relative=0.0, cosine=1.0) for change in (whole, *changes.values()))
    name, perturbation = "transformer.h.2.mlp.c_fc.weight", torch.randn(128, 512)
    after = before | {name: before[name] + perturbation}
    changes, whole = ag.parameter_change(before, after)
    moved = changes.pop("2.mlp.c_fc.weight")
    assert all(change["distance"] == 0 for change in changes.values()) and len(changes) == 47
    length = sum(x.norm() ** 2 for name, x in before.items() if name.startswith("transformer.h.")) ** 0.5
    assert abs(whole["distance"] - moved["distance"]) < 1e-6 and abs(whole["relative"] - moved["distance"] / length) < 1e-4
    assert abs(moved["distance"] - perturbation.norm()) < 1e-3
    assert abs(moved["relative"] - perturbation.norm() / before[name].norm()) < 1e-4
    expected = torch.nn.functional.cosine_similarity(before[name].flatten(), after[name].flatten(), dim=0)
    assert abs(moved["cosine"] - expected) < 1e-5
    zero = {name: torch.zeros(3)}  # where there was no direction there is no cosine
    change = ag.parameter_change(zero, {name: torch.ones(3)})[0]["2.mlp.c_fc.weight"]
    assert np.isnan(change["cosine"]) and np.isnan(change["relative"]) and abs(change["distance"] - 3**0.5) < 1e-6


MEASURE = """
import resource, torch
import analyze_grads as ag
torch.manual_seed(0)
config = ag.GPTConfig(n_layer=6, n_head=8, n_embd=512, n_inner=2048)
model = ag.DecisionTransformer(config, 11, 3, 1000).eval()
windows = [torch.randn(50, 2, 1), torch.randn(50, 2, 11), torch.rand(50, 2, 3), torch.arange(2).expand(50, 2)]
windows.append(torch.ones(50, 2).bool())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ag.gradient_statistics(model, windows, 50, 10)
all_gradients = 50 * 4 * sum(p.numel() for p in model.transformer.h.parameters()) / 1024
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / all_gradients)
"""


def test_memory_is_that_of_a_block_not_of_all():
    """Peak memory in a process of its own, as a share of 50 gradients of six blocks: one block is a sixth."""
    result = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True)
    share = float(result.stdout)
    print(f"peak memory {share:.2f} of all gradients")
    assert share < 0.5


# ---------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------
def test_train_and_analyse(run_script, tmp_path):
    result = run_script(SCRIPT, *SIZE, "--backbones", "random", "igpt", "--max-grad-norms", "0.25", "0", "--run-name", "a")
    assert result.status == 0, result.err
    folder = tmp_path / "runs" / "a"
    results = json.loads((folder / "results.json").read_text())
    assert [(r["label"], r["max_grad_norm"]) for r in results] == [("random", 0.25), ("random", 0), ("igpt", 0.25), ("igpt", 0)]
    for r in results:
        assert len(r["norm_before"]) == 5 and len(r["cosines"]) == 6 and r["confusion"] == min(r["cosines"])
        assert r["norm_after"] == [min(x, r["max_grad_norm"] or x) for x in r["norm_before"]]
        clipped = np.mean(np.array(r["norm_before"]) > r["max_grad_norm"]) if r["max_grad_norm"] else 0
        assert r["clipped_windows"] == clipped and r["median_norm"] == np.median(r["norm_before"])
        assert abs(r["mean_cosine"] - np.mean(r["cosines"])) < 1e-9
        assert abs(sum(r["set_shares"].values()) - 1) < 1e-6 and r["distance"] > 0 and 0 < r["cosine"] < 1
        assert abs(sum(c["distance"] ** 2 for c in r["change"].values()) ** 0.5 - r["distance"]) < 1e-6
    arrays = np.load(folder / "gradients.npz")
    np.testing.assert_allclose(arrays["2_norm_before"], results[2]["norm_before"])
    names = ("gradient_norm", "gradient_confusion", "gradient_per_set", "clipping", "parameter_change")
    assert all((folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    assert "no clipping" in result.out and "confusion" in result.out


def test_analyse_earlier_runs(run_script, tmp_path):
    """Checkpoints of the other scripts, a mixed model among them; the same windows give the same gradients as training did."""
    size = ["--sample", "--num-epochs", "1", "--steps-per-epoch", "5", "--num-eval-episodes", "2"]
    assert run_script("dt_pretrained.py", *size, "--backbone", "gpt2", "--run-name", "b").status == 0
    assert (
        run_script("dt_no_context.py", *size, "--replace-blocks", "1", "--attention-windows", "0", "--run-name", "c").status
        == 0
    )
    result = run_script(SCRIPT, *SIZE, "--runs", "runs/b", "runs/c/block_1", "--epochs", "0", "1", "--run-name", "a")
    assert result.status == 0, result.err
    results = json.loads((tmp_path / "runs" / "a" / "results.json").read_text())
    assert [(r["label"], r["epoch"], r["context_length"]) for r in results] == [
        ("gpt2", 0, 20), ("gpt2", 1, 20), ("block_1", 0, 1), ("block_1", 1, 1),
    ]  # fmt: skip
    assert results[0]["distance"] == 0 and abs(results[0]["cosine"] - 1) < 1e-9 and results[1]["distance"] > 0


def test_dropout_in_analysis_changes_the_gradients(run_script, tmp_path):
    assert run_script(SCRIPT, *SIZE, "--backbones", "random", "--run-name", "a").status == 0
    for name, options in (("off", []), ("on", ["--dropout-in-analysis"]), ("again", ["--dropout-in-analysis"])):
        assert run_script(SCRIPT, *SIZE, "--runs", "runs/a/random", *options, "--run-name", name).status == 0
    off, on, again = (
        json.loads((tmp_path / "runs" / n / "results.json").read_text())[0]["norm_before"] for n in ("off", "on", "again")
    )
    assert on == again != off


def test_interrupted_and_resumed(tmp_path):
    arguments = [*SIZE, "--steps-per-epoch", "150", "--backbones", "random", "random-gpt2", "--n-layer", "1", "--n-embd", "32"]
    assert finish(start(tmp_path, *arguments, "--run-name", "whole", program=(ROOT / SCRIPT,)))[0] == 0
    process = start(tmp_path, *arguments, "--run-name", "cut", program=(ROOT / SCRIPT,))
    wait_for(tmp_path / "runs" / "cut" / "random-gpt2" / "checkpoints" / "latest.pt", process)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    status, _, said = finish(process)
    assert status == 128 + signal.SIGTERM and "--resume runs/cut/random-gpt2" in said[0]
    assert finish(start(tmp_path, "--resume", "runs/cut/random-gpt2", program=(ROOT / SCRIPT,)))[0] == 0
    whole, cut = (json.loads((tmp_path / "runs" / name / "results.json").read_text()) for name in ("whole", "cut"))
    for result in (*whole, *cut):
        del result["folder"]
    assert whole == cut and len(cut) == 2


def test_a_finished_study_is_trained_on(run_script, tmp_path):
    assert run_script(SCRIPT, *SIZE, "--backbones", "random", "random-gpt2", "--n-layer", "1", "--run-name", "a").status == 0
    result = run_script(SCRIPT, "--resume", "runs/a/random", "--num-epochs", "2")
    assert result.status == 0, result.err
    results = json.loads((tmp_path / "runs" / "a" / "results.json").read_text())
    assert [(r["label"], r["epoch"]) for r in results] == [("random", 2), ("random-gpt2", 2)]


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--backbones", "nope"], ["nope"]),
        (["--runs", "nowhere"], ["nowhere"]),
        (["--confusion-windows", "1"], ["--confusion-windows"]),
        (["--max-grad-norms", "-1"], ["--max-grad-norm"]),
        (["--epochs", "7"], ["epoch"]),
        (["--env", "Hoper-v4"], ["Hoper-v4"]),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, said, run_script, tmp_path):
    result = run_script(SCRIPT, *SIZE, *arguments)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.status == 2 and len(errors) == 1 and "Traceback" not in result.err, result.err
    assert all(word in errors[0] for word in said) and not (tmp_path / "runs").exists()
