"""2SSP: neurons of the FFNs by their activations, then whole attentions by the loss without them."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from torch import nn

from pumice.core import select, structure
from pumice.core.errors import PumiceError
from pumice.core.progress import bar
from pumice.core.registry import shrink
from pumice.prune.shrink.base import MULTIPLE, Job, block_parameters, removable
from pumice.prune.shrink.blocks import Parts, find_blocks, find_parts, sample, size
from pumice.prune.shrink.budget import uniform
from pumice.prune.shrink.ffn import activation_norms, ffn_groups
from pumice.prune.shrink.refit import check_refit, cut
from pumice.prune.shrink.trials import Trials
from pumice.weights.residual import NoAttention, Nothing


@shrink("2ssp", key="2ssp", paper="arXiv:2501.17771", needs=("activations",))
def two_ssp(
    model: nn.Module,
    job: Job,
    *,
    alpha: Annotated[float, "the larger, the more attentions go and the fewer neurons"] = 1.5,
    refit: Annotated[str, "none, layer or dense: what the FFN's last layer is refitted to after neurons went"] = "none",
    choice: Annotated[str, "activation (the paper) or obs: which neurons stay"] = "activation",
    samples: Annotated[int, "calibration windows of the first stage; 0 takes all"] = 0,
    trials: Annotated[int, "calibration windows on which the loss without an attention is measured"] = 16,
    multiple: Annotated[int, "neurons are kept in multiples of this"] = MULTIPLE,
) -> nn.Module:
    """Remove FFN neurons with small activations, then the attentions that the loss misses least (2SSP).

    With s the share of the blocks' parameters to remove, L blocks and P parameters in an FFN or attention,
    round(L · s^((P_ffn / P_attn) / α)) attentions go (no more than the density asks for) and the FFNs give the rest, all
    the same number of neurons.
    Stage 1: a neuron's score is the L2 norm over the tokens of a sample of what it sends to the FFN's last layer, averaged
    over samples. Stage 2: one after the other, the attention (with its norm) goes without which the calibration loss is
    lowest, measured on the model as it is by then. Formula, α and the order follow the method's public implementation,
    which measures stage 2 on one window of 2048 tokens.

    Not in the paper: `refit`, a least-squares fit of the FFN's last layer to the neurons that stay ("layer": to its own
    dense outputs; "dense": to those of the dense model, which makes good the blocks before as well), and `choice="obs"`,
    the neurons that a refit can replace best, one by one, as in width-ls.

    Raises:
        PumiceError: blocks that are not norm, attention, norm, FFN; no data; alpha not positive; a density that cannot be
            reached.
    """
    check_refit(refit, choice)
    if not alpha > 0:
        raise PumiceError(f"option alpha={alpha} of shrink '2ssp' must be positive.")
    batches = sample(job, samples or 10**9)
    name, layers = find_blocks(model)
    parts = find_parts(model, layers, batches[0])
    groups = ffn_groups(model, job, name, parts)
    sizes = [_attention_size(block, part) for block, part in zip(layers, parts, strict=True)]
    # Which attentions go is known only later, so that they count with their mean size.
    share = sum(sizes) / len(sizes) / block_parameters(model)
    wanted = attentions_to_remove(layers, parts, 1 - job.density, alpha)
    count = min(wanted, int((1 - job.density) / share + 1e-9))
    first = replace(job, density=min(1.0, job.density + count * share))
    try:
        removable(model, groups, first)
        counts = uniform(model, groups, first, multiple)
    except PumiceError as error:
        raise PumiceError(
            f"density={job.density:g} cannot be reached: behind {count} of {len(layers)} attentions the FFNs would have to "
            "give more than all neurons but one each; ask for a higher density, or take another method."
        ) from error
    scores = activation_norms(model, groups, batches, job)
    cuts = [(g, select.topk(scores[g.name], kept)) for g, kept in zip(groups, counts, strict=True)]
    cut(model, cuts, batches, job, refit, choice)
    gone = _remove_attentions(model, name, layers, parts, count, sample(job, trials), job) if count else []
    job.notes.append(
        f"{name}: {counts[0]} of {groups[0].units} neurons in every FFN; attentions removed: "
        f"{', '.join(map(str, sorted(gone))) or 'none'}"
    )
    return model


def attentions_to_remove(layers: nn.ModuleList, parts: list[Parts], sparsity: float, alpha: float) -> int:
    """round(L · s^((P_ffn / P_attn) / α)), at most L − 1; sizes of the first block."""
    ffn = sum(size(layers[0].get_submodule(name)) for name in parts[0].ffn)
    attention = size(layers[0].get_submodule(parts[0].attention))
    return min(len(layers) - 1, round(len(layers) * sparsity ** (ffn / attention / alpha)))


def _attention_size(block: nn.Module, part: Parts) -> int:
    return size(block.get_submodule(part.attention)) + size(block.get_submodule(part.norm_1))


def _remove_attentions(
    model: nn.Module,
    name: str,
    layers: nn.ModuleList,
    parts: list[Parts],
    count: int,
    batches: list[Any],
    job: Job,
) -> list[int]:
    """Greedily, by the loss without each; returns the blocks that lost theirs."""
    tried = Trials(model, layers, batches, job.compute)
    left, gone = list(range(len(layers))), []
    with bar(count, "remove attentions", enabled=job.progress, unit="attention") as shown:
        for _ in range(count):
            losses = {index: _loss_without(tried, layers, parts, index) for index in left}
            worst = min(left, key=losses.__getitem__)
            structure.replace(model, f"{name}.{worst}.{parts[worst].attention}", NoAttention)
            structure.replace(model, f"{name}.{worst}.{parts[worst].norm_1}", Nothing)
            left.remove(worst)
            gone.append(worst)
            tried.refresh()
            shown.update()
    return gone


def _loss_without(tried: Trials, layers: nn.ModuleList, parts: list[Parts], index: int) -> float:
    block, part = layers[index], parts[index]
    before = {key: block.get_submodule(key) for key in (part.attention, part.norm_1)}
    try:
        setattr(block, part.attention, NoAttention.build(before[part.attention]))
        setattr(block, part.norm_1, Nothing())
        return tried.loss(index, block)
    finally:
        for key, module in before.items():
            setattr(block, key, module)
