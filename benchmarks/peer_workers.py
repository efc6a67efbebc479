"""One peer of benchmarks/peers.py in a process of its own, run by whichever interpreter has the peer installed.

Reads a JSON line, answers with one: `{"make": kind, ...options}` builds what is to be timed and says what it is, or
`{"missing": reason}`; `{"run": count}` makes so many calls and gives seconds, and how much CPU time they took.
Nothing but the standard library is imported before a kind asks for it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COLD_BYTES = 256 << 20
"""Copies of a two-layer network are rotated through so much memory, which is far more than a cache holds."""
COLD_BYTES_INT4 = 640 << 20
PROMPT = 64

Options = dict[str, Any]
Run = Callable[[int], float]
"""Calls -> seconds of one."""


class Missing(Exception):
    """Why a peer cannot run here."""


def timed(calls: Sequence[Callable[[], Any]]) -> Run:
    """The calls in turns; each has been made once before, since some prepare their weights when they are first called."""
    for call in calls:
        call()
    state = {"next": 0}

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            state["next"] = (state["next"] + 1) % len(calls)
            calls[state["next"]]()
        return (time.perf_counter() - start) / count

    return run


def copies(nbytes: float, cold: int = COLD_BYTES) -> int:
    """How many copies of so many bytes make a rotation."""
    return max(2, -int(-cold // nbytes))


def fastest(tried: dict[str, Callable[[], Any]]) -> str:
    """Whichever takes least time in a short trial."""
    seconds = {}
    for name, call in tried.items():
        run = timed([call])
        seconds[name] = min(run(1) for _ in range(5))
    return min(seconds, key=lambda name: seconds[name])


# A network of two layers, y = W2 relu(W1 x)


def _weights(options: Options) -> tuple[Any, Any]:
    """Weights [2, O, I] and inputs [R, I], float32 numbers that bfloat16 holds too."""
    import numpy as np

    return np.load(options["weights"]), np.load(options["inputs"])


def _torch(options: Options) -> Any:
    import torch

    torch.set_num_threads(options["threads"])
    torch.set_grad_enabled(False)
    return torch


def _network(options: Options) -> tuple[Any, Any]:
    """The network as PyTorch's modules in float32, and its inputs."""
    torch = _torch(options)
    weights, x = _weights(options)
    first, second = (torch.nn.Linear(*w.T.shape, bias=False) for w in weights)
    for layer, w in zip((first, second), weights, strict=True):
        layer.weight.copy_(torch.from_numpy(w))
    return torch.nn.Sequential(first, torch.nn.ReLU(), second), torch.from_numpy(x)


def _seen(y: Any, options: Options) -> None:
    """Leave the outputs where they are compared with the right ones."""
    import numpy as np

    np.save(options["outputs"], np.asarray(y, dtype=np.float32))


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
    _seen(net(x).float(), options)
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
    _seen(calls[0]().float(), options)
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
    _seen(calls[0](), options)
    return timed(calls), {"ran": f"PyTorch {torch.__version__}, {best}", "bytes": nbytes}


def mlp_openvino(options: Options) -> tuple[Run, Options]:
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op

    weights, x = _weights(options)
    given = op.parameter(list(x.shape), np.float32)
    hidden = op.relu(op.matmul(given, op.constant(weights[0]), False, True))
    model = ov.Model([op.matmul(hidden, op.constant(weights[1]), False, True)], [given])
    core, nbytes = ov.Core(), 2 * weights.size
    made = [core.compile_model(model, "CPU", _openvino(options)) for _ in range(copies(nbytes))]
    requests = [one.create_infer_request() for one in made]
    calls = [lambda r=r: r.infer([x], share_inputs=True, share_outputs=True) for r in requests]
    _seen(calls[0]()[0], options)
    kind = str(made[0].get_property("INFERENCE_PRECISION_HINT")).partition("'")[2].strip("'>")
    return timed(calls), {"ran": f"OpenVINO {ov.__version__.partition('-')[0]}, {kind}", "bytes": nbytes}


def _openvino(options: Options) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": options["threads"],
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
    }


