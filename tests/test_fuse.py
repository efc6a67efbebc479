"""One call a token: the same logits as the model's own code, whatever its weights are stored in, and its own code elsewhere."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

from pumice.core.errors import PumiceError
from pumice.engine import cache_room
from pumice.engine.fuse import fuse, is_fused, unfuse
from pumice.engine.generate import generate
from pumice.engine.pack import pack, unpack
from pumice.kernels import cpu_backend
from pumice.kernels.decoder import IN_TILES, MATRICES
from pumice.weights.grid import Grid
from pumice.weights.layouts import base
from pumice.weights.modules import SparseLinear, replace_module
from tests import tiny
from tests.conftest import ISAS, shared

pytestmark = pytest.mark.skipif(cpu_backend.native is None, reason=str(cpu_backend.missing()))
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
# Heads that share keys unevenly with vectors, and widths that no vector divides.
ODD = {"hidden_size": 72, "intermediate_size": 104, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12}


@pytest.fixture(autouse=True)
def poisoned():
    """What torch.empty gives out is NaN; threads and kernels are put back afterwards."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    cpu_backend.force(None)


def family(name: str, **changes: Any) -> Any:
    """A random model with norms that are not all one."""
    import transformers

    config, cls = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    more = {"sliding_window": None} if name == "Mistral" else {}
    sizes = {"vocab_size": 100, "max_position_embeddings": 1024, "num_hidden_layers": 3}
    torch.manual_seed(0)
    model = cls(config(**(sizes | ODD | more | changes))).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, -1, 1.5)
        else:
            nn.init.normal_(parameter, 0, 0.15)
    return model


@torch.no_grad()
def told(model: Any, ids: torch.Tensor, prompt: int, cache: Any = None, **more: Any) -> torch.Tensor:
    """Logits of every token behind the prompt, each given for itself."""
    past = model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True).past_key_values
    steps = []
    for t in range(prompt, ids.shape[1]):
        out = model(input_ids=ids[:, t : t + 1], past_key_values=past, use_cache=True, **more)
        steps.append(out.logits.float())
    return torch.cat(steps, 1)


class Calls:
    """How many tokens a fused model took in one call."""

    def __init__(self, model: Any) -> None:
        self.forward = model.model.forward
        self.count, inner = 0, self.forward._token

        def counted(**arguments: Any) -> Any:
            result = inner(**arguments)
            self.count += result is not None
            return result

        self.forward._token = counted


def close(found: torch.Tensor, want: torch.Tensor, exact: torch.Tensor | None = None) -> None:
    """Like `want`; against `exact` numbers, hardly farther than `want` is."""
    assert found.shape == want.shape
    assert found.isfinite().all()
    if exact is None:
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    else:
        assert (found - exact).square().mean() <= 1.5 * (want - exact).square().mean()


