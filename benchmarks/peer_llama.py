"""llama.cpp through its shared libraries, for benchmarks/peers.py."""

from __future__ import annotations

import ctypes
import os
import re
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
    leave,
    timed,
    weights_of,
)


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
    weights, x = weights_of(options)
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
    leave(y, options)
    graphs = timed([compute])
    return lambda count: graphs(max(1, count // many)) / many, {
        "ran": f"{lib.kernels}, {wanted[0]}",
        "bytes": outputs * row,
    }
