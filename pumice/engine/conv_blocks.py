"""Modules around packed convolutions as one straight program: sums and activations behind a convolution go into its last step.

A residual block adds what came in to what its last convolution gives and clamps the sum; each of the two would read and write
all numbers again. That sum is written in the block's own code, where no hook reaches it, so the code is traced (`torch.fx`), on
its own, as far up from the convolutions as it can be; the trace is rewritten and stands in front of the module's forward. What
is checked once for the whole program, weights, hooks and settings, is not checked again for each layer. A program is taken only
if it gave what the module's own code gives on the example; whoever asks for gradients, a graph or hooks gets that code.

Legend: N images, O outputs, H rows, W columns.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import inspect
import math
import operator
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pumice.core.calls import call_model
from pumice.core.stats import evaluating
from pumice.engine.conv_sites import CLAMPS
from pumice.engine.convolve import FusedConvolution, InPlace, OwnForward, how, is_plain
from pumice.engine.watch import Watch
from pumice.weights.modules import SparseModule

RELU, RELU6 = CLAMPS[nn.ReLU], CLAMPS[nn.ReLU6]
CLAMPS_OF: dict[Any, tuple[float, float]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), RELU),
    F.relu6: RELU6,
}
"""Functions and methods of tensors that a convolution can do in its last step."""
SUMS, SUMS_IN_PLACE = (operator.add, torch.add, "add"), (operator.iadd, "add_")
CLOSE, CLOSE_ROUNDED = 1e-3, 0.05
"""How far a program may be from the module's own code on the example, as a share of the norm; the latter in sixteen bits."""


class _Tracer(fx.Tracer):
    """Layers stay calls, and so does what Pumice has put its own forward in front of; remembers its proxies."""

    def __init__(self) -> None:
        super().__init__()
        self.proxies: list[weakref.ref[fx.Proxy]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, SparseModule)
            or isinstance(m.__dict__.get("forward"), OwnForward)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = super().proxy(node)
        self.proxies.append(weakref.ref(made))
        return made

    def held(self) -> bool:
        """Whether somebody keeps a proxy: the code leaves something behind, which a program would not."""
        if any(proxy() is not None for proxy in self.proxies):
            gc.collect()
        return any(proxy() is not None for proxy in self.proxies)


def _takes_one(module: nn.Module) -> bool:
    """Whether its forward takes one argument and nothing else: what is not given would be traced as if it were."""
    kind = inspect.Parameter
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return (
        len(parameters) == 1
        and parameters[0].default is kind.empty
        and parameters[0].kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD)
    )


def _trace(module: nn.Module) -> fx.Graph | None:
    """The module's own code as a graph of layers and functions; None where it cannot be, or where the code changes something."""
    before = [(m, dict(m.__dict__)) for m in module.modules()]
    tracer = _Tracer()
    try:
        graph = tracer.trace(module)
    except Exception:  # whatever the model's code does with a proxy
        graph = None
    changed = False
    for m, held in before:
        if m.__dict__.keys() != held.keys() or any(m.__dict__[key] is not value for key, value in held.items()):
            m.__dict__.clear()
            m.__dict__.update(held)
            changed = True
    return None if graph is None or changed or tracer.held() else graph


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


