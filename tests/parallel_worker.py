"""What each process of tests/test_moe_parallel.py does; started by torchrun, reports to a file in the folder given."""

import contextlib
import copy
import datetime
import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pumice.moe
from pumice.core.errors import PumiceError
from pumice.moe import MoE
from pumice.moe.parallel import clip_grad_norm, expert_parameters, parallelise, world_statistics, world_unused

D, F, E = 8, 4, 12
LOST_LAYERS = 2


class Net(nn.Module):
    """Two MoE layers with something around them."""

    def __init__(self, seed=0, **options):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(D, D)
        self.blocks = nn.ModuleList(MoE(D, F, **{"experts": E, **options}) for _ in range(LOST_LAYERS))
        self.last = nn.Linear(D, D)
        self.double()

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def batches(sizes, seed=1):
    """Tokens of each process."""
    one = torch.Generator().manual_seed(seed)
    return [torch.randn(*(size if isinstance(size, tuple) else (size,)), D, generator=one).double() for size in sizes]


def mean_over_processes(model, group=None):
    """What DDP does with gradients."""
    spread = {id(weight) for weight in expert_parameters(model)}
    for weight in model.parameters():
        if id(weight) not in spread:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(weight.grad, group=group)
            weight.grad /= dist.get_world_size(group)


