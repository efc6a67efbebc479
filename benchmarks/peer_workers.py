"""One peer of benchmarks/peers.py in a process of its own, run by whichever interpreter has the peer installed.

Reads a JSON line, answers with one: `{"make": kind, ...options}` builds what is to be timed and says what it is, or
`{"missing": reason}`; `{"run": count}` makes so many calls and gives seconds, and how much CPU time they took.
Nothing but the standard library is imported before a kind asks for it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_common import (
    COLD_BYTES_INT4,
    PROMPT,
    Missing,
    Options,
    Run,
    copies,
    fastest,
    leave,
    openvino_options,
    timed,
    torch_for,
    weights_of,
)
from peer_llama import decode_llama, int4_llama
from peer_resnet import resnet_deepsparse, resnet_openvino, resnet_pumice, resnet_torch

# A network of two layers, y = W2 relu(W1 x)


def _network(options: Options) -> tuple[Any, Any]:
    """The network as PyTorch's modules in float32, and its inputs."""
    torch = torch_for(options)
    weights, x = weights_of(options)
    first, second = (torch.nn.Linear(*w.T.shape, bias=False) for w in weights)
    for layer, w in zip((first, second), weights, strict=True):
        layer.weight.copy_(torch.from_numpy(w))
    return torch.nn.Sequential(first, torch.nn.ReLU(), second), torch.from_numpy(x)


def mlp_pumice(options: Options) -> tuple[Run, Options]:
    import copy

    net, x = _network(options)
    import pumice

    net, x = net.bfloat16(), x.bfloat16()
    net = pumice.pack(net, batch=options["rows"], remeasure=options["remeasure"], progress=False)
    found = pumice.describe(net)
    layers = {f"{one.layout} ({one.backends[options['rows']]})" for one in found.layers}
    # Some backends keep a second copy in an order of their own and read only that.
    nets = [copy.deepcopy(net) for _ in range(copies(found.bytes / 2))]
    leave(net(x).float(), options)
    return timed([lambda net=net: net(x) for net in nets]), {"ran": ", ".join(sorted(layers)), "bytes": found.bytes}


def mlp_torch_bf16(options: Options) -> tuple[Run, Options]:
    """oneDNN with weights in its own order and the activation fused: what torch.compile makes of it when it freezes."""
    net, x = _network(options)
    import torch

    if not torch.backends.mkldnn.is_available():
        raise Missing("this PyTorch is built without oneDNN")
    x = x.bfloat16()
    linear, reorder = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._reorder_linear_weight

    def made() -> Callable[[], Any]:
        first, second = (reorder(net[i].weight.bfloat16()) for i in (0, 2))
        return lambda: linear(linear(x, first, None, "relu", [], ""), second, None, "none", [], "")

    nbytes = 2 * sum(p.numel() for p in net.parameters())
    calls = [made() for _ in range(copies(nbytes))]
    leave(calls[0]().float(), options)
    return timed(calls), {"ran": f"PyTorch {torch.__version__}", "bytes": nbytes}


def mlp_torch_int8(options: Options) -> tuple[Run, Options]:
    """Dynamic quantisation, in whichever of PyTorch's engines is fastest."""
    import warnings

    warnings.simplefilter("ignore")
    net, x = _network(options)
    import torch

    def made(engine: str) -> Callable[[], Any]:
        torch.backends.quantized.engine = engine
        quantised = torch.ao.quantization.quantize_dynamic(net, {torch.nn.Linear}, dtype=torch.qint8)
        return lambda: quantised(x)

    engines = [name for name in torch.backends.quantized.supported_engines if name in ("onednn", "x86", "fbgemm")]
    if not engines:
        raise Missing("this PyTorch has no engine for quantised layers on this processor")
    best = fastest({name: made(name) for name in engines})
    nbytes = sum(p.numel() for p in net.parameters())
    calls = [made(best) for _ in range(copies(nbytes))]
    leave(calls[0](), options)
    return timed(calls), {"ran": f"PyTorch {torch.__version__}, {best}", "bytes": nbytes}


