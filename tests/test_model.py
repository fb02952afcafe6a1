"""The model against transformers' GPT2Model, ImageGPTModel and DecisionTransformerModel, in float32."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ASSETS, ROOT, SHAPE, make_model, sample_args

import dt_pretrained as dt

FOLDERS = {"gpt2": "text-gpt2", "igpt": "image-gpt"}
BACKBONES = ("gpt2", "igpt", "igpt-as-gpt2", "random", "random-gpt2")


def decision_transformer(backbone):
    model = make_model(dt, backbone, max_timestep=50)
    model.embed_action.weight.data *= (
        0.1  # its tanh must not be saturated, or every model predicts the same
    )
    return model


def reference_backbone(kind, fresh):
    """transformers' own model: the bundled weights, or fresh ones that differ from our initialization everywhere."""
    model_class = {"gpt2": transformers.GPT2Model, "igpt": transformers.ImageGPTModel}[kind]
    reference = model_class.from_pretrained(ASSETS / FOLDERS[kind], dtype=torch.float32)
    if fresh:
        torch.manual_seed(1)
        for parameter in reference.parameters():
            parameter.data.normal_(std=0.1)
    reference.wpe.weight.data.zero_()
    reference.config.is_decoder = (
        True  # without it transformers 5 gives ImageGPT a bidirectional mask
    )
    return reference.eval()


def relative_difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("fresh", [False, True], ids=["bundled", "fresh"])
@pytest.mark.parametrize("kind", ["gpt2", "igpt"])
def test_hidden_states_equal_transformers(kind, fresh):
    reference = reference_backbone(kind, fresh)
    ours = decision_transformer(kind).transformer
    ours.load_state_dict(
        {k: v for k, v in reference.state_dict().items() if not k.startswith(("wte.", "wpe."))}
    )
    x = torch.randn(3, 60, 128)
    theirs = reference(inputs_embeds=x, use_cache=False, output_hidden_states=True)
    differences = []
    for block, expected in zip(ours.h, (*theirs.hidden_states[1:-1], None)):
        x = block(x)
        if expected is not None:
            differences.append(relative_difference(x, expected))
    differences.append(relative_difference(ours.ln_f(x), theirs.last_hidden_state))
    print(f"{kind}: largest relative difference {max(differences):.1e}")
    assert len(differences) == 4 and max(differences) < 1e-4


def random_window(length, batch=2):
    states, actions = torch.randn(batch, length, 11), torch.rand(batch, length, 3) * 2 - 1
    return (
        torch.randn(batch, length, 1),
        states,
        actions,
        torch.arange(5, 5 + length).expand(batch, length),
    )


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["gpt2", "igpt-as-gpt2", "random", "random-gpt2"])
def test_whole_model_equals_transformers_decision_transformer(backbone):
    """Left-padded and masked there, right-padded and unmasked here: the same at every valid step."""
    ours = decision_transformer(backbone)
    ours.embed_timestep.weight.zero_()  # theirs adds it before the LayerNorm
    block = ours.architecture["blocks"][0]
    sizes = dict(
        state_dim=11, act_dim=3, hidden_size=128, n_layer=4, n_head=block["n_head"], max_ep_len=50
    )
    config = transformers.DecisionTransformerConfig(
        **sizes, activation_function=block["activation"], n_positions=256
    )
    theirs = transformers.DecisionTransformerModel(config).eval()
    state = {f"encoder.{k}": v for k, v in ours.transformer.state_dict().items()}
    state |= {k: v for k, v in ours.state_dict().items() if k.startswith("embed_")}
    state |= {
        "predict_action.0.weight": ours.embed_action.weight.T,
        "predict_action.0.bias": torch.zeros(3),
    }
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all(
        k.startswith(("encoder.wte", "encoder.wpe", "predict_")) for k in missing
    )
    theirs.encoder.wpe.weight.zero_()

    valid, K = 13, 20
    window = random_window(valid)
    left = [torch.cat([x.new_ones(2, K - valid, *x.shape[2:]), x], dim=1) for x in window]
    right = [torch.cat([x, x.new_ones(2, K - valid, *x.shape[2:])], dim=1) for x in window]
    inputs = dict(
        returns_to_go=left[0], states=left[1], actions=left[2], rewards=None, timesteps=left[3]
    )
    mask = torch.arange(K).ge(K - valid).long().expand(2, K)
    expected = theirs(**inputs, attention_mask=mask).action_preds[:, K - valid :]
    difference = relative_difference(ours(*right)[:, :valid], expected)
    print(f"{backbone}: largest relative difference {difference:.1e}")
    assert difference < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "igpt"])
