"""The model, and what it is loaded from, against transformers' own models, in float32."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import ASSETS, load_data, make_model, sample_args
from safetensors.torch import load_file, save_file

import dt_pretrained as dt

FOLDERS = {"gpt2": "text-gpt2", "igpt": "image-gpt"}
BACKBONES = ("gpt2", "igpt", "igpt-as-gpt2", "random", "random-gpt2")


def decision_transformer(backbone):
    model = make_model(dt, backbone, max_timestep=50)
    model.embed_action.weight.data *= 0.1  # saturated, every model would predict the same
    return model


def reference_backbone(kind, fresh=False):
    """transformers' own model with the bundled weights, or with fresh ones everywhere."""
    model_class = {"gpt2": transformers.GPT2Model, "igpt": transformers.ImageGPTModel}[kind]
    reference = model_class.from_pretrained(ASSETS / FOLDERS[kind], dtype=torch.float32)
    if fresh:
        torch.manual_seed(1)
        for parameter in reference.parameters():
            parameter.data.normal_(std=0.1)
    reference.wpe.weight.data.zero_()
    reference.config.is_decoder = True  # without it transformers 5 gives ImageGPT no causal mask
    return reference.eval()


def assert_close(ours, theirs):
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    assert difference < 1e-4, difference


def random_window(length, batch=2):
    generator = torch.Generator().manual_seed(length)
    returns_to_go = torch.randn(batch, length, 1, generator=generator)
    states = torch.randn(batch, length, 11, generator=generator)
    actions = torch.rand(batch, length, 3, generator=generator) * 2 - 1
    timesteps = torch.arange(5, 5 + length).expand(batch, length)
    return returns_to_go, states, actions, timesteps


