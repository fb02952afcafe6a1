"""`dt_no_context.py`: attention distance against closed forms, replaced blocks, K = 1, and whole runs."""

import json
import signal
import time

import numpy as np
import pytest
import torch
from conftest import ASSETS, ROOT
from test_interruptions import finish, start, wait_for

import dt_no_context as dt

SCRIPT = "dt_no_context.py"
SIZE = ["--sample", "--num-epochs", "2", "--steps-per-epoch", "6", "--num-eval-episodes", "2", "--attention-windows", "10"]
SHAPE = dict(state_dim=11, act_dim=3, max_timestep=1000)


def sample_model(backbone, member="", **changes):
    torch.manual_seed(0)
    replaced = (0,) if member else ()
    args = dt.resolve(dt.Args(backbone=backbone, sample=True, device="cpu", member=member, replace_blocks=replaced, **changes))
    model, architecture, _, eps = dt.make_model(args, SHAPE)
    return model.eval(), architecture, eps


def random_windows(count=7, K=20):
    states, actions = torch.randn(count, K, 11), torch.rand(count, K, 3) * 2 - 1
    return torch.randn(count, K, 1), states, actions, torch.arange(K).expand(count, K)


# ---------------------------------------------------------------------------------------------------------------
# Attention distance
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 60])
def test_closed_forms(n):
    """Query i looks i / 2 back under uniform causal attention, 0 at itself, i at the first token."""
    uniform = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    first = torch.zeros(n, n)
    first[:, 0] = 1
    assert abs(dt.mean_distance(uniform) - (n - 1) / 4) < 1e-5
    assert dt.mean_distance(torch.eye(n)) == 0
    assert abs(dt.mean_distance(first) - (n - 1) / 2) < 1e-5
    for i in range(n):  # a single query
        only = torch.zeros(n, n)
        only[i, 0] = 1
        assert abs(dt.mean_distance(only) * n - i) < 1e-4


def test_a_block_whose_queries_vanish_attends_uniformly():
    """Through the whole function: with zero queries every head looks (tokens - 1) / 4 back."""
    model, _, _ = sample_model("gpt2")
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[:, :128] = 0
        block.attn.c_attn.bias.data[:128] = 0
    np.testing.assert_allclose(dt.attention_distances(model, random_windows()), 59 / 4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["gpt2", "igpt", "random"])
