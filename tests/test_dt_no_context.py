"""`dt_no_context.py`: attention distance against closed forms, replaced blocks, K = 1, and whole runs."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import ASSETS, TINY, assert_one_sentence, load_data, make_model, sample_args

import dt_no_context as dt

SCRIPT = "dt_no_context.py"
SIZE = [*TINY, "--num-epochs", "2", "--attention-windows", "10"]


def random_windows(count=7, K=20):
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
    """Uniform causal attention, attention to oneself, and to the first token, of n = 3K tokens."""
    uniform = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    first = torch.zeros(n, n)
    first[:, 0] = 1
    statistics = dt.attention_statistics(torch.stack([uniform, torch.eye(n), first]))
    i = np.arange(n)  # query i has i + 1 keys, of which i // 3 + 1 are returns
    expected = {
        "distance": [(n - 1) / 4, 0, (n - 1) / 2],
        "own_token": [np.mean(1 / (i + 1)), 1, 1 / n],
        "on_returns": [np.mean((i // 3 + 1) / (i + 1)), 1 / 3, 1],
        "on_states": [np.mean(((i + 2) // 3) / (i + 1)), 1 / 3, 0],
        "on_actions": [np.mean(((i + 1) // 3) / (i + 1)), 1 / 3, 0],
        "entropy": [np.mean(np.log(i + 1)), 0, 0],
    }
    assert statistics.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(statistics[name], values, atol=1e-5, err_msg=name)
    for query in range(n):  # a single query looks as far back as it is
        only = torch.zeros(n, n)
        only[query, 0] = 1
        assert abs(dt.attention_statistics(only)["distance"] * n - query) < 1e-4


def test_a_block_whose_queries_vanish_attends_uniformly():
    """Through the whole function: with zero queries every head looks (tokens - 1) / 4 back."""
    model = make_model(dt, "gpt2")
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[:, :128] = 0
        block.attn.c_attn.bias.data[:128] = 0
    statistics = dt.attention_of_heads(model, random_windows())
    np.testing.assert_allclose(statistics["distance"], 59 / 4, rtol=1e-5)
    np.testing.assert_allclose(statistics["entropy"], np.log(np.arange(1, 61)).mean(), rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["gpt2", "igpt", "random"])
def test_weights_are_those_the_block_uses(backbone):
    x = torch.randn(3, 60, 128)
    for block in make_model(dt, backbone).transformer.h:
        weights = dt.attention_weights(block.attn, x)
        assert not weights.triu(1).any()
        value = (
            block.attn.c_attn(x)
            .chunk(3, dim=-1)[2]
            .unflatten(-1, (block.attn.n_head, -1))
            .transpose(1, 2)
        )
        ours = block.attn.c_proj((weights @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(ours, block.attn(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone,kind", [("gpt2", "text-gpt2"), ("igpt", "image-gpt")])
def test_weights_equal_transformers_attentions(backbone, kind):
    """Every block's weights, through the whole model, against output_attentions of transformers' own model."""
    import transformers

    model = make_model(dt, backbone)
    model_class = transformers.GPT2Model if backbone == "gpt2" else transformers.ImageGPTModel
    reference = model_class.from_pretrained(
        ASSETS / kind, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    reference.config.is_decoder = True
    reference.wpe.weight.data.zero_()
    windows = random_windows()
    with torch.no_grad():
        tokens = model.embed(*windows[:4])
        attentions = reference(
            inputs_embeds=tokens, use_cache=False, output_attentions=True
        ).attentions
    ours = dt.attention_of_heads(model, windows)
    for name, values in ours.items():
        expected = torch.stack([dt.attention_statistics(a)[name] for a in attentions], dim=1)
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5, err_msg=name)


def test_gap_is_the_size_of_the_change_of_the_mean_over_heads():
    """One window, two blocks, one with a single head: block 0 goes from 3 to 2, block 1 from 5 to 9."""
    before = {"distance": np.array([[[2.0, 4.0], [5.0, np.nan]]])}
    after = {"distance": np.array([[[1.0, 3.0], [9.0, np.nan]]])}
    np.testing.assert_allclose(dt.distance_gap({0: before, 4: after}, 4), [[1.0, 4.0]])


# ---------------------------------------------------------------------------------------------------------------
# Block replacement
# ---------------------------------------------------------------------------------------------------------------
def mixed_backbone(name, block):
    args = sample_args(dt, backbone=name)
    return dt.mixed_backbone(args, dt.load_backbone(args), block)


@pytest.mark.parametrize("backbone", ["gpt2", "igpt"])
@pytest.mark.parametrize("index", [0, 2, 3])
def test_the_replaced_block_is_the_source_and_the_others_are_not(backbone, index):
    source = make_model(dt, backbone)
    random = make_model(dt, mixed_backbone(backbone, None))
    mixed = make_model(dt, mixed_backbone(backbone, index))
    for i, block in enumerate(mixed.transformer.h):
        expected = (source if i == index else random).transformer.h[i]
        assert block.attn.n_head == (4 if i == index else 1) and type(block.mlp.act) is type(
            expected.mlp.act
        )
        assert type(block.ln_1) is type(expected.ln_1)
        ours, theirs = block.state_dict(), expected.state_dict()
        assert ours.keys() == theirs.keys() and (
            i != index or all(torch.equal(ours[k], theirs[k]) for k in ours)
        )
        other = (random if i == index else source).transformer.h[i].state_dict()
        assert not torch.equal(ours["attn.c_attn.weight"], other["attn.c_attn.weight"])
    heads = dt.attention_of_heads(mixed, random_windows())["distance"]
    assert heads.shape == (7, 4, 4) and np.isfinite(heads[:, index]).all()
    others = np.delete(heads, index, axis=1)
    assert np.isfinite(others[:, :, 0]).all() and np.isnan(others[:, :, 1:]).all()


def test_a_mixed_model_is_rebuilt_from_its_checkpoint(tmp_path):
    mixed = make_model(dt, mixed_backbone("igpt", 0))
    torch.save(
        dict(architecture=mixed.architecture, model=mixed.state_dict()), tmp_path / "mixed.pt"
    )
    rebuilt = dt.load_model(tmp_path / "mixed.pt", "cpu")
    windows = random_windows()[:4]
    with torch.no_grad():
        assert torch.equal(mixed(*windows), rebuilt(*windows))


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--replace-blocks", "7"], ["0 to 3"]),
        (["--replace-blocks", "1", "--backbone", "random"], ["pre-trained"]),
        (["--runs", "nowhere"], ["nowhere"]),
        (["--attention-epochs"], ["--attention-epochs"]),
        (["--dataset", "missing.hdf5"], ["missing.hdf5"]),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, said, run_script):
    assert_one_sentence(run_script(SCRIPT, *SIZE, *arguments), *said)


# ---------------------------------------------------------------------------------------------------------------
# Without context
# ---------------------------------------------------------------------------------------------------------------
def test_with_one_step_no_output_depends_on_another_step():
    """Each action of an evaluation comes from the current step alone, and windows of training hold one step."""
    args = sample_args(dt)
    assert args.context_length == 1
    env = dt.make_env(args, 3)
    data = load_data(dt, args)
    model = make_model(dt, "gpt2")
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    dt.evaluate(model, env, data.state_mean, data.state_std, args)
    for (returns_to_go, states, actions, timesteps), output in seen[:5] + seen[-5:]:
        assert states.shape[1] == 1
        parts = [
            [x[i : i + 1] for x in (returns_to_go, states, actions + 5, timesteps)]
            for i in range(len(states))
        ]
        alone = torch.cat(
            [model(*part) for part in parts]
        )  # no other copy, no other step, not even its own action
        torch.testing.assert_close(alone, output, rtol=1e-4, atol=1e-5)
    window = data.windows(torch.tensor([0, 10]), args.context_length)
    assert all(x.shape[1] == 1 for x in window) and window.valid.all()


# ---------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------
def test_a_run_and_finished_runs_side_by_side(run_script, tmp_path):
    """A run with K = 1, and then beside one of dt_pretrained.py with K = 20, without training."""
    earlier = [*TINY, "--num-epochs", "1", "--backbone", "igpt", "--run-name", "earlier"]
    assert run_script("dt_pretrained.py", *earlier).status == 0
    result = run_script(SCRIPT, *SIZE, "--run-name", "a")
    assert result.status == 0, result.err
    folder = tmp_path / "runs" / "a"
    records = dt.read_run(folder).records
    alone = json.loads((folder / "results.json").read_text())
    assert alone["runs"][0]["best_score"] == max(r["normalized_score"] for r in records[1:])
    rows = alone["attention"]
    assert [(row["epoch"], row["block"]) for row in rows] == [*itertools.product((0, 2), range(4))]
    for row in rows:
        assert len(row["distance"]) == len(row["entropy"]) == 4
        assert (row["median_gap"] > 0) == (row["epoch"] == 2)
        kinds = [row["on_returns"], row["on_states"], row["on_actions"]]
        np.testing.assert_allclose(np.sum(kinds, axis=0), 1, rtol=1e-5)
    for name in ("learning_curves.png", "attention_gaps.png", "attention_heads.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

    finished = [
        "--runs",
        "runs/a",
        "runs/earlier",
        "--attention-epochs",
        "0",
        "1",
        "--run-name",
        "b",
    ]
    result = run_script(SCRIPT, *SIZE, *finished)
    assert result.status == 0 and "igpt" in result.out and "best_score" in result.out, result.err
    both = json.loads((tmp_path / "runs" / "b" / "results.json").read_text())
    assert [(run["run"], run["K"]) for run in both["runs"]] == [("gpt2", 1), ("igpt", 20)]
    assert {row["epoch"] for row in both["attention"]} == {0, 1}
    before = [row for row in both["attention"] if row["label"] == "gpt2" and row["epoch"] == 0]
    assert [row["distance"] for row in before] == [row["distance"] for row in rows[:4]]
    assert not list((tmp_path / "runs" / "b").glob("*.pt"))


def test_replaced_blocks_are_gone_on_with(run_script, tmp_path, monkeypatch):
    """The study is cut off by Ctrl-C in the third run, goes on, and ends as without it."""
    run = [*SIZE, "--num-epochs", "1", "--replace-blocks", "2", "--attention-windows", "4"]
    assert run_script(SCRIPT, *run, "--run-name", "whole").status == 0
    steps, step = itertools.count(1), torch.optim.AdamW.step

    def interrupting_step(self, *arguments):
        if next(steps) == 2 * 6 + 2:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupting_step)
        result = run_script(SCRIPT, *run, "--run-name", "cut")
    assert result.status == 130 and "--run-name cut" in result.err
    assert run_script(SCRIPT, *run, "--run-name", "cut").status == 0
    whole, cut = (
        (tmp_path / "runs" / name / "results.json").read_text().replace(f"runs/{name}", "")
        for name in ("whole", "cut")
    )
    assert whole == cut
    runs = json.loads(cut)["runs"]
    assert [run["run"] for run in runs] == ["random", "gpt2", "block 2"]
    assert len({run["last_loss"] for run in runs}) == 3
    kept = {path.name for path in (tmp_path / "runs" / "cut" / "block_2").glob("*.pt")}
    assert kept == {"epoch_0.pt", "epoch_1.pt"}  # what the attention of its epochs needs
