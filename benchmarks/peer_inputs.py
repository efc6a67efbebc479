"""Weights, images and files that the peers of benchmarks/peers.py start from, the same for all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIZE = 4096
Row = Mapping[str, Any]


def write_inputs(scratch: Path, rows: Mapping[str, Row], count: int, layers: int) -> None:
    """Weights of every density and inputs, rounded to what bfloat16 holds, so that all peers start from the same."""
    import numpy as np

    def rounded(values: Any) -> Any:
        whole = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((whole + 0x8000) & 0xFFFF0000).view(np.float32)

    made = np.random.default_rng(0)
    np.save(scratch / "inputs.npy", rounded(made.standard_normal((count, SIZE), dtype=np.float32)))
    shape = (layers, SIZE, SIZE) if layers > 1 else (SIZE, SIZE)
    dense = rounded(made.standard_normal(shape, dtype=np.float32) / 64)
    groups = 1 if layers > 1 else 16
    for density in {row["density"] for row in rows.values()}:
        kept = made.random((*shape[:-1], SIZE // groups), dtype=np.float32) < density
        np.save(scratch / f"weights-{density}.npy", dense * np.repeat(kept, groups, -1))


def write_resnet(scratch: Path, rows: Mapping[str, Row], images: int) -> None:
    """The network with every pattern of zeros: as a checkpoint, as ONNX, and what it gives in float32; and the images."""
    import numpy as np
    import torch
    from torch import nn
    from transformers import ResNetConfig, ResNetForImageClassification

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x).logits

    made = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, 224, 224, generator=made).bfloat16().float()
    np.save(scratch / "images.npy", x.numpy())
    for zeros in sorted({row["zeros"] for row in rows.values()}):
        torch.manual_seed(0)
        model = ResNetForImageClassification(ResNetConfig()).eval()
        share, grouped = float(zeros.split()[0]), "groups" in zeros
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.1, generator=made)  # pyright: ignore[reportOptionalMemberAccess]
                    module.running_var.uniform_(0.5, 1.5, generator=made)  # pyright: ignore[reportOptionalMemberAccess]
                elif isinstance(module, nn.Conv2d) and module.in_channels > 3:
                    size = (module.out_channels // (16 if grouped else 1), *module.weight.shape[1:])
                    kept = torch.rand(size, generator=made) >= share
                    module.weight *= kept.repeat_interleave(16, 0) if grouped else kept
            model = model.bfloat16().float()
            folder = scratch / f"resnet-{zeros}"
            model.save_pretrained(folder)
            np.save(folder / "logits.npy", model(x).logits.numpy())
            options = {"input_names": ["x"], "output_names": ["y"], "opset_version": 13, "dynamo": False}
            torch.onnx.export(Logits(model), (x,), str(folder / "network.onnx"), **options)


def write_gguf(model: Any, path: Path) -> None:
    """A Llama's weights in bf16 for llama.cpp, without a tokenizer, which only numbers go through."""
    import gguf
    import torch

    config, kind = model.config, gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # that of the embedding
            continue
        to = names.get_name(name, try_suffixes=(".weight",))
        assert to is not None
        if tensor.dim() == 1:
            writer.add_tensor(to, tensor.float().numpy())
        else:
            data = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(to, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ordinary(model: Any) -> Any:
    """The same model without the note that it came from a GGUF file, which cannot be saved."""
    config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    made = type(model)(config).to(model.dtype)
    made.load_state_dict(model.state_dict())
    return made