def _onnx(options: Options) -> str:
    """The network as an ONNX file, zeros among its weights."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights, x = _weights(options)
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

    path, (weights, x) = _onnx(options), _weights(options)
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
    _seen(calls[0](), options)
    return timed(calls), {"ran": f"ONNX Runtime {onnxruntime.__version__}", "bytes": nbytes}


def mlp_deepsparse(options: Options) -> tuple[Run, Options]:
    import deepsparse
    from deepsparse import Engine

    path, (weights, x) = _onnx(options), _weights(options)
    # How it stores weights is not told: its values alone are counted, so that the rotation is at least as long.
    nbytes = 4 * int((weights != 0).sum())
    made = [Engine(model=path, batch_size=options["rows"], num_cores=options["threads"]) for _ in range(copies(nbytes))]
    calls = [lambda one=one: one.run([x], val_inp=False)[0] for one in made]
    _seen(calls[0](), options)
    return timed(calls), {"ran": f"DeepSparse {deepsparse.__version__}"}


# ResNet-50


def _images(options: Options) -> Any:
    import numpy as np

    return np.load(options["images"])


def _judged(y: Any, options: Options) -> Options:
    """How far logits are from those of the same network in float32, as a share of their norm."""
    import numpy as np

    right = np.load(f"{options['network']}/logits.npy")
    return {"relative_error": float(f"{np.linalg.norm(np.asarray(y) - right) / np.linalg.norm(right):.2g}")}


def _resnet(options: Options) -> tuple[Any, Any, Any]:
    """The network in the type that is asked for, the images, and torch."""
    torch = _torch(options)
    from transformers import ResNetForImageClassification

    dtype = getattr(torch, options["dtype"])
    model = ResNetForImageClassification.from_pretrained(options["network"], dtype=dtype).eval()
    return model, torch.from_numpy(_images(options)).to(dtype), torch


def resnet_pumice(options: Options) -> tuple[Run, Options]:
    model, x, _ = _resnet(options)
    import pumice

    model = pumice.pack(model, batch=len(x), example=x, remeasure=options["remeasure"], progress=False)
    found = pumice.describe(model)
    kinds = [
        layer.layout if layer.layout == "dense" else "taps" for layer in found.layers if "convolution" in layer.name
    ]
    told = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    facts = {"ran": ", ".join(f"{count} {kind}" for kind, count in told.items()), "bytes": found.bytes}
    return timed([lambda: model(x)]), facts | _judged(model(x).logits.float(), options)


def resnet_torch(options: Options) -> tuple[Run, Options]:
    """Channels last, which is what PyTorch's documentation advises; compiled with its weights frozen where that is asked for."""
    model, x, torch = _resnet(options)
    model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    if options["compiled"]:
        import torch._inductor.config as inductor

        inductor.freezing = True
        model = torch.compile(model)
    return timed([lambda: model(x)]), {"ran": f"torch {torch.__version__}"} | _judged(model(x).logits.float(), options)


def resnet_openvino(options: Options) -> tuple[Run, Options]:
    import openvino as ov

    core, x = ov.Core(), _images(options)
    made = core.compile_model(f"{options['network']}/network.onnx", "CPU", _openvino(options))
    request = made.create_infer_request()
    y = request.infer([x])[0]
    kind = str(made.get_property("INFERENCE_PRECISION_HINT")).partition("'")[2].strip("'>")
    facts = {"ran": f"OpenVINO {ov.__version__.partition('-')[0]}, {kind}"}
    return timed([lambda: request.infer([x], share_inputs=True, share_outputs=True)]), facts | _judged(y, options)


def resnet_deepsparse(options: Options) -> tuple[Run, Options]:
    import deepsparse
    from deepsparse import Engine

    x = _images(options)
    made = Engine(model=f"{options['network']}/network.onnx", batch_size=len(x), num_cores=options["threads"])
    facts = {"ran": f"DeepSparse {deepsparse.__version__}"}
    return timed([lambda: made.run([x], val_inp=False)]), facts | _judged(made.run([x])[0], options)


# llama.cpp through its shared libraries


class _Opaque(ctypes.Structure):
    """A C structure that is passed on as it comes: longer than any, which passing on the stack allows."""

    _fields_ = [("bytes", ctypes.c_char * 2048)]


SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


