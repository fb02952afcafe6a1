"""`dt_no_context.py`: attention distance against closed forms, replaced blocks, K = 1, and whole runs."""

import itertools
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ASSETS, TINY, assert_one_sentence, make_model, sample_args

import dt_no_context as dt

SCRIPT = "dt_no_context.py"
SIZE = [*TINY, "--num-epochs", "2", "--attention-windows", "10"]


def random_windows(count=7, K=20):
    states, actions = torch.randn(count, K, 11), torch.rand(count, K, 3) * 2 - 1
    return (
        torch.randn(count, K, 1),
        states,
        actions,
        torch.arange(K).expand(count, K),
        torch.ones(count, K).bool(),
    )


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
    model = make_model(dt, "gpt2")
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[:, :128] = 0
        block.attn.c_attn.bias.data[:128] = 0
    np.testing.assert_allclose(dt.attention_distances(model, random_windows()), 59 / 4, rtol=1e-5)


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
    expected = torch.stack([dt.mean_distance(a) for a in attentions], dim=1)
    np.testing.assert_allclose(dt.attention_distances(model, windows), expected, rtol=1e-4)


def test_gap_is_the_size_of_the_change_of_the_mean_over_heads():
    """One window, two blocks, the second with a single head: block 0 goes from 3 to 2 tokens, block 1 from 5 to 9."""
    before, after = [[[2.0, 4.0], [5.0, np.nan]]], [[[1.0, 3.0], [9.0, np.nan]]]
    np.testing.assert_allclose(dt.gap({0: np.array(before), 4: np.array(after)}, 4), [[1.0, 4.0]])


# ---------------------------------------------------------------------------------------------------------------
# Block replacement
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backbone", ["gpt2", "igpt"])
@pytest.mark.parametrize("index", [0, 2, 3])
def test_the_replaced_block_is_the_source_and_the_others_are_not(backbone, index):
    source = make_model(dt, backbone)
    random = make_model(dt, backbone, partial(dt.load_mixture, block=None))
    mixed = make_model(dt, backbone, partial(dt.load_mixture, block=index))
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
    heads = dt.attention_distances(mixed, random_windows())
    assert heads.shape == (7, 4, 4) and np.isfinite(heads[:, index]).all()
    others = np.delete(heads, index, axis=1)
    assert np.isfinite(others[:, :, 0]).all() and np.isnan(others[:, :, 1:]).all()


def test_a_mixed_model_is_rebuilt_from_its_checkpoint(tmp_path):
    mixed = make_model(dt, "igpt", partial(dt.load_mixture, block=0))
    torch.save(
        dict(architecture=mixed.architecture, model=mixed.state_dict()), tmp_path / "mixed.pt"
    )
    rebuilt, _ = dt.load_model(tmp_path / "mixed.pt", "cpu")
    windows = random_windows()[:4]
    with torch.no_grad():
        assert torch.equal(mixed(*windows), rebuilt(*windows))


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--replace-blocks", "7"], ["0 to 3"]),
        (["--replace-blocks", "1", "--backbone", "random"], ["pre-trained"]),
        (["--compare", "nowhere"], ["nowhere"]),
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
    data = dt.OfflineData(args, env, torch.device("cpu"))
    model = make_model(dt, "gpt2")
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    dt.evaluate(model, env, data, args)
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
    assert all(x.shape[1] == 1 for x in window) and window[-1].all()


# ---------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------
def test_run_with_comparison(run_script, tmp_path):
    earlier = [*TINY, "--num-epochs", "1", "--backbone", "igpt", "--run-name", "earlier"]
    assert run_script("dt_pretrained.py", *earlier).status == 0
    result = run_script(SCRIPT, *SIZE, "--run-name", "a", "--compare", "runs/earlier")
    assert result.status == 0, result.err
    folder = tmp_path / "runs" / "a"
    results = json.loads((folder / "results.json").read_text())
    assert [(run["run"], run["K"]) for run in results["runs"]] == [("gpt2", 1), ("igpt", 20)]
    _, records, _ = dt.read_run(folder)
    assert results["runs"][0]["best_score"] == max(r["normalized_score"] for r in records[1:])
    attention = results["attention_distance"]
    assert [(row["epoch"], row["block"]) for row in attention] == list(
        itertools.product((0, 2), range(4))
    )
    assert all(
        len(row["distance_per_head"]) == 4 and (row["median_gap"] > 0) == (row["epoch"] == 2)
        for row in attention
    )
    for name in ("no_context.png", "attention_distance.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "igpt" in result.out and "best_score" in result.out


def test_replaced_blocks_are_gone_on_with(run_script, tmp_path, monkeypatch):
    """The study is cut off by Ctrl-C in the third run, resumed, and ends as without it."""
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
    assert result.status == 130 and "--resume runs/cut" in result.err
    assert run_script(SCRIPT, "--resume", "runs/cut").status == 0
    whole, cut = (
        (tmp_path / "runs" / name / "results.json").read_text() for name in ("whole", "cut")
    )
    assert whole == cut
    runs = json.loads(cut)["runs"]
    assert [run["run"] for run in runs] == ["random", "gpt2", "block_2"]
    assert len({run["last_loss"] for run in runs}) == 3
    assert (tmp_path / "runs" / "cut" / "block_replacement.png").exists()
