"""`build_assets.py`: the Markov chain against its closed forms, and the backbones made of it."""

import math

import build_assets
import pytest
import torch
import transformers
from conftest import ASSETS, sample_args

import dt_pretrained as dt


def test_entropy_rate_of_chains_with_known_answers():
    uniform = torch.full((100, 100), 0.01, dtype=torch.float64)
    assert abs(build_assets.entropy_rate(uniform) - math.log(100)) < 1e-9
    cycle = torch.eye(5, dtype=torch.float64).roll(1, dims=1)
    assert abs(build_assets.entropy_rate(cycle)) < 1e-9
    p, q = (
        0.1,
        0.4,
    )  # two states that are left with probability p and q; they are held q and p of the time
    two = torch.tensor([[1 - p, p], [q, 1 - q]], dtype=torch.float64)
    entropies = [-x * math.log(x) - (1 - x) * math.log(1 - x) for x in (p, q)]
    expected = (q * entropies[0] + p * entropies[1]) / (p + q)
    assert abs(build_assets.entropy_rate(two) - expected) < 1e-9
    torch.testing.assert_close(
        build_assets.stationary_distribution(two), torch.tensor([0.8, 0.2], dtype=torch.float64)
    )


def test_walks_follow_the_transitions():
    transitions = build_assets.transition_matrix(0.026, 666)
    torch.manual_seed(0)
    start = build_assets.stationary_distribution(transitions)
    states = build_assets.walk(transitions, start, 50, 2000)
    assert states.shape == (2000, 50) and states.max() < 100
    for column in (states[:, 0], states[:, -1]):  # stationary from beginning to end
        assert (torch.bincount(column, minlength=100) / 2000 - start).abs().max() < 0.02
    surprise = -transitions[states[:, :-1], states[:, 1:]].log().mean()
    assert abs(surprise - build_assets.entropy_rate(transitions)) < 0.03


@pytest.mark.parametrize("name,temperature", [("markov", 1.0), ("markov-sharp", 0.026)])
def test_the_bundled_backbone_has_learned_its_chain(name, temperature):
    """Held-out cross-entropy above the entropy rate, as it must be, and below that of knowing no transition."""
    transitions = build_assets.transition_matrix(temperature, 666)
    start = build_assets.stationary_distribution(transitions)
    model = transformers.GPT2LMHeadModel.from_pretrained(ASSETS / name, dtype=torch.float32).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        loss = build_assets.causal_loss(
            model, build_assets.walk(transitions, start, 64, 200)
        ).item()
    rate, no_transitions = (
        build_assets.entropy_rate(transitions),
        -(start * start.log()).sum().item(),
    )
    print(
        f"{name}: cross-entropy {loss:.3f}, entropy rate {rate:.3f}, stationary distribution {no_transitions:.3f}"
    )
    assert rate - 0.03 < loss < no_transitions + 0.01 and (
        temperature == 1 or loss < (rate + no_transitions) / 2
    )
    backbone = dt.load_backbone(sample_args(dt, backbone=str(ASSETS / name)))
    assert len(backbone.configs) == 4 and torch.equal(
        backbone.weights["h.3.mlp.c_fc.weight"], model.transformer.h[3].mlp.c_fc.weight
    )


def test_a_folder_made_by_the_builder_is_a_backbone(tmp_path):
    args = build_assets.Args(steps=24, n_layer=2, n_head=2, n_embd=32)
    build_assets.build_markov(args, tmp_path / "mine", 0.5)
    backbone = dt.load_backbone(sample_args(dt, backbone=str(tmp_path / "mine")))
    assert [(config.n_embd, config.n_head) for config in backbone.configs] == [(32, 2)] * 2
    assert len(backbone.weights) == 2 + 2 * 12 + 2  # embeddings, blocks, ln_f
