"""Decoding end to end: a language model token by token, dense as PyTorch runs it best beside every sparse form.

Models: a Llama of 1.2 billion weights (16 layers, 2048 wide, FFN 8192, 32 heads on 8 KV heads, vocabulary 128,256, head
tied) with random weights, whose zeros lie at random, since speed does not depend on what the numbers say; and
SmolLM2-135M-Instruct. bf16 unless a row says otherwise. Every row decodes greedily, one sequence, behind a prompt of 64 tokens.

Rows: PyTorch eager; torch.compile with a static cache; OpenVINO in bf16 where it is installed; then through Pumice, where a
token goes through all layers in one call (`pumice.fuse`): dense in bf16, int8 and int4, the controls, so that a better dense
product or fewer calls are not sold as sparsity, and half of the weights zero. Rows take turns in one process, medians; `over` is
against the fastest bf16 row that is not Pumice's, `over_control` against Pumice's dense bf16. The weights of all rows through
Pumice lie in huge pages, as `pack` puts them. Bytes are those of parameters and buffers.

    python benchmarks/decode.py                       # writes benchmarks/results/decode.json
    python benchmarks/decode.py --only tiny --quick   # a look, nothing is written
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import common
import torch
from torch import Tensor, nn

import pumice
from pumice.core import registry, select
from pumice.engine.bench import model_bytes
from pumice.kernels.features import machine_stamp
from pumice.weights.layouts.base import pack as pack_as
from pumice.weights.modules import SparseLinear

RESULTS = Path(__file__).parent / "results" / "decode.json"
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1.2b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
}
PROMPT = 64
PEERS = ("eager", "compiled", "openvino")
"""Dense rows in bf16 without Pumice: the best of them is what others are compared with."""
CONTROL = "dense bf16"

Step = Callable[[], float]


def random_llama(shape: dict[str, Any]) -> nn.Module:
    """A Llama with random weights in bf16, made without a float32 copy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).eval()
    finally:
        torch.set_default_dtype(before)


def smollm2() -> nn.Module:
    from pumice.engine.models import demo_model, load_model

    return load_model(demo_model(), dtype=torch.bfloat16).model.eval()


def inner(model: nn.Module) -> list[nn.Linear]:
    """The linear layers inside the blocks."""
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]