IDS = torch.randint(0, 100, (2, 14), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_logits_are_those_of_the_models_own_code(name, dtype, isa):
    reason = cpu_backend.instruction_sets().get(isa)
    if reason is not None:
        pytest.skip(reason)
    cpu_backend.force(isa)
    model = family(name).to(dtype)
    exact = told(copy.deepcopy(model).float(), IDS, 5)
    want = told(model, IDS, 5)
    calls = Calls(fuse(model))
    found = told(model, IDS, 5)
    assert calls.count == 9
    close(found, want, None if dtype is torch.float32 else exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", [2, 32, 34, 64, 96, 128, 160, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 5, 10])
def test_heads_of_any_width_that_share_keys_anyhow(head, kv_heads, dtype):
    sizes = {"hidden_size": 80, "num_attention_heads": 10, "num_key_value_heads": kv_heads, "head_dim": head}
    model = family("Llama", **sizes).to(dtype)
    exact, want = told(copy.deepcopy(model).float(), IDS, 1), told(model, IDS, 1)
    calls = Calls(fuse(model))
    close(told(model, IDS, 1), want, None if dtype is torch.float32 else exact)
    assert calls.count == 13


def stored(w: torch.Tensor, layout: str) -> tuple[torch.Tensor, str, Grid | None, dict[str, int]]:
    """A matrix with zeros and numbers that the layout can hold."""
    from pumice.core import registry

    outputs, inputs = w.shape
    params: dict[str, int] = {}
    grid = None
    if "nm" in layout:
        params = {"n": 2, "m": 4}
        w = w * torch.rand(outputs, inputs // 4, 4).argsort(-1).lt(2).flatten(1)
    elif "block" in layout:
        params = {"r": 4, "c": 8}
        w = w * (torch.rand(outputs // 4, inputs // 8) < 0.6).repeat_interleave(4, 0).repeat_interleave(8, 1)
    elif layout == "int4-bitmask":
        w = w * (torch.rand(outputs, inputs // 16) < 0.6).repeat_interleave(16, 1)
    elif layout not in ("dense", "int8", "int4"):
        w = w * (torch.rand(outputs, inputs) < 0.5)
    if layout.startswith("int"):
        choice = {"name": "int4", "group": 16} if layout.startswith("int4") else "int8"
        params |= {"group": 16} if layout.startswith("int4") else {}
        grid = registry.values.bind(choice)().grid(w)
        w = grid.snap(w)
    return w, layout, grid, params


def in_layout(model: Any, layout: str) -> Any:
    """The model with every inner layer stored so."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            w, layout, grid, params = stored(module.weight.detach().float(), layout)
            packed = base.pack(w.to(module.weight.dtype), layout, grid=grid, **params)
            replace_module(model, name, SparseLinear.from_module(module, packed))
    return model


WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [*MATRICES, *IN_TILES])
def test_any_layout_that_has_a_kernel_for_few_rows(layout, dtype):
    model = in_layout(family("Qwen2", **WIDE).to(dtype), layout)
    assert {m.layout for m in model.modules() if isinstance(m, SparseLinear)} == {layout}
    plain = unpack(copy.deepcopy(model))
    exact, want = told(copy.deepcopy(plain).float(), IDS, 5), told(plain, IDS, 5)
    calls = Calls(fuse(model))
    close(told(model, IDS, 5), want, None if dtype is torch.float32 else exact)
    assert calls.count == 9


def test_layouts_may_differ_from_matrix_to_matrix():
    model = family("Llama", **WIDE)
    kinds = ("csr", "bitmask", "int8", "dense", "nm", "int4", "block")
    for index, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, nn.Linear) and "lm_head" not in name and index % 3:
            w, layout, grid, params = stored(module.weight.detach(), kinds[index % len(kinds)])
            replace_module(model, name, SparseLinear.from_module(module, base.pack(w, layout, grid=grid, **params)))
    want = told(unpack(copy.deepcopy(model)), IDS, 5)
    calls = Calls(fuse(model))
    close(told(model, IDS, 5), want)
    assert calls.count == 9


def test_a_layout_without_such_a_kernel_is_named():
    model = family("Llama", **WIDE)
    layer = model.model.layers[1].mlp.up_proj
    from pumice.core import registry

    grid = registry.values.bind({"name": "int3", "group": 32})().grid(layer.weight.detach())
    packed = base.pack(grid.snap(layer.weight.detach()), "int3", grid=grid, group=32)
    model.model.layers[1].mlp.up_proj = SparseLinear.from_module(layer, packed)
    with pytest.raises(PumiceError, match="int3"):
        fuse(model)
    assert not is_fused(model)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_the_same_bits(threads):
    # Large enough that threads are used at all.
    sizes = {"hidden_size": 320, "intermediate_size": 640, "num_attention_heads": 10, "head_dim": 32}
    model = in_layout(family("Llama", **sizes, num_hidden_layers=2), "bitmask")
    fuse(model)
    torch.set_num_threads(1)
    alone = told(model, IDS, 5)
    close(alone, told(unfuse(model), IDS, 5))
    fuse(model)
    torch.set_num_threads(threads)
    assert torch.equal(told(model, IDS, 5)[:, 0], alone[:, 0])
    close(told(model, IDS, 5), alone)


def test_several_callers_at_once_and_threads_of_its_own():
    sizes = {"hidden_size": 320, "intermediate_size": 640, "num_attention_heads": 10, "head_dim": 32}
    model = fuse(family("Llama", **sizes, num_hidden_layers=2))
    want = told(model, IDS, 5)
    wrong: list[int] = []

    def work() -> None:
        torch.set_num_threads(3)
        for _ in range(5):
            if (told(model, IDS, 5) - want).abs().max() > 1e-4:
                wrong.append(1)

    for own in (False, True):
        if own:
            cpu_backend.native.set_parallel_for(0)
        try:
            workers = [threading.Thread(target=work) for _ in range(3)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            cpu_backend._use_torch_threads()
    assert not wrong


def test_a_cache_grows_crops_and_is_copied(monkeypatch):
    monkeypatch.setattr(cache_room, "ROOM", 3)
    model = family("Llama")
    ids = torch.randint(0, 100, (2, 40))
    want = told(model, ids, 4)
    calls = Calls(fuse(model))
    close(told(model, ids, 4), want)
    assert calls.count == 36
    with torch.no_grad():
        past = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        for t in range(4, 20):
            model(input_ids=ids[:, t : t + 1], past_key_values=past)
        assert past.get_seq_length() == 20
        other = copy.deepcopy(past)
        past.crop(-6)
        # Other tokens in the cropped places; the copy still has its own.
        for t in range(14, 20):
            model(input_ids=ids[:, t : t + 1] * 0, past_key_values=past)
        left = model(input_ids=ids[:, 20:21], past_key_values=other).logits
        close(left[:, 0], want[:, 16])
        assert pickle.loads(pickle.dumps(other)).get_seq_length() == 21
        # Sequences in another order, as a beam search wants them.
        other.reorder_cache(torch.tensor([1, 0]))
        turned = model(input_ids=ids[:, 21:22].flip(0), past_key_values=other).logits
        close(turned[:, 0].flip(0), want[:, 17])
        # What the model's own code adds in between is kept.
        model(input_ids=ids[:, 22:25].flip(0), past_key_values=other)
        close(model(input_ids=ids[:, 25:26].flip(0), past_key_values=other).logits[:, 0].flip(0), want[:, 21])


def test_a_static_cache():
    from transformers import StaticCache

    model = family("Qwen3")
    want = told(model, IDS, 5)
    calls = Calls(fuse(model))
    close(told(model, IDS, 5, StaticCache(config=model.config, max_cache_len=14)), want)
    assert calls.count == 9
    full = StaticCache(config=model.config, max_cache_len=5)
    with torch.no_grad():
        model(input_ids=IDS[:, :5], past_key_values=full)
        with pytest.raises((RuntimeError, IndexError)):
            model(input_ids=IDS[:, 5:6], past_key_values=full)


def test_sequences_of_several_lengths():
    model = family("Llama")
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    ids = {"input_ids": IDS, "attention_mask": mask, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 12}
    more = {"output_logits": True, "return_dict_in_generate": True}
    want = model.generate(**ids, **more)
    calls = Calls(fuse(model))
    found = model.generate(**ids, **more)
    assert torch.equal(found.sequences, want.sequences)
    close(torch.stack(found.logits), torch.stack(want.logits))
    assert calls.count == 11
    beams = model.generate(**ids, num_beams=3)
    assert torch.equal(beams, unfuse(model).generate(**ids, num_beams=3))


def test_everything_else_is_left_to_the_models_own_code():
    model = family("Llama")
    want = told(model, IDS, 5)
    calls = Calls(fuse(model))
    past = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
    out = model(input_ids=IDS[:, 5:6], past_key_values=past)
    assert calls.count == 0, "gradients are kept"
    out.logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    with torch.no_grad():
        assert len(model(input_ids=IDS[:, :1], output_hidden_states=True).hidden_states) == 4
        hidden = model(input_ids=IDS[:, 6:7], past_key_values=past, output_hidden_states=True)
        assert len(hidden.hidden_states) == 4
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS[:, 7:8], past_key_values=past)
        seen: list[int] = []
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
        model(input_ids=IDS[:, 8:9], past_key_values=past)
        assert seen == [1]
        handle.remove()
        assert calls.count == 0
        close(model(input_ids=IDS[:, 9:10], past_key_values=past).logits[:, 0], want[:, 4], want[:, 4] + 1)
    assert calls.count == 1


def test_compilers_see_the_models_own_code():
    model = family("Llama")
    calls = Calls(fuse(model))
    with torch.no_grad():
        past = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
        want = model(input_ids=IDS[:, 5:6], past_key_values=copy.deepcopy(past)).logits
        assert calls.count == 1
        traced = torch.compile(model, backend="eager")
        close(traced(input_ids=IDS[:, 5:6], past_key_values=past).logits, want)
    assert calls.count == 1


def test_weights_may_change():
    model = family("Llama")
    fuse(model)
    told(model, IDS, 5)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-0.5)
        model.model.norm.weight.add_(1)
    model.model.layers[1].self_attn.q_proj = nn.Linear(72, 72, bias=False)
    calls = Calls(model)
    found = told(model, IDS, 5)
    assert calls.count == 9
    close(found, told(unfuse(copy.deepcopy(model)), IDS, 5))
    model.double()
    assert told(model, IDS, 5).isfinite().all()
    assert calls.count == 9, "no kernel computes in float64"
    model.float()
    close(told(model, IDS, 5), found)
    assert calls.count == 18


def test_copies_and_pickles_have_weights_of_their_own():
    model = fuse(family("Llama"))
    want = told(model, IDS, 5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in model.model.layers[0].parameters():
                parameter.add_(0)
        calls = Calls(other)
        close(told(other, IDS, 5), want)
        assert calls.count == 9
        assert other.model.forward.decoder is other.model
        assert other.lm_head.forward.layer is other.lm_head


def test_what_cannot_be_fused_says_why():
    with pytest.raises(PumiceError, match="gemma2 is none of llama"):
        fuse(tiny.gemma2())
    with pytest.raises(PumiceError, match="sees a window"):
        fuse(family("Mistral", sliding_window=8))
    with pytest.raises(PumiceError, match="activation is relu"):
        fuse(family("Llama", hidden_act="relu"))
    with pytest.raises(PumiceError, match="float64"):
        fuse(family("Llama").double())
    with pytest.raises(PumiceError, match="heads of 300"):
        fuse(family("Llama", head_dim=300))
    with pytest.raises(PumiceError, match="none of llama"):
        fuse(nn.Linear(2, 2))


def test_pack_fuses_and_unpack_takes_it_back():
    model = family("Llama")
    want = told(model, IDS, 5)
    pack(model, progress=False)
    assert is_fused(model)
    close(told(model, IDS, 5), want)
    unpack(model)
    assert not is_fused(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_generate_uses_it_and_leaves_no_trace():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    plain = generate(model, tokenizer, "w1 w2 w3", max_new_tokens=9, fused=False).text
    assert generate(model, tokenizer, "w1 w2 w3", max_new_tokens=9).text == plain
    assert not is_fused(model)


def test_a_real_model_says_the_same():
    from pumice.engine.models import load_model

    loaded = load_model(shared("models", "stories15M-hf"), dtype=torch.float32)
    text = "Once upon a time there was a little dragon"
    want = generate(loaded.model, loaded.tokenizer, text, max_new_tokens=60, chat=False, fused=False)
    calls = Calls(fuse(loaded.model))
    found = generate(loaded.model, loaded.tokenizer, text, max_new_tokens=60, chat=False)
    assert found.text == want.text
    assert calls.count >= 50
