"""Room for one more token in a cache of Transformers, whose keys and values C++ reads and writes in place.

A `DynamicCache` gets memory that it can grow in, so that no token copies what is there; its layers then hold views of that
memory, and it can be cropped, reordered and copied as ever. A `StaticCache` has its room already.
Shapes of keys and values: B sequences, H heads, T tokens, d width of a head.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from pumice.core.decoder import Decoder

ROOM = 256
"""Tokens by which a cache grows at least."""


class Room:
    """Keys and values of all layers in memory that has room for more tokens, and where they lie.

    `views` are the tensors that the cache's layers hold: any others mean that somebody changed the cache.
    """

    def __init__(self, addresses: Tensor, strides: tuple[int, int], buffer: Tensor | None = None) -> None:
        self.addresses, self.strides, self.buffer = addresses, strides, buffer
        self.views: tuple[Tensor, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        # The copy's tensors lie elsewhere, so that it gets room of its own.
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


class Dynamic:
    """A `DynamicCache` all of whose layers keep all tokens."""

    @staticmethod
    def length(cache: Any) -> int:
        return cache.layers[0].keys.shape[2]

    @staticmethod
    def room(cache: Any, decoder: Decoder, batch: int, length: int) -> Room | None:
        layers = cache.layers
        found: Room | None = cache.__dict__.get("_pumice_room")
        held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        if found is not None and found.buffer is not None and len(found.views) == len(held):
            same = all(map(operator.is_, found.views, held))
            if same and length <= found.buffer.shape[3]:
                return found
        shape = batch, decoder.kv_heads, length - 1, decoder.head
        if len(layers) != len(decoder.layers) or any(t.shape != shape or t.dtype is not decoder.dtype for t in held):
            return None
        most = length + max(ROOM, length // 2)
        buffer = torch.empty(len(held), batch, decoder.kv_heads, most, decoder.head, dtype=decoder.dtype)
        for place, tensor in zip(buffer, held, strict=True):
            place[:, :, : length - 1] = tensor
        starts = buffer.data_ptr() + torch.arange(len(held)) * (buffer.stride(0) * buffer.element_size())
        return Room(starts, (buffer.stride(1), buffer.stride(2)), buffer)

    @staticmethod
    def advance(cache: Any, room: Room, length: int) -> None:
        assert room.buffer is not None
        room.views = room.buffer.narrow(3, 0, length).unbind(0)
        cache._pumice_room = room
        for index, layer in enumerate(cache.layers):
            layer.keys, layer.values = room.views[2 * index], room.views[2 * index + 1]


class Static:
    """A `StaticCache`, which has its room already."""

    @staticmethod
    def length(cache: Any) -> int:
        return int(cache.layers[0].cumulative_length)

    @staticmethod
    def room(cache: Any, decoder: Decoder, batch: int, length: int) -> Room | None:
        held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        most = held[0].shape[2]
        shape = batch, decoder.kv_heads, most, decoder.head
        fits = all(t.shape == shape and t.dtype is decoder.dtype and t.is_contiguous() for t in held)
        if not fits or length > most or len(cache.layers) != len(decoder.layers):
            return None
        addresses = torch.tensor([tensor.data_ptr() for tensor in held])
        return Room(addresses, (held[0].stride(0), held[0].stride(1)))

    @staticmethod
    def advance(cache: Any, room: Room, length: int) -> None:
        for layer in cache.layers:
            layer.cumulative_length.add_(1)


def kind_of(cache: Any) -> type[Dynamic] | type[Static] | None:
    """How a cache is handled; None for one of another kind, an empty one, or none."""
    layers = getattr(cache, "layers", None)
    if not layers or not all(getattr(layer, "is_initialized", False) for layer in layers):
        return None
    kinds = {f"{type(cache).__name__}/{type(layer).__name__}" for layer in layers}
    if kinds == {"DynamicCache/DynamicLayer"}:
        return Dynamic
    return Static if kinds == {"StaticCache/StaticLayer"} else None
