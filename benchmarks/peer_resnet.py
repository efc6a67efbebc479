"""ResNet-50 in the engines that benchmarks/peers.py compares."""

from __future__ import annotations

from typing import Any

from peer_common import (
    Options,
    Run,
    openvino_options,
    timed,
    torch_for,
)


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
    torch = torch_for(options)
    from transformers import ResNetForImageClassification

    dtype = getattr(torch, options["dtype"])
    model = ResNetForImageClassification.from_pretrained(options["network"], dtype=dtype).eval()
    return model, torch.from_numpy(_images(options)).to(dtype), torch


def resnet_pumice(options: Options) -> tuple[Run, Options]:
    model, x, _ = _resnet(options)
    import pumice

    model = pumice.pack(model, batch=len(x), example=x, remeasure=options["remeasure"], progress=False)
    found = pumice.describe(model)
    kinds = []
    for layer in found.layers:
        if "convolution" in layer.name:
            backend = layer.backends[len(x)]
            dense = layer.layout == "dense"
            kinds.append(backend if not dense else "dense bundles" if backend == "bundles" else "dense")
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
    made = core.compile_model(f"{options['network']}/network.onnx", "CPU", openvino_options(options))
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