def test_time_embedding_after_layer_norm_against_plain_reference(kind):
    """Tokens put together one at a time and sent through transformers' own backbone."""
    ours = decision_transformer(kind)
    reference = reference_backbone(kind, fresh=False)
    returns_to_go, states, actions, timesteps = random_window(7)
    embeddings = (ours.embed_return, ours.embed_state, ours.embed_action)
    tokens = []
    for t in range(7):
        for embedding, values in zip(embeddings, (returns_to_go, states, actions)):
            token = embedding.weight @ values[0, t] + embedding.bias
            token = (token - token.mean()) / (token.var(correction=0) + 1e-5).sqrt()
            token = token * ours.embed_ln.weight + ours.embed_ln.bias
            tokens.append(token + ours.embed_timestep.weight[timesteps[0, t]])
    hidden = reference(inputs_embeds=torch.stack(tokens)[None], use_cache=False).last_hidden_state[
        0
    ]
    expected = torch.tanh(hidden[1::3] @ ours.embed_action.weight)
    assert relative_difference(ours(returns_to_go, states, actions, timesteps)[0], expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
def test_causality(backbone):
    """Changing a step changes no earlier prediction, changing an action not even its own; the next one does change."""
    model = decision_transformer(backbone)
    window = random_window(9)
    before = model(*window)
    for changed in range(3):  # return, state, action of step 5
        later = [x.clone() for x in window]
        later[changed][:, 5] += 1.0
        after = model(*later)
        unchanged = 6 if changed == 2 else 5
        assert torch.equal(before[:, :unchanged], after[:, :unchanged])
        assert not torch.allclose(before[:, unchanged], after[:, unchanged])


def test_igpt_as_gpt2_differs_exactly_by_the_layer_norm():
    real, as_gpt2 = decision_transformer("igpt"), decision_transformer("igpt-as-gpt2")
    ours, theirs = real.state_dict(), as_gpt2.state_dict()
    new = set(theirs) - set(ours)
    norms = [f"transformer.h.{i}.ln_{j}" for i in range(4) for j in (1, 2)] + ["transformer.ln_f"]
    assert new == {f"{norm}.bias" for norm in norms} and not any(theirs[k].any() for k in new)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    for norm in norms:  # exchanging the LayerNorm, and nothing else, makes one the other
        parent, _, name = norm.rpartition(".")
        setattr(as_gpt2.get_submodule(parent), name, real.get_submodule(norm))
    window = random_window(6)
    assert torch.equal(real(*window), as_gpt2(*window))
    assert not torch.allclose(real(*window), decision_transformer("igpt-as-gpt2")(*window))


def test_random_backbones_are_the_papers():
    papers = {"random": (768, 1, 3072, "relu"), "random-gpt2": (768, 12, 3072, "gelu_new")}
    for name, expected in papers.items():
        backbone = dt.load_backbone(dt.Args(backbone=name))
        blocks = backbone.blocks
        assert len(blocks) == 12 and not backbone.weights and not backbone.pretrained
        assert {(b.n_embd, b.n_head, b.n_inner, b.activation) for b in blocks} == {expected}
    for n_layer in (4, 12):  # GPT-2 draws what ends a residual branch smaller, the deeper it is
        torch.manual_seed(0)
        blocks = [dt.BlockConfig(128, 1, 512, "relu")] * n_layer
        block = dt.DecisionTransformer(blocks, "layernorm", **SHAPE).transformer.h[1]
        for layer in (block.attn.c_attn, block.mlp.c_fc):
            assert abs(layer.weight.std().item() / 0.02 - 1) < 0.03 and not layer.bias.any()
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            assert (
                abs(layer.weight.std().item() / (0.02 / (2 * n_layer) ** 0.5) - 1) < 0.03
                and not layer.bias.any()
            )


@pytest.mark.parametrize("kind", ["gpt2", "igpt"])
def test_module_names_are_the_checkpoints(kind):
    names = {name for name, _ in reference_backbone(kind, fresh=False).named_modules()}
    names = {
        name
        for name in names
        if name and not name.startswith(("wte", "wpe")) and "attn_dropout" not in name
    }
    assert names <= {name for name, _ in decision_transformer(kind).transformer.named_modules()}


def test_the_head_starts_as_nn_linear_or_as_asked_for():
    """By default tanh sees a standard deviation of 9 for Hopper's three actions; nothing else changes."""
    block = dt.BlockConfig(768, 1, 3072, "relu")
    backbone = dt.Backbone([block], "layernorm", {}, False, "")
    shape = (11, 3, 1000)
    default = dt.make_model(sample_args(dt), backbone, *shape)
    small = dt.make_model(sample_args(dt, head_std=0.02), backbone, *shape)
    expected = 1 / 3**0.5 / 3**0.5  # uniform between plus and minus 1 / sqrt(3)
    assert abs(default.embed_action.weight.std().item() / expected - 1) < 0.05
    assert abs(small.embed_action.weight.std().item() / 0.02 - 1) < 0.05
    ours, theirs = default.state_dict(), small.state_dict()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {
        "embed_action.weight"
    }
    hidden = torch.nn.functional.layer_norm(torch.randn(1000, 768), (768,))
    assert 8 < (hidden @ default.embed_action.weight).std() < 10


def test_dropout_is_where_the_reference_has_it():
    """On the residual branches as asked for; on attention weights and on the backbone's input 0.1, or none."""
    for dropout, at_most in ((0.2, 0.1), (0.0, 0.0)):
        args = sample_args(dt, backbone="random-gpt2", dropout=dropout)
        model = make_model(dt, dt.load_backbone(args))
        rates = {
            name: module.p
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Dropout)
        }
        assert (
            rates.pop("transformer.drop") == at_most
            and len(rates) == 8
            and set(rates.values()) == {dropout}
        )
        assert {block.attn.attention_dropout for block in model.transformer.h} == {at_most}