def mlp_openvino(options: Options) -> tuple[Run, Options]:
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op

    weights, x = weights_of(options)
    given = op.parameter(list(x.shape), np.float32)
    hidden = op.relu(op.matmul(given, op.constant(weights[0]), False, True))
    model = ov.Model([op.matmul(hidden, op.constant(weights[1]), False, True)], [given])
    core, nbytes = ov.Core(), 2 * weights.size
    made = [core.compile_model(model, "CPU", openvino_options(options)) for _ in range(copies(nbytes))]
    requests = [one.create_infer_request() for one in made]
    calls = [lambda r=r: r.infer([x], share_inputs=True, share_outputs=True) for r in requests]
    leave(calls[0]()[0], options)
    kind = str(made[0].get_property("INFERENCE_PRECISION_HINT")).partition("'")[2].strip("'>")
    return timed(calls), {"ran": f"OpenVINO {ov.__version__.partition('-')[0]}, {kind}", "bytes": nbytes}


def _onnx(options: Options) -> str:
    """The network as an ONNX file, zeros among its weights."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights, x = weights_of(options)
    path = str(Path(options["outputs"]).with_suffix(".onnx"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name in ("x", "y")]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["y"]),
    ]
    stored = [numpy_helper.from_array(np.ascontiguousarray(w.T), f"w{i}") for i, w in enumerate(weights)]
    graph = helper.make_graph(nodes, "network", [ends[0]], [ends[1]], stored)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    made.ir_version = 8
    onnx.save(made, path)
    return path


def mlp_onnxruntime(options: Options) -> tuple[Run, Options]:
    import onnxruntime

    path, (weights, x) = _onnx(options), weights_of(options)
    nbytes = weights.size * (1 if options["int8"] else 4)
    if options["int8"]:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        small = path.replace(".onnx", "-int8.onnx")
        quantize_dynamic(path, small, per_channel=True, weight_type=QuantType.QInt8)
        path = small
    how = onnxruntime.SessionOptions()
    how.intra_op_num_threads, how.inter_op_num_threads = options["threads"], 1
    how.log_severity_level = 3
    made = [onnxruntime.InferenceSession(path, how, providers=["CPUExecutionProvider"]) for _ in range(copies(nbytes))]
    calls = [lambda one=one: one.run(None, {"x": x})[0] for one in made]
    leave(calls[0](), options)
    return timed(calls), {"ran": f"ONNX Runtime {onnxruntime.__version__}", "bytes": nbytes}


def mlp_deepsparse(options: Options) -> tuple[Run, Options]:
    import deepsparse
    from deepsparse import Engine

    path, (weights, x) = _onnx(options), weights_of(options)
    # How it stores weights is not told: its values alone are counted, so that the rotation is at least as long.
    nbytes = 4 * int((weights != 0).sum())
    made = [Engine(model=path, batch_size=options["rows"], num_cores=options["threads"]) for _ in range(copies(nbytes))]
    calls = [lambda one=one: one.run([x], val_inp=False)[0] for one in made]
    leave(calls[0](), options)
    return timed(calls), {"ran": f"DeepSparse {deepsparse.__version__}"}


def int4_pumice(options: Options) -> tuple[Run, Options]:
    """One matrix in the layout that is asked for, or its form for memory, in whichever backend is fastest."""
    torch = torch_for(options)
    import common

    from pumice.core import dispatch, registry
    from pumice.core.dispatch import Call
    from pumice.weights.layouts.base import pack

    weights, x = (torch.from_numpy(one) for one in weights_of(options))
    x = x[:1].bfloat16()
    layout, group = options["layout"], options["group"]
    if group:
        grid = registry.values.bind({"name": "int4", "group": group, "search": 0})().grid(weights)
        packed = pack(grid.snap(weights).bfloat16(), layout, grid=grid, group=group)
    else:
        packed = pack(weights.bfloat16(), layout)
    ways = {}
    for form in common.forms(packed):
        asked = Call("linear", form.layout, form.dtype, "cpu", 1, form.shape, form.params)
        for backend, reason in dispatch.candidates(asked):
            if reason is None and backend.name != "unpack":
                ways[f"{form.layout} ({backend.name})"] = form, backend
    first = {name: backend.prepare(form, None) for name, (form, backend) in ways.items()}
    best = fastest({name: lambda run=run: run(x) for name, run in first.items()})
    form, backend = ways[best]
    held = common.copies(form, copies(form.nbytes, COLD_BYTES_INT4))
    calls = [lambda run=run: run(x) for run in (backend.prepare(one, None) for one in held)]
    leave(calls[0]().float(), options)
    return timed(calls), {"ran": best, "bytes": form.nbytes, "bits": round(form.bits, 3)}


# Decoding


def decode_pumice(options: Options) -> tuple[Run, Options]:
    """A row of benchmarks/decode.py, all layers of a token in one call."""
    torch_for(options)
    import decode

    import pumice

    dense = decode.random_llama(decode.SHAPES[options["shape"]]) if "shape" in options else decode.smollm2()
    model = dense if options["row"] == "eager" else decode.rows(dense)[options["row"]]()
    if options["fused"]:
        pumice.fuse(model)
    found = decode.layouts(model)
    told = ", ".join(f"{count} {layout}" for layout, count in found.items()) or "dense"
    nbytes = decode.model_bytes(model)
    state: dict[int, Callable[[], float]] = {}

    def run(count: int) -> float:
        if count not in state:
            state[count] = decode.decoder(model, count)
        return state[count]()

    return run, {"ran": told, "bytes": nbytes}


def decode_openvino(options: Options) -> tuple[Run, Options]:
    """OpenVINO's model with its cache inside, asked token by token."""
    import numpy as np
    import openvino as ov

    try:
        from optimum.intel import OVModelForCausalLM
    except ImportError as error:
        raise Missing(f"optimum-intel, which makes OpenVINO's model: {error}") from None
    folder = f"{options['scratch']}/openvino{'-int8' if options['int8'] else ''}"
    OVModelForCausalLM.from_pretrained(
        options["hf"], export=True, load_in_8bit=options["int8"], compile=False
    ).save_pretrained(folder)
    compiled = ov.Core().compile_model(f"{folder}/openvino_model.xml", "CPU", openvino_options(options))
    request = compiled.create_infer_request()
    names = {name for port in compiled.inputs for name in port.get_names()}

    def feed(ids: list[int], past: int) -> int:
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, past + len(ids)), np.int64),
            "position_ids": np.arange(past, past + len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        out = request.infer({k: v for k, v in given.items() if k in names}, share_outputs=True)
        return int(out[0][0, -1].argmax())

    def run(count: int) -> float:
        request.reset_state()
        token = feed(list(range(5, 5 + PROMPT)), 0)
        start = time.perf_counter()
        for i in range(count):
            token = feed([token], PROMPT + i)
        return (time.perf_counter() - start) / count

    return run, {
        "ran": f"OpenVINO {ov.__version__.partition('-')[0]}",
        "bytes": os.path.getsize(f"{folder}/openvino_model.bin"),
    }


KINDS: dict[str, Callable[[Options], tuple[Run, Options]]] = {
    made.__name__: made
    for made in (
        mlp_pumice,
        mlp_torch_bf16,
        mlp_torch_int8,
        mlp_openvino,
        mlp_onnxruntime,
        mlp_deepsparse,
        resnet_pumice,
        resnet_torch,
        resnet_openvino,
        resnet_deepsparse,
        int4_pumice,
        int4_llama,
        decode_pumice,
        decode_llama,
        decode_openvino,
    )
}


def give_back() -> None:
    """Return what building took to the system, where the C library can: all rows of a table live side by side."""
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)  # pyright: ignore[reportOptionalMemberAccess]


def answer(message: Options, state: dict[str, Any]) -> Options:
    if "run" in message:
        before = os.times()
        seconds = state["run"](message["run"])
        after = os.times()
        return {"seconds": seconds, "cpu": after.user + after.system - before.user - before.system}
    try:
        state["run"], facts = KINDS[message["make"]](message)
    except ModuleNotFoundError as error:
        return {"missing": f"{error.name} is not installed"}
    except Missing as error:
        return {"missing": str(error)}
    except Exception as error:  # a peer that cannot run is a row that says so
        return {"missing": f"{type(error).__name__}: {str(error).strip()[:200]}"}
    give_back()
    return facts


def main() -> None:
    # What a peer prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    state: dict[str, Any] = {}
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), state)), file=answers, flush=True)


if __name__ == "__main__":
    main()