def share(weight_E, rank, world):
    return weight_E[rank * E // world : (rank + 1) * E // world]


def same_gradients(model, whole, rank, world):
    wanted = dict(whole.named_parameters())
    spread = {id(weight) for weight in expert_parameters(model)}
    assert len(spread) == LOST_LAYERS * len(model.blocks[0].experts.weights())
    for name, weight in model.named_parameters():
        should = wanted[name].grad
        should = torch.zeros_like(wanted[name]) if should is None else should
        should = share(should, rank, world) if id(weight) in spread else should
        got = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(got, should, atol=1e-10, rtol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def compare(rank, world, sizes, together=True, over="global", prepare=None, **options):
    """Outputs and gradients of the processes against one process that has all tokens (or sees each batch by itself)."""
    whole = Net(**options)
    if prepare:
        prepare(whole)
    model = parallelise(copy.deepcopy(whole), balance=over)
    xs = batches(sizes)
    total = max(sum(x[..., 0].numel() for x in xs), 1)
    mine = xs[rank].requires_grad_()
    y = model(mine)
    (world * y.square().sum() / total + pumice.moe.aux_loss(model)).backward()
    mean_over_processes(model)
    inputs = [x.detach().requires_grad_() for x in xs]
    if together:
        outputs = whole(torch.cat(inputs)).split([len(x) for x in inputs])
        extra = pumice.moe.aux_loss(whole)
    else:
        outputs, extra = [], 0.0
        for x in inputs:
            outputs.append(whole(x))
            extra = extra + pumice.moe.aux_loss(whole) / world
    (sum(out.square().sum() for out in outputs) / total + extra).backward()
    torch.testing.assert_close(y, outputs[rank], atol=1e-11, rtol=1e-8)
    torch.testing.assert_close(mine.grad / world, inputs[rank].grad, atol=1e-11, rtol=1e-8)
    same_gradients(model, whole, rank, world)
    return model, whole


def check_dropless(rank, world):
    for top_k in (1, 2, E):
        compare(rank, world, [3 * r + 2 for r in range(world)], top_k=top_k, shared=top_k % 2)
    compare(rank, world, [5] * world, kind={"name": "mlp", "bias": True}, shared=0)


def check_global_balance(rank, world):
    losses = {"load": 0.5, "z": 0.3, "entropy": 0.2}
    # Capacity is a matter of each process, so there are no gradients to compare here: the plans' numbers are.
    model = parallelise(Net(balance=losses, capacity=0.9, shared=0), balance="global")
    whole = Net(balance=losses, shared=0)
    xs = batches([4 + 3 * r for r in range(world)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(xs[rank])
    whole(torch.cat(xs))
    ours, theirs = world_statistics(model)["blocks.0"], pumice.moe.statistics(whole)["blocks.0"]
    for name in ("tokens", "entropy", "z_loss"):
        assert abs(ours[name] - theirs[name]) < 1e-5, name
    assert ours["drop_rate"] > 0
    torch.testing.assert_close(model.blocks[0].aux_loss, whole.blocks[0].aux_loss, atol=1e-4, rtol=1e-4)
    compare(rank, world, [4 + r for r in range(world)], balance={**losses, "importance": 0.5})


def check_routers_that_learn_from_loads(rank, world):
    router = {"name": "deepseek", "update": 0.25}
    whole = Net(router=router, shared=0, balance={})
    model, local = (parallelise(copy.deepcopy(whole), balance=over) for over in ("global", "local"))
    xs = batches([4 + 3 * r for r in range(world)])
    for one in (model, local):
        one(xs[rank])
    whole(torch.cat(xs))
    # Deeper layers see other tokens where copies of the first differ, so the first is compared.
    wanted = whole.blocks[0].router.bias_E
    assert wanted.abs().sum() > 0
    torch.testing.assert_close(model.blocks[0].router.bias_E, wanted)
    apart = local.blocks[0].router.bias_E.clone()
    dist.broadcast(apart, 0)
    differs = torch.tensor(float((apart - local.blocks[0].router.bias_E).abs().sum() > 0))
    dist.all_reduce(differs)
    assert differs > 0, "each process's own tokens move its bias elsewhere"


def check_local_balance(rank, world):
    model, _ = compare(rank, world, [4] * world, together=False, over="local", balance={"load": 0.5})
    alone = [None] * world
    dist.all_gather_object(alone, float(model.blocks[0].aux_loss.detach()))
    assert len(set(alone)) == world


def check_processes_without_tokens(rank, world):
    compare(rank, world, [0] + [4] * (world - 1))
    compare(rank, world, [3] + [0] * (world - 1))
    compare(rank, world, [0] * world)
    compare(rank, world, [1] * world, top_k=1)


def check_experts_without_tokens(rank, world):
    def one_only(net):
        for block in net.blocks:
            block.router.weight_ED.data.zero_()
            block.assign = OnlyExpert(E - 1)

    model, _ = compare(rank, world, [3] * world, prepare=one_only, over="local", shared=0, balance={})
    assert world_unused(model)[: E - 1] == [f"blocks.0 expert {e}" for e in range(E - 1)]
    assert len(world_unused(model)) == LOST_LAYERS * (E - 1)


class OnlyExpert:
    """An assignment of one's own: everything to one expert."""

    def __init__(self, expert):
        self.expert = expert

    def __call__(self, routing, context):
        index_T1 = torch.full((routing.tokens, 1), self.expert)
        return pumice.moe.Plan.top_k(index_T1, routing.weight_TE.gather(1, index_T1), routing.experts, routing)


def check_capacity_and_other_assignments(rank, world):
    warnings.simplefilter("ignore")
    sizes = [5 + r for r in range(world)]
    compare(rank, world, sizes, together=False, over="local", capacity=0.5)
    compare(rank, world, sizes, together=False, over="local", assign="expert_choice")
    compare(rank, world, sizes, together=False, over="local", assign={"name": "threshold", "above": 0.09})
    shapes = [(r + 1, 3) for r in range(world)]
    compare(rank, world, shapes, together=False, over="local", router={"name": "slots", "slots": 2}, assign="soft")


def check_state_dict(rank, world):
    whole, other = Net(seed=3), Net(seed=4)
    model = parallelise(copy.deepcopy(other))
    model.load_state_dict(whole.state_dict())
    assert torch.equal(model.blocks[1].experts.down_proj, share(whole.blocks[1].experts.down_proj, rank, world))
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        assert full.keys() == whole.state_dict().keys()
        for name, value in whole.state_dict().items():
            assert torch.equal(full[name], value), name
        other.load_state_dict(full)
    own = model.state_dict()
    assert own["blocks.0.experts.down_proj"].shape[0] == E
    again = parallelise(Net(seed=5))
    again.load_state_dict(own)
    assert torch.equal(again.blocks[0].experts.gate_up_proj, model.blocks[0].experts.gate_up_proj)
    part = {**whole.state_dict(), "blocks.0.experts.down_proj": model.blocks[0].experts.down_proj.detach()}
    with pytest.raises(RuntimeError, match=f"has {E // world} experts and the layer {E}"):
        model.load_state_dict(part)


def check_distributed_checkpoint(rank, world):
    import torch.distributed.checkpoint as dcp

    model = parallelise(Net(seed=6))
    dcp.save(model.state_dict(), checkpoint_id=FOLDER / f"dcp{world}")
    if rank == 0:
        one = Net(seed=7)
        state = one.state_dict()
        dcp.load(state, checkpoint_id=FOLDER / f"dcp{world}", no_dist=True)
        wanted = Net(seed=6).state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in state.items())


def trained(model, x, step, total, world, clip):
    spread = {id(weight) for weight in expert_parameters(model)}
    groups = [[w for w in model.parameters() if (id(w) in spread) is which] for which in (False, True)]
    optimizer = torch.optim.SGD([{"params": group} for group in groups if group], lr=0.1, foreach=True)
    norms = []
    for _ in range(2):
        loss = world * model(x).square().sum() / total + step(model)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(clip(model)))
        optimizer.step()
    return norms


def train_beside_one_process(rank, world, wrap):
    whole = Net(balance={"load": 0.1})
    inner = parallelise(copy.deepcopy(whole), balance="global")
    model = wrap(inner)
    xs = batches([3 + r for r in range(world)])
    total = sum(map(len, xs))
    ours = trained(model, xs[rank], pumice.moe.aux_loss, total, world, lambda _: clip_grad_norm(inner, 0.05))
    plain = trained(
        whole, torch.cat(xs), pumice.moe.aux_loss, total, 1, lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.05)
    )
    assert plain[0] > 0.05
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), atol=1e-5, rtol=1e-5)
    full = get_model_state_dict(inner, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        for name, value in whole.state_dict().items():
            # The norm is in single precision.
            torch.testing.assert_close(full[name], value, atol=1e-7, rtol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


def check_ddp(rank, world):
    train_beside_one_process(rank, world, DistributedDataParallel)


def check_fsdp2(rank, world):
    def wrap(model):
        mesh = init_device_mesh("cpu", (world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, ignored_params=set(expert_parameters(model)))
        return fully_shard(model, mesh=mesh, ignored_params=set(expert_parameters(model)))

    train_beside_one_process(rank, world, wrap)


def check_mesh_with_two_axes(rank, world):
    if world != 4:
        return "needs 4 processes"
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    whole = Net(balance={})
    with pytest.raises(PumiceError, match=r"mesh\[.name.\]"):
        parallelise(copy.deepcopy(whole), mesh)
    model = parallelise(copy.deepcopy(whole), mesh["expert"])
    xs = batches([2 + r for r in range(world)])
    total = sum(map(len, xs))
    y = model(xs[rank])
    (world * y.square().sum() / total).backward()
    mean_over_processes(model)
    for weight in expert_parameters(model):
        dist.all_reduce(weight.grad, group=mesh["data"].get_group())
        weight.grad /= 2
    out = whole(torch.cat(xs))
    (out.square().sum() / total).backward()
    torch.testing.assert_close(y, out.split([len(x) for x in xs])[rank], atol=1e-11, rtol=1e-8)
    same_gradients(model, whole, mesh["expert"].get_local_rank(), 2)


def check_inference_copies_and_precisions(rank, world):
    whole = Net().eval()
    model = copy.deepcopy(parallelise(copy.deepcopy(whole)))
    x = batches([3] * world)[rank]
    with torch.no_grad():
        torch.testing.assert_close(model(x), whole(x), atol=1e-11, rtol=1e-8)
        every = model.blocks[0].experts.every(x)
        torch.testing.assert_close(every, whole.blocks[0].experts.every(x), atol=1e-11, rtol=1e-8)
        model, whole = model.float(), whole.float()
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = model.blocks[0](x.float()), whole.blocks[0](x.float())
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
        model, whole = model.bfloat16(), whole.bfloat16()
        ours, theirs = model.blocks[0](x.bfloat16()), whole.blocks[0](x.bfloat16())
        assert ours.dtype is torch.bfloat16
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


def refused(words, *arguments, **options):
    with pytest.raises(PumiceError, match=".*".join(words)):
        parallelise(*arguments, **options)


def check_refusals(rank, world):
    odd = nn.Sequential(MoE(D, F, E), MoE(D, F, E + 1))
    refused(("'1'", f"{E + 1} experts", f"{world} processes"), odd)
    assert odd[0].experts.down_proj.shape[0] == E
    model = parallelise(Net())
    refused(("'blocks.0'", "already spread"), model)
    refused(("no MoE layer",), nn.Linear(2, 2))
    refused(("balance='all'", "global"), Net(), balance="all")
    refused(("assign='merge'", "DDP"), MoE(D, F, E, assign="merge", by="segment"))
    refused(("smooth_load", "local"), MoE(D, F, E, "noisy", balance={"smooth_load": 0.1}), balance="global")
    assert parallelise(MoE(D, F, E, "noisy", balance={"smooth_load": 0.1}))(batches([3])[0].float()).shape == (3, D)


def check_processes_in_different_layers(rank, world):
    model = parallelise(Net(balance={}))
    x = batches([3])[0]
    for ours, theirs in ((model.blocks[0], model.blocks[1]), (model.blocks[0], no_grad(model.blocks[0]))):
        with pytest.raises(PumiceError, match=f"on rank {rank} .*same layers in the same order"):
            (ours if rank == 0 else theirs)(x)


def no_grad(module):
    return torch.no_grad()(module)


def lose(how, rank):
    """The last process goes away between two layers; the others are in the second one."""
    model = parallelise(Net(balance={}))
    x = batches([3])[0]
    model(x)
    if rank == dist.get_world_size() - 1:
        model.blocks[0](model.first(x))
        if how == "hang":
            time.sleep(600)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    started = time.monotonic()
    try:
        model(x)
    finally:
        (FOLDER / f"lost{rank}").write_text(str(time.monotonic() - started))


def run_checks(rank, world):
    report = {}
    for name, check in list(globals().items()):
        if not name.startswith("check_"):
            continue
        try:
            report[name] = check(rank, world) or "ok"
        except BaseException:
            report[name] = traceback.format_exc()
        (FOLDER / f"report{rank}.json").write_text(json.dumps(report))
        with contextlib.suppress(RuntimeError):
            fine = [None] * world
            dist.all_gather_object(fine, "Traceback" not in report[name])
            # Where all fail alike, they are still in step.
            if len(set(fine)) == 1:
                continue
        break


if __name__ == "__main__":
    FOLDER, mode = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=float(sys.argv[3])))
    if mode == "checks":
        run_checks(dist.get_rank(), dist.get_world_size())
        dist.destroy_process_group()
    else:
        lose(mode, dist.get_rank())