def load_local(folder):
    return dt.load_backbone(sample_args(dt, backbone=str(folder)))


@pytest.mark.parametrize("kind", ["gpt2", "igpt"])
def test_pytorch_bin_gives_the_same_weights_as_safetensors(kind, tmp_path):
    """openai/imagegpt-small has only a pytorch_model.bin on the hub."""
    source = ASSETS / FOLDERS[kind]
    shutil.copy(source / "config.json", tmp_path)
    whole = {
        "gpt2": transformers.GPT2LMHeadModel,
        "igpt": transformers.ImageGPTForCausalImageModeling,
    }[kind]
    torch.save(whole.from_pretrained(source).state_dict(), tmp_path / "pytorch_model.bin")
    expected = dt.load_backbone(sample_args(dt, backbone=kind)).weights
    backbone = load_local(tmp_path)
    weights = backbone.weights
    source = backbone.source
    assert (
        backbone.pretrained
        and source == str(tmp_path)
        and weights.keys() == expected.keys()
        and len(weights) in (50, 41)
    )
    assert all(
        torch.equal(weights[k], expected[k]) and weights[k].dtype == torch.float32 for k in expected
    )
    assert not any("wte" in name or "wpe" in name for name in weights)


def test_hub_ids_are_read_from_the_hubs_cache(tmp_path):
    """A cache as the hub's own tools leave it, without a network: in a process of its own, it is set at import."""
    snapshot = (
        tmp_path / "hub" / "models--openai-community--gpt2" / "snapshots" / "0123456789abcdef"
    )
    shutil.copytree(ASSETS / "text-gpt2", snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    code = "import dt_pretrained as dt; backbone = dt.load_backbone(dt.Args(backbone='gpt2')); "
    code += "print(backbone.source, len(backbone.blocks), len(backbone.weights))"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.stdout.split() == ["openai-community/gpt2", "4", "50"], result.stderr


def change_weights(folder, change):
    """Copy the bundled GPT-2 with `change` applied to its weights."""
    from safetensors.torch import load_file, save_file

    weights = load_file(ASSETS / "text-gpt2" / "model.safetensors")
    change(weights)
    shutil.copy(ASSETS / "text-gpt2" / "config.json", folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, capsys):
    with pytest.raises(SystemExit) as end:
        load_local(folder)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.pop("transformer.h.1.mlp.c_fc.bias"),
        lambda w: w.update({"transformer.h.9.mlp.c_fc.bias": torch.zeros(3)}),
        lambda w: w.update({"transformer.h.1.mlp.c_fc.bias": torch.zeros(3)}),
    ],
    ids=["missing", "left over", "misshapen"],
)
def test_incomplete_checkpoints_are_refused(change, tmp_path, capsys):
    change_weights(tmp_path, change)
    assert "mlp.c_fc.bias" in refused(tmp_path, capsys)


