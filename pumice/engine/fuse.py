"""Decoding in one call a token: `fuse(model)` lets a Hugging Face decoder run all its layers in C++ where that is possible.

The forward of the model's decoder is put behind one that takes single tokens (of up to 16 sequences, on the CPU, without
gradients) and hands everything else to the original: prompts, training, outputs of single layers, compilation, hooks, caches
of other kinds. Modules, names and weights stay as they are, in whatever layouts; `generate` and `forward` are called as before.
What a cache needs for that is in cache_room.py.

Legend: B sequences, T tokens, H heads, d width of a head, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from pumice.core import dispatch
from pumice.core.decoder import Decoder, DecoderLayer
from pumice.core.errors import PumiceError
from pumice.engine.cache_room import kind_of
from pumice.engine.watch import Watch
from pumice.weights.layouts.base import pack as pack_as
from pumice.weights.modules import SparseLinear

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the decoders whose layers are those of `core/decoder.py`."""
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
HEAD_ROWS = 4
"""Rows up to which a dense head streams its weights itself."""
PLAIN = {"cache_position", "use_cache", "return_dict", "output_attentions", "output_hidden_states"}


def fuse(model: nn.Module) -> nn.Module:
    """Let a decoder take single tokens through all its layers in one call, in place; returns the model.

    Raises:
        PumiceError: the model is no decoder of a known family, or no kernel runs it; the message says why.
    """
    try:
        decoder = _decoder_of(model)
        forward = decoder.__dict__.get("forward")
        if not isinstance(forward, FusedForward):
            forward = FusedForward(decoder)
        forward.bind()
    except PumiceError as error:
        reason = str(error).rstrip(".")
        raise PumiceError(f"model={type(model).__name__} cannot decode in one call: {reason}.") from None
    decoder.__dict__["forward"] = forward
    head = getattr(model, "lm_head", None)
    if type(head) is nn.Linear and "forward" not in head.__dict__:
        head.__dict__["forward"] = FewRows(head)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Take `fuse` back, in place; returns the model."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward | FewRows):
            del module.__dict__["forward"]
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse` was called on it."""
    return any(isinstance(module.__dict__.get("forward"), FusedForward) for module in model.modules())


def _decoder_of(model: nn.Module) -> nn.Module:
    """The part of a model that holds the layers.

    Raises:
        PumiceError: there is none of a known family, or one that computes something else.
    """
    found = None
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "model_type", None) in FAMILIES and isinstance(
            getattr(module, "layers", None), nn.ModuleList
        ):
            found = module
            break
    if found is None:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise PumiceError(f"{kind} is none of {', '.join(FAMILIES)}")
    config = found.config
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        raise PumiceError(f"its activation is {config.hidden_act}, not silu")
    windows = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
    if windows or (config.model_type == "mistral" and getattr(config, "sliding_window", None) is not None):
        raise PumiceError(f"its attention sees a window ({', '.join(sorted(windows)) or 'sliding_window'})")
    return found


def _backend(decoder: Decoder) -> dispatch.Backend:
    shape, device = (decoder.width, decoder.inner), str(decoder.norm.device)
    call = dispatch.Call("decoder", "dense", decoder.dtype, device, 1, shape, {"head": decoder.head})
    found = dispatch.candidates(call)
    for backend, reason in found:
        if reason is None:
            return backend
    raise PumiceError("; ".join(f"{backend.name}: {reason}" for backend, reason in found) or "no kernel is there")


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Part, parent and name of each matrix of a layer."""
    for part in ATTENTION:
        yield part, cast(nn.Module, layer.self_attn), f"{part}_proj"
    for part in MLP:
        yield part, cast(nn.Module, layer.mlp), f"{part}_proj"


def _stored(name: str, module: nn.Module) -> tuple[Any, Tensor | None]:
    if isinstance(module, SparseLinear) and not module.transposed:
        return module.packed, module.bias
    if type(module) is nn.Linear:
        return pack_as(module.weight, "dense"), module.bias
    raise PumiceError(f"{name} is a {type(module).__name__}, neither Linear nor SparseLinear")


def _describe(decoder: nn.Module) -> Decoder:
    """The op's view of a Transformers decoder.

    Raises:
        PumiceError: a part is missing, of another kind, dtype or device.
    """
    config: Any = decoder.config
    layers = []
    blocks = list(cast(nn.ModuleList, decoder.layers))
    for index, layer in enumerate(blocks):
        parts = {}
        for part, parent, name in _linears(layer):
            parts[part] = _stored(f"layers.{index}.{name}", cast(nn.Module, getattr(parent, name)))
        attention = cast(Any, layer.self_attn)
        norms = [cast(Any, layer.input_layernorm), cast(Any, layer.post_attention_layernorm)]
        heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        layers.append(
            DecoderLayer(parts, *(norm.weight for norm in norms), *(None if n is None else n.weight for n in heads))
        )
        eps = {norm.variance_epsilon for norm in [*norms, *heads, decoder.norm] if norm is not None}
        if len(eps) != 1:
            raise PumiceError(f"its norms have several eps ({sorted(eps)})")
    dtypes = {stored.dtype for layer in layers for stored, _ in layer.parts.values()}
    if len(dtypes) != 1:
        raise PumiceError(f"its matrices have several dtypes ({', '.join(map(str, dtypes))})")
    devices = {
        tensor.device.type
        for layer in layers
        for stored, _ in layer.parts.values()
        for tensor in stored.tensors.values()
    }
    if devices != {"cpu"}:
        raise PumiceError(f"its weights are on {', '.join(sorted(devices))}, not on cpu")
    first: Any = blocks[0].self_attn
    return Decoder(
        tuple(layers),
        cast(Any, decoder.norm).weight,
        config.num_attention_heads,
        config.num_key_value_heads,
        first.head_dim,
        cast(Any, decoder.norm).variance_epsilon,
        first.scaling,
        dtypes.pop(),
    )


def _state(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor gets other numbers, or other memory (`module.to` keeps the Parameter)."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _watch(decoder: nn.Module) -> Watch:
    watch = Watch()
    for name in ("layers", "norm"):
        watch.see(decoder._modules, name, decoder._modules[name])
        for module in cast(nn.Module, decoder._modules[name]).modules():
            for held in (module._modules, module._parameters, module._buffers):
                watch.see_all(held)
            watch.called(module)
    watch.start()
    return watch


class FusedForward:
    """The forward of a decoder that takes single tokens itself and leaves the rest to the original."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        self.watch: Watch | None = None
        self.run: Callable[..., Tensor] | None = None
        self.described: Decoder | None = None
        functools.update_wrapper(self, type(decoder).forward, updated=())

    def __getstate__(self) -> dict[str, Any]:
        # A copy binds its own weights when it is first called.
        return {"decoder": self.decoder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        FusedForward.__init__(self, state["decoder"])

    def bind(self) -> None:
        """Make the plan for the weights as they are now.

        Raises:
            PumiceError: a layer is of a kind or layout that has no kernel for single tokens.
        """
        described = _describe(self.decoder)
        self.run = _backend(described).prepare(described, None)
        self.described, self.watch = described, _watch(self.decoder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        decoder = self.decoder
        token = None if args or torch.compiler.is_compiling() else self._token(**kwargs)
        if token is None:
            return type(decoder).forward(decoder, *args, **kwargs)
        return token

    def _token(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """What forward returns, or None where this is not the call for it."""
        decoder: Any = self.decoder
        given = input_ids if inputs_embeds is None else inputs_embeds
        if (
            given is None
            or given.dim() < 2
            or given.shape[1] != 1
            or (input_ids is not None and inputs_embeds is not None)
        ):
            return None
        if torch.is_grad_enabled() or decoder.training or torch.is_autocast_enabled("cpu") or others.keys() - PLAIN:
            return None
        config = decoder.config
        if others.get("return_dict") is False or others.get("use_cache") is False:
            return None
        for name in ("output_attentions", "output_hidden_states"):
            if others.get(name, getattr(config, name, False)):
                return None
        batch, cache = given.shape[0], kind_of(past_key_values)
        if cache is None or batch > 16:
            return None
        length = cache.length(past_key_values) + 1
        mask_BT = _mask(attention_mask, batch, length)
        if mask_BT is _UNKNOWN or not self._ready():
            return None
        x = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        described = self.described
        assert described is not None
        assert self.run is not None
        if x.dtype is not described.dtype or not x.is_cpu:
            return None
        room = cache.room(past_key_values, described, batch, length)
        if room is None:
            return None
        if position_ids is None:
            position_ids = torch.full((1, 1), length - 1)
        cos, sin = (t.expand(batch, -1, -1).contiguous() for t in decoder.rotary_emb(x, position_ids=position_ids))
        if cos.shape[-1] != described.head:
            return None
        y = self.run(x.contiguous().view(batch, -1), cos, sin, room.addresses, room.strides, length, mask_BT)
        cache.advance(past_key_values, room, length)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(
            last_hidden_state=cast(Any, y.view(batch, 1, -1)), past_key_values=past_key_values
        )

    def _ready(self) -> bool:
        """Whether the plan is that of the weights as they are; a new one is made where they changed."""
        if self.watch is None or self.watch.stale():
            self.watch = None
            try:
                self.bind()
            except PumiceError:
                return False
        assert self.watch is not None
        return not self.watch.hooked()


class FewRows:
    """The forward of an ordinary linear layer whose rows are few at inference: its weights streamed once."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.bound: tuple[Any, Callable[[Tensor], Tensor] | None] | None = None
        functools.update_wrapper(self, type(layer).forward, updated=())

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        FewRows.__init__(self, state["layer"])

    def __call__(self, input: Tensor) -> Tensor:
        layer = self.layer
        rows = input.shape[:-1].numel()
        if (
            not 0 < rows <= HEAD_ROWS
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or type(input) is not Tensor
            or input.dtype is not layer.weight.dtype
            or torch.is_autocast_enabled(input.device.type)
        ):
            return nn.Linear.forward(layer, input)
        run = self._run()
        if run is None:
            return nn.Linear.forward(layer, input)
        return run(input.reshape(rows, -1)).view(*input.shape[:-1], layer.out_features)

    def _run(self) -> Callable[[Tensor], Tensor] | None:
        weight, bias = self.layer.weight, self.layer.bias
        state = id(weight), id(bias), _state(weight), None if bias is None else _state(bias)
        if self.bound is None or self.bound[0] != state:
            packed = pack_as(weight, "dense")
            call = dispatch.Call("linear", "dense", weight.dtype, str(weight.device), 1, packed.shape)
            backend = dispatch.get("linear", "dense", "decode")
            self.bound = state, None if backend.refuse(call) else backend.prepare(packed, bias)
        return self.bound[1]


_UNKNOWN: Any = object()


def _mask(attention_mask: Any, batch: int, length: int) -> Tensor | None:
    """Which tokens are there, uint8 [B, T]; None for all of them, `_UNKNOWN` where the mask is of another kind."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, length):
        return _UNKNOWN
    if attention_mask.dtype.is_floating_point:
        return _UNKNOWN
    there = attention_mask != 0
    return None if bool(there.all()) else there.to(torch.uint8).contiguous()