class Llama:
    """The C functions that are needed, from a folder of prebuilt libraries, and the processor's own variant of kernels."""

    def __init__(self, folder: str | None, threads: int) -> None:
        if folder is None:
            raise Missing("no folder with libllama and libggml was given")
        self.threads = threads
        self.base = self._open(folder, "libggml-base.so*")
        self.ggml = self._open(folder, "libggml.*so*")
        self.call(self.ggml, "ggml_backend_load_all_from_path", None, folder.encode())
        self.llama = self._open(folder, "libllama.*so*")
        maps = Path("/proc/self/maps").read_text()
        self.kernels = next(iter(re.findall(r"libggml-cpu[-\w]*(?=\.so)", maps)), "kernels built in")
        self.cpu = self.call(self.ggml, "ggml_backend_dev_by_type", ctypes.c_void_p, 0)
        self.registry = self.call(self.ggml, "ggml_backend_reg_by_name", ctypes.c_void_p, b"CPU")

    @staticmethod
    def _open(folder: str, pattern: str) -> ctypes.CDLL:
        found = sorted(Path(folder).glob(pattern))
        if not found:
            raise Missing(f"the folder of llama.cpp has no {pattern}")
        return ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)

    @staticmethod
    def call(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
        """Call a C function: addresses and 64-bit sizes are whole numbers, structures and ctypes are passed as they are."""
        function = library[name]
        function.restype = result
        whole = [ctypes.c_void_p(a) if isinstance(a, int) and abs(a) >= 1 << 31 else a for a in arguments]
        return function(*whole)

    def own(self, name: bytes, result: Any, *kinds: Any) -> Callable[..., Any]:
        """A function that only the kernels' library has."""
        address = self.call(self.base, "ggml_backend_reg_get_proc_address", ctypes.c_void_p, self.registry, name)
        if not address:
            raise Missing(f"this llama.cpp has no {name.decode()}")
        return ctypes.CFUNCTYPE(result, *kinds)(address)

    def pool(self) -> int:
        """Threads that live on between calls, as llama.cpp's own programs have them."""
        how = _Opaque()
        self.call(self.base, "ggml_threadpool_params_init", None, ctypes.byref(how), self.threads)
        made = self.own(b"ggml_threadpool_new", ctypes.c_void_p, ctypes.c_void_p)
        return made(ctypes.cast(ctypes.byref(how), ctypes.c_void_p))


def decode_llama(options: Options) -> tuple[Run, Options]:
    """Greedy decoding through libllama, the GGUF requantised first where another type is asked for."""
    import numpy as np

    lib = Llama(options["llama"], options["threads"])
    llama, call, pointer = lib.llama, lib.call, ctypes.c_void_p
    call(llama, "llama_log_set", None, SILENT, None)
    call(llama, "llama_backend_init", None)
    path = options["gguf"]
    if options["file_type"] is not None:
        how = call(llama, "llama_model_quantize_default_params", _Opaque)
        words = ctypes.cast(ctypes.byref(how), ctypes.POINTER(ctypes.c_int32))
        # nthread, ftype, the types of output and embedding, then allow_requantize.
        words[1] = options["file_type"]
        ctypes.cast(ctypes.byref(how), ctypes.POINTER(ctypes.c_bool))[16] = True
        path = f"{options['scratch']}/requantised-{options['file_type']}.gguf"
        done = call(
            llama,
            "llama_model_quantize",
            ctypes.c_uint32,
            options["gguf"].encode(),
            path.encode(),
            ctypes.byref(how),
        )
        if done:
            raise Missing("llama.cpp could not requantise the file")
    kind = call(llama, "llama_model_default_params", _Opaque)
    model = call(llama, "llama_model_load_from_file", pointer, path.encode(), kind)
    context = call(llama, "llama_init_from_model", pointer, model, call(llama, "llama_context_default_params", _Opaque))
    if not model or not context:
        raise Missing("llama.cpp could not load the model")
    call(llama, "llama_set_n_threads", None, context, options["threads"], options["threads"])
    pool = lib.pool()
    call(llama, "llama_attach_threadpool", None, context, pool, pool)
    words = call(llama, "llama_vocab_n_tokens", ctypes.c_int32, call(llama, "llama_model_get_vocab", pointer, model))
    memory = call(llama, "llama_get_memory", pointer, context)
    decode, logits, batch = llama.llama_decode, llama.llama_get_logits_ith, llama.llama_batch_get_one
    decode.argtypes, decode.restype = [pointer, _Opaque], ctypes.c_int32
    logits.argtypes, logits.restype = [pointer, ctypes.c_int32], ctypes.POINTER(ctypes.c_float)
    batch.argtypes, batch.restype = [pointer, ctypes.c_int32], _Opaque

    def feed(ids: list[int]) -> int:
        given = (ctypes.c_int32 * len(ids))(*ids)
        if decode(context, batch(given, len(ids))):
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(logits(context, -1), (words,)).argmax())

    def run(count: int) -> float:
        call(llama, "llama_memory_clear", None, memory, True)
        token = feed(list(range(5, 5 + PROMPT)))
        start = time.perf_counter()
        for _ in range(count):
            token = feed([token])
        return (time.perf_counter() - start) / count

    return run, {"ran": lib.kernels, "bytes": os.path.getsize(path)}