@torch.no_grad()
@pytest.mark.parametrize("fresh", [False, True], ids=["bundled", "fresh"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_hidden_states_equal_transformers(kind, fresh):
    reference = reference_backbone(kind, fresh)
    ours = decision_transformer(kind).transformer
    weights = reference.state_dict()
    ours.load_state_dict({k: v for k, v in weights.items() if not k.startswith(("wte.", "wpe."))})
    x = torch.randn(3, 60, 128)
    theirs = reference(inputs_embeds=x, use_cache=False, output_hidden_states=True)
    assert len(ours.h) == 4 == len(theirs.hidden_states) - 1
    for block, expected in zip(ours.h, theirs.hidden_states[1:-1]):
        x = block(x)
        assert_close(x, expected)
    assert_close(ours.ln_f(ours.h[-1](x)), theirs.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["gpt2", "igpt-as-gpt2", "random", "random-gpt2"])
def test_whole_model_equals_transformers_decision_transformer(backbone):
    """Left-padded and masked there, right-padded and unmasked here: the same at every valid step."""
    ours = decision_transformer(backbone)
    ours.embed_timestep.weight.zero_()  # theirs adds it before the LayerNorm
    block = ours.architecture["configs"][0]
    config = transformers.DecisionTransformerConfig(
        state_dim=11,
        act_dim=3,
        hidden_size=128,
        n_layer=4,
        n_head=block["n_head"],
        max_ep_len=50,
        activation_function=block["activation"],
        n_positions=256,
    )
    theirs = transformers.DecisionTransformerModel(config).eval()
    state = {f"encoder.{k}": v for k, v in ours.transformer.state_dict().items()}
    state |= {k: v for k, v in ours.state_dict().items() if k.startswith("embed_")}
    state["predict_action.0.weight"] = ours.embed_action.weight.T
    state["predict_action.0.bias"] = torch.zeros(3)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    not_ours = ("encoder.wte", "encoder.wpe", "predict_")
    assert not unexpected and all(name.startswith(not_ours) for name in missing)
    theirs.encoder.wpe.weight.zero_()

    valid, K = 13, 20
    window = random_window(valid)
    left = [torch.cat([x.new_ones(2, K - valid, *x.shape[2:]), x], dim=1) for x in window]
    right = [torch.cat([x, x.new_ones(2, K - valid, *x.shape[2:])], dim=1) for x in window]
    expected = theirs(
        returns_to_go=left[0],
        states=left[1],
        actions=left[2],
        timesteps=left[3],
        rewards=None,
        attention_mask=torch.arange(K).ge(K - valid).long().expand(2, K),
    ).action_preds[:, K - valid :]
    assert_close(ours(*right)[:, :valid], expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", FOLDERS)
def test_tokens_against_a_plain_reference(kind):
    """Tokens put together one at a time, the time after the LayerNorm, into transformers' model."""
    ours = decision_transformer(kind)
    returns_to_go, states, actions, timesteps = random_window(7)
    tokens = []
    for t in range(7):
        for embedding, values in (
            (ours.embed_return, returns_to_go),
            (ours.embed_state, states),
            (ours.embed_action, actions),
        ):
            token = embedding.weight @ values[0, t] + embedding.bias
            token = (token - token.mean()) / (token.var(correction=0) + 1e-5).sqrt()
            token = token * ours.embed_ln.weight + ours.embed_ln.bias
            tokens.append(token + ours.embed_timestep.weight[timesteps[0, t]])
    theirs = reference_backbone(kind)(inputs_embeds=torch.stack(tokens)[None], use_cache=False)
    expected = torch.tanh(theirs.last_hidden_state[0, 1::3] @ ours.embed_action.weight)
    assert_close(ours(returns_to_go, states, actions, timesteps)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
def test_causality(backbone):
    """A step changes no earlier prediction, its action not even its own; the next one it does."""
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
    norms = [f"transformer.h.{i}.ln_{j}" for i in range(4) for j in (1, 2)] + ["transformer.ln_f"]
    new = {f"{norm}.bias" for norm in norms}
    assert theirs.keys() - ours.keys() == new and not any(theirs[name].any() for name in new)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    window = random_window(6)
    assert not torch.allclose(real(*window), as_gpt2(*window))
    for norm in norms:  # exchanging the LayerNorm, and nothing else, makes one the other
        parent, _, name = norm.rpartition(".")
        setattr(as_gpt2.get_submodule(parent), name, real.get_submodule(norm))
    assert torch.equal(real(*window), as_gpt2(*window))


def test_random_backbones_are_the_papers():
    papers = {"random": (768, 1, 3072, "relu"), "random-gpt2": (768, 12, 3072, "gelu_new")}
    for name, expected in papers.items():
        blocks, _, weights = dt.load_backbone(dt.Args(backbone=name))
        assert len(blocks) == 12 and not weights
        assert {(b.n_embd, b.n_head, b.n_inner, b.activation) for b in blocks} == {expected}
    for n_layer in (4, 12):  # GPT-2 draws what ends a residual branch smaller, the deeper it is
        blocks = [dt.BlockConfig(128, 1, 512, "relu")] * n_layer
        block = make_model(dt, dt.Backbone(blocks, "layernorm", {})).transformer.h[1]
        for layer, expected in (
            (block.attn.c_attn, 0.02),
            (block.mlp.c_fc, 0.02),
            (block.attn.c_proj, 0.02 / (2 * n_layer) ** 0.5),
            (block.mlp.c_proj, 0.02 / (2 * n_layer) ** 0.5),
        ):
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.03)
            assert not layer.bias.any()


def test_the_head_starts_as_nn_linear_or_as_asked_for():
    """By default the tanh sees a deviation of 9 for Hopper's three actions; nothing else changes."""
    backbone = dt.Backbone([dt.BlockConfig(768, 1, 3072, "relu")], "layernorm", {})
    data = load_data(dt, sample_args(dt))
    default = dt.make_model(sample_args(dt), backbone, data, 1000)
    small = dt.make_model(sample_args(dt, head_std=0.02), backbone, data, 1000)
    nn_linear = 1 / 3**0.5 / 3**0.5  # uniform between plus and minus 1 / sqrt(3)
    assert default.embed_action.weight.std().item() == pytest.approx(nn_linear, rel=0.05)
    assert small.embed_action.weight.std().item() == pytest.approx(0.02, rel=0.05)
    ours, theirs = default.state_dict(), small.state_dict()
    differ = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert differ == {"embed_action.weight"}
    hidden = torch.nn.functional.layer_norm(torch.randn(1000, 768), (768,))
    assert 8 < (hidden @ default.embed_action.weight).std() < 10


@pytest.mark.parametrize("dropout,at_most", [(0.2, 0.1), (0.0, 0.0)])
def test_dropout_is_where_the_reference_has_it(dropout, at_most):
    """As asked for on the residual branches; 0.1 or none on attention and the backbone's input."""
    model = make_model(dt, dt.load_backbone(sample_args(dt, backbone="random", dropout=dropout)))
    rates = {k: m.p for k, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert rates.pop("transformer.drop") == at_most
    assert len(rates) == 8 and set(rates.values()) == {dropout}
    assert {block.attn.attention_dropout for block in model.transformer.h} == {at_most}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_action_head_and_return_are_float32_under_autocast(precision):
    """Beyond 3.6 bf16's tanh is 1 with a gradient of 0, and returns of 3.600 and 3.601 are one."""
    model = make_model(dt, "random")
    model.embed_action.weight.data.zero_()
    model.embed_action.weight.data[:, 0] = 4 / 128
    model.transformer.ln_f.weight.data.zero_()
    model.transformer.ln_f.bias.data.fill_(1.0)  # a pre-activation of 4, whatever the input
    window = list(random_window(1, batch=1))
    embedded = []
    with dt.autocast(sample_args(dt, precision=precision)):
        action = model(*window)[0, 0, 0]
        action.backward()
        for value in (3.600, 3.601):
            window[0] = torch.full((1, 1, 1), value)
            embedded.append(model.embed(*window)[0, 0])
    assert action.dtype == torch.float32 and not torch.equal(*embedded)
    expected = 4 * (1 - torch.tanh(torch.tensor(4.0)) ** 2)  # 0.005
    gradient = model.transformer.ln_f.bias.grad.sum()
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=0)


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------
@pytest.fixture
def checkpoint(tmp_path):
    """Copy a bundled model into an empty folder, changed, and load it as --backbone."""

    def load(kind, change=None, **config):
        source = ASSETS / FOLDERS[kind]
        weights = load_file(source / "model.safetensors")
        if change:
            change(weights)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps(config))
        return dt.load_backbone(sample_args(dt, backbone=str(tmp_path)))

    return load


def assert_same_weights(backbone, kind):
    expected = dt.load_backbone(sample_args(dt, backbone=kind)).weights
    assert backbone.weights.keys() == expected.keys() and len(expected) in (52, 43)
    assert backbone.weights["wpe.weight"].any()  # not used here, but a fork may want it
    for name, weight in backbone.weights.items():
        assert torch.equal(weight, expected[name]) and weight.dtype == torch.float32


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_bin_file_gives_the_same_weights_as_safetensors(kind, tmp_path):
    """openai/imagegpt-small has only a pytorch_model.bin on the hub."""
    shutil.copy(ASSETS / FOLDERS[kind] / "config.json", tmp_path)
    torch.save(
        load_file(ASSETS / FOLDERS[kind] / "model.safetensors"), tmp_path / "pytorch_model.bin"
    )
    assert_same_weights(dt.load_backbone(sample_args(dt, backbone=str(tmp_path))), kind)


def add_masks(weights):
    for i in range(4):
        weights[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        weights[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)


def add_heads(weights):
    for name in (
        "lm_head.weight",
        "lm_head.decoder.weight",
        "score.weight",
        "v_head.summary.weight",
    ):
        weights[name] = torch.zeros(2, 128)


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("change", [add_masks, add_heads])
def test_heads_of_others_and_masks_of_old_checkpoints_are_no_weights(kind, change, checkpoint):
    assert_same_weights(checkpoint(kind, change), kind)


BIAS = "transformer.h.1.mlp.c_fc.bias"


@pytest.mark.parametrize(
    "change,config,said",
    [
        (lambda weights: weights.pop(BIAS), {}, "h.1.mlp.c_fc.bias"),
        (None, {"n_layer": 5}, "h.4."),
        (lambda weights: weights.update({BIAS: torch.zeros(3)}), {}, "cannot be used"),
        (lambda weights: weights[BIAS].fill_(torch.nan), {}, "compute something else"),
        (None, {"scale_attn_by_inverse_layer_idx": True}, "compute something else"),
        (None, {"add_cross_attention": True}, "missing"),
        (None, {"activation_function": "swish"}, "swish"),
        (None, {"activation_function": "mine"}, "mine"),
        (None, {"n_head": 3}, "cannot be used"),
    ],
    ids=["missing", "block", "shape", "nan", "scaling", "cross", "swish", "unknown", "heads"],
)
def test_checkpoints_that_our_blocks_do_not_compute_are_refused(change, config, said, checkpoint):
    with pytest.raises(SystemExit, match=r"^[^\n]*$") as end:
        checkpoint("gpt2", change, **config)
    assert "--backbone" in end.value.code and said in end.value.code


def test_cross_attention_is_refused_by_what_it_computes_or_misses(checkpoint):
    """Also where its weights are there."""
    config = transformers.GPT2Config.from_pretrained(ASSETS / "text-gpt2", add_cross_attention=True)
    whole = transformers.GPT2Model(config).state_dict()
    cross = {f"transformer.{k}": v for k, v in whole.items() if "cross" in k}
    assert cross
    with pytest.raises(SystemExit, match=r"cannot be used.*crossattention"):
        checkpoint("gpt2", lambda weights: weights.update(cross), add_cross_attention=True)


@pytest.mark.parametrize(
    "config", [transformers.LlamaConfig(), transformers.BertConfig()], ids=["llama", "bert"]
)
def test_other_models_are_refused_before_their_weights_are_looked_at(config, tmp_path, monkeypatch):
    config.save_pretrained(tmp_path)
    looked_at = []
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", looked_at.append)
    with pytest.raises(
        SystemExit, match=rf"{tmp_path} cannot be used.*it is a {config.model_type}"
    ):
        dt.load_backbone(sample_args(dt, backbone=str(tmp_path)))
    assert not looked_at


@pytest.mark.parametrize("content", [None, {"no": "model_type"}])
def test_folders_that_are_no_model_are_refused(content, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=f"^--backbone {tmp_path} cannot be used[^\n]*$"):
        dt.load_backbone(sample_args(dt, backbone=str(tmp_path)))


def test_code_that_a_checkpoint_brings_is_not_run(checkpoint, tmp_path, monkeypatch):
    """Nobody is asked, and where transformers knows the type, its own code is used."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = f"open({str(tmp_path / 'evil')!r}, 'w')\n"
    code += "from transformers import GPT2Config as MineConfig, GPT2Model as MineModel\n"
    (tmp_path / "mine.py").write_text(code)
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModel": "mine.MineModel"}
    with pytest.raises(SystemExit, match=f"^--backbone {tmp_path} cannot be used"):
        checkpoint("gpt2", model_type="mine", auto_map=auto_map)
    assert_same_weights(checkpoint("gpt2", auto_map=auto_map), "gpt2")
    assert not (tmp_path / "evil").exists()