class _Rewriter:
    """Puts what follows convolutions into them, in the graph of a module."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.graph, self.modules = graph, dict(module.named_modules(remove_duplicate=False))
        self.place: dict[fx.Node, int] = {}
        self.steps = 0

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if type(self._module(node)) is nn.Identity:
                node.replace_all_uses_with(node.all_input_nodes[0])
                self.graph.erase_node(node)
        self.place = {node: index for index, node in enumerate(self.graph.nodes)}
        for node in list(self.graph.nodes):
            module = self._module(node)
            fused = None if module is None else module.__dict__.get("forward")
            if isinstance(fused, FusedConvolution) and fused.site.module is module and len(node.all_input_nodes) == 1:
                self._convolution(node, fused)
        self.graph.lint()

    def _module(self, node: fx.Node | None) -> nn.Module | None:
        return self.modules[cast(str, node.target)] if node is not None and node.op == "call_module" else None

    def _clamp(self, node: fx.Node | None) -> tuple[float, float] | None:
        """The range of what an activation gives; None if it is none."""
        if node is None or len(node.all_input_nodes) != 1:
            return None
        module = self._module(node)
        if module is None:
            return CLAMPS_OF.get(node.target) if node.op in ("call_function", "call_method") else None
        own = isinstance(module.__dict__.get("forward"), InPlace | None)
        return CLAMPS.get(type(module)) if own else None

    def _convolution(self, node: fx.Node, fused: FusedConvolution) -> None:
        run = fused.ready()
        if run is None:
            return
        site, chain, clamp, add = fused.site, [node], fused.site.clamp, None
        for passed in (site.norm, site.activation):
            if passed is not None:
                follower = _only_user(chain[-1])
                if follower is None or self._module(follower) is not passed:
                    return
                chain.append(follower)
        if site.activation is None:
            follower = _only_user(chain[-1])
            if follower is not None and (other := self._added(follower, chain)) is not None:
                chain.append(follower)
                add, follower = other, _only_user(follower)
            if follower is not None and (found := self._clamp(follower)) is not None:
                chain.append(follower)
                clamp = found
        with self.graph.inserting_before(node):
            arguments = (node.all_input_nodes[0],) if add is None else (node.all_input_nodes[0], add)
            step = self.graph.call_function(_step(fused, run, clamp), arguments)
        self.place[step] = self.place[node]
        chain[-1].replace_all_uses_with(step)
        for done in reversed(chain):
            self.graph.erase_node(done)
        self.steps += 1

    def _added(self, node: fx.Node, chain: list[fx.Node]) -> fx.Node | None:
        """What a sum adds to the end of a chain, if it is there before the chain begins and nothing runs in between."""
        if node.op not in ("call_function", "call_method") or node.target not in SUMS + SUMS_IN_PLACE or node.kwargs:
            return None
        if len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args) or node.args[0] is node.args[1]:
            return None
        if node.target in SUMS_IN_PLACE and node.args[0] is not chain[-1]:
            # It is the other one that changes, which somebody else may hold.
            return None
        other = cast(fx.Node, node.args[0] if node.args[1] is chain[-1] else node.args[1])
        # What ran in between could change in place what the convolution reads.
        straight = all(a.next is b for a, b in zip([*chain], [*chain[1:], node], strict=True))
        return other if straight and self.place[other] < self.place[chain[0]] else None


def _step(fused: FusedConvolution, run: Callable[..., Tensor], clamp: tuple[float, float]) -> Callable[..., Tensor]:
    """One convolution of a program, with what follows it."""
    convolution = dataclasses.replace(how(fused.site), clamp=clamp)
    module, dtype, channels = cast(Any, fused.site.module), fused.dtype, cast(Any, fused.site.module).out_channels
    outputs: dict[torch.Size, tuple[int, ...]] = {}

    def convolve(x: Tensor, add_NOHW: Tensor | None = None) -> Tensor:
        if x.dim() == 4 and x.dtype is dtype and x.is_cpu:
            if add_NOHW is None:
                return run(x, convolution)
            shape = outputs.get(x.shape)
            if shape is None:
                outputs[x.shape] = shape = (x.shape[0], channels, *convolution.output(*x.shape[2:]))
            if add_NOHW.shape == shape and add_NOHW.dtype is dtype and add_NOHW.is_cpu:
                return run(x, convolution, add_NOHW)
        y = module(x)
        y = y if add_NOHW is None else y + add_NOHW
        return y if clamp == (-math.inf, math.inf) else y.clamp(*clamp)

    return convolve


class FusedBlock(OwnForward):
    """The forward of a module whose convolutions run with what its own code does behind them.

    The code was traced when the model was packed, and is not traced again: while that is done, no other thread may call modules.
    Where it could read otherwise by now, since modules or settings are others, it runs itself.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.graph = module, graph
        self.settings: Watch | None = None
        self.numbers: Watch | None = None
        self.run: Callable[[Tensor], Any] | None = None
        functools.update_wrapper(self, type(module).forward, updated=())

    def __getstate__(self) -> dict[str, Any]:
        # A copy binds its own weights when it is first called.
        return {"module": self.module, "graph": self.graph}

    def __setstate__(self, state: dict[str, Any]) -> None:
        FusedBlock.__init__(self, state["module"], state["graph"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and is_plain(args[0]):
            run = self.ready()
            if run is not None:
                return run(args[0])
        return type(self.module).forward(self.module, *args, **kwargs)

    def ready(self) -> Callable[[Tensor], Any] | None:
        """The program with the weights as they are now; None where it may not stand for the module's own code."""
        if self.settings is None:
            self.settings = _settings(self.module)
        if self.settings.stale() or self.settings.hooked():
            return None
        if self.numbers is None or self.numbers.stale():
            numbers = Watch()
            for module in self.module.modules():
                numbers.see_all(module._parameters)
                numbers.see_all(module._buffers)
            numbers.start()
            rewriter = _Rewriter(self.module, copy.deepcopy(self.graph))
            rewriter.run()
            run = fx.GraphModule(self.module, rewriter.graph).forward if rewriter.steps else None
            # In this order: whoever calls meanwhile makes one for himself.
            self.run, self.numbers = run, numbers
        return self.run


def _settings(module: nn.Module) -> Watch:
    """What the code of a module depends on beside its numbers."""
    watch, tracer = Watch(), _Tracer()
    for m in module.modules():
        watch.see_all(m._modules)
        if m is not module:
            watch.called(m, m.__dict__.get("forward"))
        watch.see(m.__dict__, "training", False)
        # The code may ask for anything that a module holds; layers ask for what they were made with.
        if not tracer.is_leaf_module(m, ""):
            for key, value in m.__dict__.items():
                if not key.startswith("_") and key not in ("training", "forward"):
                    watch.see(m.__dict__, key, value)
    watch.start()
    return watch


def fuse_blocks(model: nn.Module, example: Any) -> None:
    """Put programs in front of the outermost modules that have one and gave with it, on `example`, what their own code gives."""
    with evaluating(model):
        tried = _outermost(model)
        while tried:
            right = _tested(model, example, tried)
            for block in right:
                block.module.__dict__["forward"] = block
            wrong = [block.module for block in tried if block not in right]
            tried = [block for module in wrong for child in module.children() for block in _outermost(child)]


def _outermost(module: nn.Module) -> list[FusedBlock]:
    """The outermost modules in it, itself first, that have a program."""
    if "forward" in module.__dict__:
        return []
    if not any(isinstance(m.__dict__.get("forward"), FusedConvolution) for m in module.modules()):
        return []
    graph = _trace(module) if _takes_one(module) else None
    block = None if graph is None else FusedBlock(module, graph)
    if block is not None and block.ready() is not None:
        return [block]
    return [b for child in module.children() for b in _outermost(child)]


def _tested(model: nn.Module, example: Any, blocks: list[FusedBlock]) -> list[FusedBlock]:
    """Those whose program does, in a run of the model, what the module's own code does at each of its calls.

    That is to give the same, and to leave what was given as the code leaves it.
    """
    given: dict[int, Tensor] = {}
    right: dict[int, bool] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and type(args[0]) is Tensor:
            # The code may change what it is given.
            given[id(module)] = args[0].clone()

    def after(block: FusedBlock, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x, run = given.pop(id(module), None), block.ready()
        if x is None or run is None:
            return
        try:
            ours = run(x)
        except Exception:  # whatever the model's code does with what it was not traced for
            ours = None
        # `x += y` is traced as a sum that leaves x alone.
        right[id(module)] = right.get(id(module), True) and _agree(ours, output) and _agree(x, args[0])

    handles = [block.module.register_forward_pre_hook(before) for block in blocks]
    handles += [block.module.register_forward_hook(functools.partial(after, block)) for block in blocks]
    try:
        with torch.no_grad():
            call_model(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return [block for block in blocks if right.get(id(block.module))]


def _agree(ours: Any, theirs: Any) -> bool:
    if type(ours) is not Tensor or type(theirs) is not Tensor or ours.dtype is not theirs.dtype:
        return False
    if ours.shape != theirs.shape:
        return False
    limit = CLOSE_ROUNDED if theirs.dtype in (torch.bfloat16, torch.float16) else CLOSE
    return bool((ours.float() - theirs.float()).norm() <= limit * theirs.float().norm())