def halved(dense: nn.Module, columns: int = 1) -> nn.Module:
    """A copy in which half of the weights of every block's layer, or of its 1 x `columns` groups, are zero."""
    model = copy.deepcopy(dense)
    for layer in inner(model):
        weight = layer.weight
        scores = torch.rand(weight.shape[0], weight.shape[1] // columns)
        mask = select.layer(scores, 0.5).repeat_interleave(columns, 1)
        with torch.no_grad():
            weight.mul_(mask)
    return model


def packed(model: nn.Module, values: Any = None, head: str | None = None) -> nn.Module:
    """The model as `pumice.pack` makes it, with the head dense, or in integers whatever the others are."""
    if head is not None:
        whole = cast(nn.Linear, model.lm_head)
        weight = whole.weight.detach().float()
        grid = registry.values.bind(head)().grid(weight)
        stored = pack_as(grid.snap(weight).bfloat16(), head, grid=grid)
        model.lm_head = SparseLinear.from_module(whole, stored)
    return pumice.pack(model, values=values, progress=False)


def rows(dense: nn.Module) -> dict[str, Callable[[], nn.Module]]:
    """How every model but the compiled one is made, one after the other, so that memory holds few copies."""
    int4 = {"name": "int4", "group": 16}
    return {
        CONTROL: lambda: packed(copy.deepcopy(dense)),
        "dense int8, head int8": lambda: packed(copy.deepcopy(dense), "int8", "int8"),
        # A head of integers is a matrix of its own, no longer the embedding, and `pack` makes int4 of it as of the others.
        "dense int4 groups": lambda: packed(copy.deepcopy(dense), int4, "int8"),
        "50 % bf16": lambda: packed(halved(dense)),
        "50 % bf16, head int8": lambda: packed(halved(dense), head="int8"),
        "50 % int8, head int8": lambda: packed(halved(dense), "int8", "int8"),
        "50 % of 1x16 groups int4": lambda: packed(halved(dense, 16), int4, "int8"),
    }


def layouts(model: nn.Module) -> dict[str, int]:
    """How many layers `pack` left in which layout: the fastest, which need not be a sparse one."""
    return dict(Counter(m.layout for m in model.modules() if isinstance(m, SparseLinear)))


def decoder(model: nn.Module, tokens: int) -> Step:
    """A function that decodes `tokens` tokens behind the prompt and returns seconds a token."""
    net: Any = model
    ids = torch.arange(PROMPT)[None] + 5

    def run() -> float:
        with torch.inference_mode():
            out = net(input_ids=ids, use_cache=True, logits_to_keep=1)
            token, past = out.logits[:, -1:].argmax(-1), out.past_key_values
            start = time.perf_counter()
            for _ in range(tokens):
                out = net(input_ids=token, past_key_values=past, use_cache=True)
                token, past = out.logits[:, -1:].argmax(-1), out.past_key_values
        return (time.perf_counter() - start) / tokens

    return run


def compiled(model: nn.Module, tokens: int) -> Step:
    """The same with a static cache and a step that torch.compile made."""
    from transformers import StaticCache

    net: Any = model
    ids = torch.arange(PROMPT)[None] + 5

    @torch.compile(dynamic=False)
    def step(token: Tensor, place: Tensor, cache: Any) -> Tensor:
        out = net(input_ids=token, past_key_values=cache, position_ids=place[None], use_cache=True)
        return out.logits[:, -1:].argmax(-1)

    def run() -> float:
        with torch.no_grad():
            cache = StaticCache(config=net.config, max_cache_len=PROMPT + tokens + 1)
            out = net(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token, place = out.logits[:, -1:].argmax(-1), torch.tensor([PROMPT])
            start = time.perf_counter()
            for _ in range(tokens):
                token, place = step(token, place, cache), place + 1
        return (time.perf_counter() - start) / tokens

    return run


def openvino(model: nn.Module, tokens: int) -> Step | str:
    """OpenVINO's own generation loop in bf16; the reason where it cannot run."""
    missing = [name for name in ("openvino", "optimum.intel") if not _installed(name)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    import tempfile

    from optimum.intel import OVModelForCausalLM  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        net = OVModelForCausalLM.from_pretrained(
            folder, export=True, load_in_8bit=False, ov_config={"INFERENCE_PRECISION_HINT": "bf16"}
        )
    ids = torch.arange(PROMPT)[None] + 5
    mask = torch.ones_like(ids)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        net.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - start

    return lambda: (seconds(tokens + 1) - seconds(1)) / tokens


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def measure(dense: nn.Module, tokens: int, rounds: int, match: str) -> dict[str, Any]:
    """Milliseconds a token of every row, in turns; of Pumice's rows those whose name contains one of the texts in `match`, between commas."""
    models = {"eager": dense}
    for name, make in rows(dense).items():
        if not any(text in name for text in match.split(",")):
            continue
        models[name] = make()
        print("made", name, f"{model_bytes(models[name]) / 1e6:.0f} MB", flush=True)
    runs: dict[str, Step] = {name: decoder(model, tokens) for name, model in models.items()}
    table: dict[str, Any] = {}
    for name, peer in (("compiled", compiled), ("openvino", openvino)):
        try:
            made = peer(dense, tokens)
            if isinstance(made, str):
                table[name] = {"missing": made}
            else:
                made()
                runs[name] = made
        except Exception as error:  # a peer that cannot run is a row that says so
            table[name] = {"missing": f"{type(error).__name__}: {str(error)[:200]}"}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            seconds = run()
            if turn:
                samples[name].append(seconds)
    medians = {name: statistics.median(found) for name, found in samples.items()}
    best = min(medians[name] for name in PEERS if name in medians)
    for name, seconds in medians.items():
        table[name] = {
            "ms": round(1000 * seconds, 3),
            "fastest_ms": round(1000 * min(samples[name]), 3),
            "over": round(best / seconds, 3),
            "over_control": round(medians[CONTROL] / seconds, 3) if CONTROL in medians else None,
            "bytes": model_bytes(models.get(name, dense)),
            "layouts": layouts(models.get(name, dense)),
        }
        print(name, table[name], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--match", default="", help="rows through Pumice whose name contains one of these (a,b)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=24, help="tokens of one turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="write nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = common.read(RESULTS)
    makers: dict[str, Callable[[], nn.Module]] = {"smollm2-135m": smollm2}
    makers |= {name: lambda shape=shape: random_llama(shape) for name, shape in SHAPES.items()}
    for name, make in makers.items():
        if args.only not in name or (name == "tiny" and args.only != "tiny"):
            continue
        table = measure(make(), args.tokens, args.rounds, args.match)
        results[f"{name}, {args.threads} threads"] = {"rows": table, "machine": machine_stamp()}
        if not args.quick:
            common.write(RESULTS, results, protocol=__doc__)


if __name__ == "__main__":
    main()