def int4_llama(options: Options) -> tuple[Run, Options]:
    """ggml's product of a q4_0 matrix with a vector: one graph with a product for every copy of the matrix."""
    import numpy as np

    lib = Llama(options["llama"], options["threads"])
    base, call, pointer = lib.base, lib.call, ctypes.c_void_p
    weights, x = _weights(options)
    outputs, inputs = weights.shape
    q4_0, f32 = 2, 0
    row = call(base, "ggml_row_size", ctypes.c_size_t, q4_0, ctypes.c_int64(inputs))
    stored = ctypes.create_string_buffer(outputs * row)
    data = np.ascontiguousarray(weights, dtype=np.float32)
    call(
        base,
        "ggml_quantize_chunk",
        ctypes.c_size_t,
        q4_0,
        data.ctypes.data,
        stored,
        ctypes.c_int64(0),
        ctypes.c_int64(outputs),
        ctypes.c_int64(inputs),
        None,
    )
    many = copies(outputs * row, COLD_BYTES_INT4)

    class Init(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("buffer", pointer), ("no_alloc", ctypes.c_bool)]

    def room() -> int:
        return call(base, "ggml_init", pointer, Init(64 << 20, None, True))

    def tensor(where: int, kind: int, *shape: int) -> int:
        sizes = [ctypes.c_int64(size) for size in shape]
        return call(base, f"ggml_new_tensor_{len(shape)}d", pointer, where, kind, *sizes)

    backend = call(base, "ggml_backend_dev_init", pointer, lib.cpu, None)
    lib.own(b"ggml_backend_set_n_threads", None, pointer, ctypes.c_int)(backend, options["threads"])
    lib.own(b"ggml_backend_cpu_set_threadpool", None, pointer, pointer)(backend, lib.pool())
    kinds = {"as stored": call(base, "ggml_backend_get_default_buffer_type", pointer, backend)}
    bufts = lib.own(b"ggml_backend_dev_get_extra_bufts", ctypes.POINTER(pointer), pointer)(lib.cpu)
    for one in iter(bufts) if bufts else ():
        if not one:
            break
        kinds[call(base, "ggml_backend_buft_name", ctypes.c_char_p, one).decode()] = one
    wanted = [name for name in kinds if (name == "as stored") == (options["order"] == "as stored")]
    if not wanted:
        raise Missing("this llama.cpp has no other order of weights for this processor")
    held, work = room(), room()
    matrices = [tensor(held, q4_0, inputs, outputs) for _ in range(many)]
    if not call(base, "ggml_backend_alloc_ctx_tensors_from_buft", pointer, held, kinds[wanted[0]]):
        raise Missing(f"{wanted[0]} holds no such matrix")
    given = tensor(work, f32, inputs, 1)
    graph = call(base, "ggml_new_graph", pointer, work)
    products = [call(base, "ggml_mul_mat", pointer, work, m, given) for m in matrices]
    for product in products:
        call(base, "ggml_build_forward_expand", None, graph, product)
    call(base, "ggml_backend_alloc_ctx_tensors", pointer, work, backend)
    zero, size = ctypes.c_size_t(0), ctypes.c_size_t
    for matrix in matrices:
        call(base, "ggml_backend_tensor_set", None, matrix, stored, zero, size(outputs * row))
    x = np.ascontiguousarray(x[:1], dtype=np.float32)
    call(base, "ggml_backend_tensor_set", None, given, x.ctypes.data, zero, size(x.nbytes))

    def compute() -> None:
        if call(base, "ggml_backend_graph_compute", ctypes.c_int, backend, graph):
            raise RuntimeError("ggml could not compute the graph")

    compute()
    y = np.empty((1, outputs), np.float32)
    call(base, "ggml_backend_tensor_get", None, products[-1], y.ctypes.data, zero, size(y.nbytes))
    _seen(y, options)
    graphs = timed([compute])
    return lambda count: graphs(max(1, count // many)) / many, {
        "ran": f"{lib.kernels}, {wanted[0]}",
        "bytes": outputs * row,
    }


def int4_pumice(options: Options) -> tuple[Run, Options]:
    """One matrix in the layout that is asked for, or its form for memory, in whichever backend is fastest."""
    torch = _torch(options)
    import common

    from pumice.core import dispatch, registry
    from pumice.core.dispatch import Call
    from pumice.weights.layouts.base import pack

    weights, x = (torch.from_numpy(one) for one in _weights(options))
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
    _seen(calls[0]().float(), options)
    return timed(calls), {"ran": best, "bytes": form.nbytes, "bits": round(form.bits, 3)}


# Decoding


def decode_pumice(options: Options) -> tuple[Run, Options]:
    """A row of benchmarks/decode.py, all layers of a token in one call."""
    _torch(options)
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
    compiled = ov.Core().compile_model(f"{folder}/openvino_model.xml", "CPU", _openvino(options))
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
