"""Pictures of where the zeros are, as PNG without any imaging library.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.analyze.record import Mask
from pumice.core.view import module_views
from pumice.weights.layouts.base import unpack
from pumice.weights.modules import SparseModule

OVERVIEW = 256
CORNER = 64
KEPT = (15, 118, 110)


def png(opacity_HW: Tensor) -> str:
    """Base64 PNG of a picture in one colour whose opacity is given in [0, 1], so that it suits any background."""
    levels = opacity_HW.clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
    height, width = levels.shape
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), levels], 1).contiguous()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = (
        (b"IHDR", header),
        (b"PLTE", bytes(KEPT) * 256),
        (b"tRNS", bytes(range(256))),
        (b"IDAT", zlib.compress(rows.numpy().tobytes(), 9)),
        (b"IEND", b""),
    )
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)).decode()


def picture(name: str, w_OI: Tensor) -> Mask:
    """Density map of a weight [O, I] (at most 256 pixels a side) and its upper left corner weight by weight."""
    kept = (w_OI != 0).float()
    o, i = kept.shape
    size = (min(o, OVERVIEW), min(i, OVERVIEW))
    corner = kept[:CORNER, :CORNER]
    return Mask(
        name,
        (o, i),
        float(kept.mean()),
        png(F.adaptive_avg_pool2d(kept[None, None], size)[0, 0]),
        png(corner),
        (corner.shape[0], corner.shape[1]),
    )


def choose_layers(layers: Sequence[Mapping[str, Any]], count: int = 4) -> list[str]:
    """Names of the layers worth a picture: first, last, the one that lost most, the sparsest; in the model's order."""
    if not layers:
        return []
    by_error = sorted(layers, key=lambda layer: -(layer.get("error") or layer.get("weight_error") or 0.0))
    by_density = sorted(layers, key=lambda layer: layer["density"])
    wanted = [layers[0], by_error[0], layers[-1], by_density[0], layers[len(layers) // 2], *by_error[1:]]
    names = list(dict.fromkeys(layer["name"] for layer in wanted))[:count]
    return [layer["name"] for layer in layers if layer["name"] in names]


def pictures(model: nn.Module, names: Sequence[str]) -> list[Mask]:
    """Mask pictures of a model's weights by name, stored sparse or dense; names that it does not have are left out."""
    return [picture(name, w) for name, w in _weights(model, set(names))]


def _weights(model: nn.Module, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, SparseModule):
            if f"{name}.weight" in wanted:
                yield f"{name}.weight", unpack(module.packed)
            continue
        for view in module_views(name, module):
            if view.name in wanted:
                yield view.name, view.read()


def stored_pictures(folder: str | Path, names: Sequence[str]) -> list[Mask]:
    """Mask pictures of weights in a Pumice checkpoint by name, read from the files one by one."""
    from pumice.engine.disk import Shards
    from pumice.engine.store import read_config
    from pumice.engine.writer import join
    from pumice.weights.layouts.base import Packed

    layers = read_config(folder)["quantization_config"]["layers"]
    shards = Shards(Path(folder))
    found = []
    for name in names:
        key = name if name in layers else name.removesuffix(".weight")
        if key in layers:
            packed = Packed.empty(layers[key])
            packed.tensors = {part: shards.get(join(key, part)) for part in packed.tensors}
            found.append(picture(name, unpack(packed)))
        elif name in shards.where:
            found.append(picture(name, shards.get(name).flatten(1)))
    shards.close()
    return found