def test_weights_are_those_the_block_uses(backbone):
    model, _, _ = sample_model(backbone)
    x = torch.randn(3, 60, 128)
    for block in model.transformer.h:
        weights = dt.attention_weights(block.attn, x)
        assert not weights.triu(1).any()
        value = block.attn.c_attn(x).chunk(3, dim=-1)[2].unflatten(-1, (block.attn.n_head, -1)).transpose(1, 2)
        ours = block.attn.c_proj((weights @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(ours, block.attn(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone,kind", [("gpt2", "text-gpt2"), ("igpt", "image-gpt")])
def test_weights_equal_transformers_attentions(backbone, kind):
    """Every block's weights, through the whole model, against output_attentions of transformers' own model."""
    import transformers

    model, _, _ = sample_model(backbone)
    model_class = transformers.GPT2Model if backbone == "gpt2" else transformers.ImageGPTModel
    reference = model_class.from_pretrained(ASSETS / kind, dtype=torch.float32, attn_implementation="eager").eval()
    reference.config.is_decoder = True
    reference.wpe.weight.data.zero_()
    windows = random_windows()
    with torch.no_grad():
        tokens = model.embed(*windows)
        attentions = reference(inputs_embeds=tokens, use_cache=False, output_attentions=True).attentions
    expected = torch.stack([dt.mean_distance(a) for a in attentions], dim=1)
    np.testing.assert_allclose(dt.attention_distances(model, windows, chunk_size=2), expected, rtol=1e-4)


def test_chunks_do_not_matter_and_missing_heads_are_nan():
    model, _, _ = sample_model("gpt2", "block_1")
    windows = random_windows()
    whole, chunked = (dt.attention_distances(model, windows, chunk_size=size) for size in (7, 2))
    np.testing.assert_allclose(whole, chunked, rtol=1e-5)
    assert whole.shape == (7, 4, 4)
    assert np.isfinite(whole[:, 1]).all() and np.isfinite(whole[:, 0, 0]).all() and np.isnan(whole[:, 0, 1:]).all()


# ---------------------------------------------------------------------------------------------------------------
# Block replacement
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backbone", ["gpt2", "igpt"])
@pytest.mark.parametrize("index", [0, 2, 3])
def test_the_replaced_block_is_the_source_and_the_others_are_not(backbone, index):
    source, _, _ = sample_model(backbone)
    random, _, _ = sample_model(backbone, "random")
    mixed, architecture, eps = sample_model(backbone, f"block_{index}")
    assert eps == 1e-8 and list(architecture["blocks"]) == [index]
    for i, block in enumerate(mixed.transformer.h):
        expected = (source if i == index else random).transformer.h[i]
        assert block.attn.n_head == (4 if i == index else 1) and type(block.mlp.act) is type(expected.mlp.act)
        assert type(block.ln_1) is type(expected.ln_1)
        ours, theirs = block.state_dict(), expected.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
        other = (random if i == index else source).transformer.h[i].state_dict()
        assert not torch.equal(ours["attn.c_attn.weight"], other["attn.c_attn.weight"])


def test_a_mixed_model_is_rebuilt_from_its_checkpoint():
    mixed, architecture, _ = sample_model("igpt", "block_0")
    rebuilt = dt.rebuild_model(dict(architecture=architecture, model=mixed.state_dict()), "cpu")
    windows = random_windows()
    with torch.no_grad():
        assert torch.equal(mixed(*windows), rebuilt(*windows))


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--replace-blocks", "1", "--n-embd", "64"], ["128 wide", "64"]),
        (["--replace-blocks", "7"], ["no block 7", "4 blocks"]),
        (["--replace-blocks", "1", "--backbone", "random"], ["pre-trained"]),
        (["--attention-epochs", "0", "9"], ["--attention-epochs 9", "--num-epochs 2"]),
        (["--compare", "nowhere"], ["nowhere"]),
        (["--n-layer", "3"], ["random backbones"]),
        (["--dataset", "missing.hdf5"], ["missing.hdf5"]),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, said, run_script, tmp_path):
    result = run_script(SCRIPT, *SIZE, *arguments)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.status == 2 and len(errors) == 1 and "Traceback" not in result.err, result.err
    assert all(word in errors[0] for word in said) and not (tmp_path / "runs").exists()


def test_gap_is_the_size_of_the_change_of_the_mean_over_heads():
    """One window, two blocks, the second with a single head: block 0 goes from 3 to 2 tokens, block 1 from 5 to 9."""
    before, after = [[[2.0, 4.0], [5.0, np.nan]]], [[[1.0, 3.0], [9.0, np.nan]]]
    distances = {0: np.array(before), 4: np.array(after)}
    np.testing.assert_allclose(dt.gap(distances, 4), [[1.0, 4.0]])


def test_moving_average():
    np.testing.assert_allclose(dt.moving_average([1.0, 2.0, 0.0]), [1.0, 1.2, 0.96])


# ---------------------------------------------------------------------------------------------------------------
# Without context
# ---------------------------------------------------------------------------------------------------------------
def test_with_one_step_no_output_depends_on_another_step():
    """Each action of an evaluation comes from the current step alone, and windows of training hold one step."""
    assert dt.Args().context_length == 1
    args = dt.resolve(dt.Args(sample=True, device="cpu", env="Hopper-v5"))
    env = dt.make_env(args, 3)
    data = dt.load_data(args, env)
    model, _, _, _ = dt.make_model(args, SHAPE)
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    dt.evaluate(model, env, data, args, [1, 2, 3])
    calls = seen[:5] + seen[-5:]
    for (returns_to_go, states, actions, timesteps), output in calls:
        assert states.shape[1] == 1
        parts = [[x[i : i + 1] for x in (returns_to_go, states, actions + 5, timesteps)] for i in range(len(states))]
        alone = torch.cat([model(*part) for part in parts])  # no other copy, no other step, not even its own action
        torch.testing.assert_close(alone, output, rtol=1e-4, atol=1e-5)
    window = data.windows(torch.tensor([0, 10]), args.context_length)
    assert all(x.shape[1] == 1 for x in window) and window[-1].all()


# ---------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------
def test_run_with_comparison(run_script, tmp_path):
    size = [x for x in SIZE if x not in ("--attention-windows", "10")]
    assert run_script("dt_pretrained.py", *size, "--backbone", "igpt", "--run-name", "earlier").status == 0
    result = run_script(SCRIPT, *SIZE, "--run-name", "a", "--compare", "runs/earlier")
    assert result.status == 0, result.err
    folder = tmp_path / "runs" / "a"
    results = json.loads((folder / "results.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["script"] == "dt_no_context" and summary["context_length"] == 1
    assert [(run["name"], run["context_length"]) for run in results["runs"]] == [("gpt2", 1), ("igpt", 20)]
    assert results["runs"][0]["epochs"] == summary["epochs"]
    attention = results["attention_distance"]["attention"]
    assert np.array(attention["distance"]["0"]).shape == (4, 4) and not np.any(attention["gap"]["0"])
    assert np.array(attention["gap"]["2"]).shape == (10, 4) and np.any(attention["gap"]["2"])
    saved = np.load(folder / "attention_distance.npz")
    np.testing.assert_allclose(saved["distance_epoch_2"].mean(axis=0), attention["distance"]["2"], rtol=1e-6)
    for name in ("learning_curve.png", "attention_distance.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "igpt" in result.out and "best score" in result.out


def test_blocks_are_replaced_interrupted_and_resumed(tmp_path):
    """A SIGTERM in the middle of the second block; resumed, everything ends bit for bit as without it."""
    arguments = [*SIZE, "--replace-blocks", "0", "2", "--steps-per-epoch", "25"]
    assert finish(start(tmp_path, *arguments, "--run-name", "whole", program=(ROOT / SCRIPT,)))[0] == 0
    process = start(tmp_path, *arguments, "--run-name", "cut", program=(ROOT / SCRIPT,))
    run = tmp_path / "runs" / "cut" / "block_0"
    wait_for(run / "checkpoints" / "latest.pt", process)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    status, _, said = finish(process)
    assert status == 128 + signal.SIGTERM and "--resume runs/cut/block_0" in said[0]
    assert not (tmp_path / "runs" / "cut" / "results.json").exists()
    assert finish(start(tmp_path, "--resume", "runs/cut/block_0", program=(ROOT / SCRIPT,)))[0] == 0
    whole, cut = (json.loads((tmp_path / "runs" / name / "results.json").read_text()) for name in ("whole", "cut"))
    for run in (*whole["runs"], *cut["runs"]):
        del run["folder"]
    assert whole == cut and [run["name"] for run in cut["runs"]] == ["random", "gpt2", "block_0", "block_2"]
    assert len({run["epochs"][-1]["loss"] for run in cut["runs"]}) == 4
    assert (tmp_path / "runs" / "cut" / "block_replacement.png").exists()