@pytest.mark.parametrize("kind", ["gpt2", "igpt"])
def test_masks_of_old_checkpoints_are_no_weights(kind, tmp_path):
    """openai/imagegpt-small keeps the causal mask of each block among its weights, as the first GPT-2 did."""
    from safetensors.torch import load_file, save_file

    weights = load_file(ASSETS / FOLDERS[kind] / "model.safetensors")
    for i in range(4):
        weights[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        weights[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    shutil.copy(ASSETS / FOLDERS[kind] / "config.json", tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = dt.load_backbone(sample_args(dt, backbone=kind)).weights
    loaded = load_local(tmp_path).weights
    assert loaded.keys() == expected.keys() and all(
        torch.equal(loaded[k], expected[k]) for k in expected
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_action_head_and_return_are_float32_under_autocast(precision):
    """Beyond 3.6 bf16's tanh is 1 with a gradient of 0, and returns of 3.600 and 3.601 are one."""
    model = make_model(dt, "random")
    model.embed_action.weight.data.zero_()
    model.embed_action.weight.data[:, 0] = 4 / 128
    model.transformer.ln_f.weight.data.zero_()
    model.transformer.ln_f.bias.data.fill_(1.0)  # a pre-activation of 4, whatever the input
    args = sample_args(dt, precision=precision)
    with dt.autocast(args, torch.device("cpu")):
        action = model(*random_window(1))[0, 0, 0]
        action.backward()
        window = [x[:1] for x in random_window(1)]
        embedded = []
        for value in (3.600, 3.601):
            window[0] = torch.full((1, 1, 1), value)
            embedded.append(model.embed(*window)[0, 0])
    assert action.dtype == torch.float32
    expected = 1 - torch.tanh(torch.tensor(4.0)) ** 2  # 0.0013
    torch.testing.assert_close(
        model.transformer.ln_f.bias.grad.sum(), expected * 4, rtol=1e-2, atol=0
    )
    assert not torch.equal(*embedded)


def test_heads_of_other_models_are_no_business_of_a_backbone(tmp_path):
    """DialoGPT's decoder, double heads, classification and value heads; prefixes of wrappers."""
    heads = ("lm_head.decoder.weight", "multiple_choice_head.summary.weight", "score.weight")

    def add_heads(weights):
        for name in (*heads, "v_head.summary.weight"):
            weights[name] = torch.zeros(2, 128)

    expected = dt.load_backbone(sample_args(dt, backbone="gpt2")).weights
    change_weights(tmp_path, add_heads)
    loaded = load_local(tmp_path).weights
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    for prefix in ("_orig_mod.", "module.", "_orig_mod.module."):

        def add_prefix(weights, prefix=prefix):
            for name in list(weights):
                weights[prefix + name] = weights.pop(name)

        change_weights(tmp_path, add_prefix)
        loaded = load_local(tmp_path).weights
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_weights_that_are_not_finite_are_refused(tmp_path, capsys):
    def add_nan(weights):
        weights["transformer.h.1.mlp.c_fc.bias"][3] = float("nan")

    change_weights(tmp_path, add_nan)
    message = refused(tmp_path, capsys)
    assert "h.1.mlp.c_fc.bias" in message and "not finite" in message


OTHER_CONFIGS = [
    ({"scale_attn_by_inverse_layer_idx": True}, "attention"),
    ({"activation_function": "swish"}, "swish"),
    ({"add_cross_attention": True}, "cross-attention"),
    ({"n_head": 3}, "n_head 3"),
    ({"n_head": -4}, "n_head -4"),
]


@pytest.mark.parametrize("change,said", OTHER_CONFIGS)
def test_gpts_of_another_architecture_are_refused(change, said, tmp_path, capsys):
    change_weights(tmp_path, lambda weights: None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert said in refused(tmp_path, capsys)


@pytest.mark.parametrize("content", [None, {"model_type": "bert"}, {"no": "model_type"}])
def test_folders_that_are_no_gpt_are_refused(content, tmp_path, capsys):
    if content:
        (tmp_path / "config.json").write_text(json.dumps(content))
    assert str(tmp_path) in refused(tmp_path, capsys)
