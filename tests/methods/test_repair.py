"""Repairs: the mask stays, the held-out loss never grows, and each method's own identity."""

import copy
import json

import pytest
import torch
from torch import nn

import pumice
from pumice.cli import main
from pumice.core import registry
from pumice.core.errors import PumiceError
from pumice.core.stream import Stream
from pumice.core.view import find_views
from pumice.engine.repair import repair
from pumice.prune.repair.base import Clock, Job
from pumice.prune.repair.objective import Objective, guided_loss
from pumice.prune.repair.perp import MaskedAdapter
from tests import tiny

REPAIRS = [info.name for info in registry.methods("repair")]
FAST = {"perp": {"steps": 6, "lr": 1e-2}, "squarehead": {"steps": 6, "lr": 1e-3}}


def spec(name):
    return {"name": name, **FAST.get(name, {"steps": 4} if "steps" in registry.repair.get(name).options else {})}


def text_batches(count=20, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Every token follows from the one before, so that there is something to learn.
    start = torch.randint(4, 100, (count, 1), generator=generator)
    ids = (start + 7 * torch.arange(length)) % 96 + 4
    return [{"input_ids": row[None]} for row in ids]


def pruned(density=0.5, pattern=None, seed=0, values=None):
    dense = tiny.llama(seed)
    sparse = copy.deepcopy(dense)
    options = {"density": None if pattern else density, "pattern": pattern, "values": values}
    pumice.prune(sparse, "magnitude", progress=False, **options)
    return dense, sparse


def masks(model):
    return {view.name: view.matrix() != 0 for view in find_views(model)}


def run(model, method, teacher=None, **options):
    return repair(model, method, data=text_batches(), teacher=teacher, progress=False, **options)


@pytest.mark.parametrize("name", REPAIRS)
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_zeros_stay_and_it_never_gets_worse(name, pattern):
    integers = registry.repair.get(name).extras["integers"]
    dense, sparse = pruned(pattern=pattern, values="int8" if integers else None)
    before, zeros = copy.deepcopy(sparse.state_dict()), masks(sparse)
    result = run(sparse, spec(name), dense)
    assert result.after <= result.before
    for key, mask in masks(sparse).items():
        if name == "dsnot":
            assert mask.sum() <= zeros[key].sum()
            if pattern:
                assert mask.unflatten(-1, (-1, 4)).sum(-1).max() <= 2
        else:
            assert torch.equal(mask & zeros[key], mask)
    if not result.steps[0].kept:
        assert any("undone" in note for note in result.notes)
        assert all(torch.equal(before[key], value) for key, value in sparse.state_dict().items())


def test_trainings_learn():
    """On text that follows a rule, a few steps lower the loss clearly and the adapters leave no trace in the module."""
    for name in ("perp", "squarehead"):
        dense, sparse = pruned()
        result = run(sparse, spec(name), dense if name == "squarehead" else None)
        assert result.steps[0].kept
        assert result.after < result.before - 0.05
        assert set(sparse.state_dict()) == set(dense.state_dict())
        assert all(parameter.requires_grad for parameter in sparse.parameters())


def test_same_seed_same_result():
    results = []
    for _ in range(2):
        _, sparse = pruned()
        run(sparse, spec("perp"), seed=3)
        results.append(sparse.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_bf16_models_come_back_in_bf16():
    dense, sparse = pruned()
    sparse, dense = sparse.bfloat16(), dense.bfloat16()
    zeros = masks(sparse)
    run(sparse, [spec("refit"), spec("perp")], dense)
    assert {p.dtype for p in sparse.parameters()} == {torch.bfloat16}
    assert all(torch.equal(mask & zeros[key], mask) for key, mask in masks(sparse).items())


def test_masked_adapter_is_the_papers_formula():
    """W + s·M∘(BA) starts at W, keeps zeros, and merging equals running with the adapter."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 8, generator=generator) * (torch.rand(12, 8, generator=generator) < 0.5)
    adapter = MaskedAdapter(weight, 3, 2.0, False, generator)
    assert torch.equal(adapter(weight), weight)
    nn.init.normal_(adapter.up)
    expected = weight + 2.0 * (weight != 0) * (adapter.up @ adapter.down)
    torch.testing.assert_close(adapter(weight), expected)
    scaled = MaskedAdapter(weight, 3, 1.0, True, generator)
    torch.testing.assert_close(scaled(weight), weight, rtol=0.1, atol=0)
    assert torch.equal(scaled(weight) != 0, weight != 0)


def test_refit_solves_least_squares():
    """One linear layer: each row's kept weights are the normal equations' solution on its support."""
    torch.manual_seed(0)
    dense, x = nn.Sequential(nn.Linear(8, 6, bias=False)), torch.randn(512, 8)
    x[:, 1] += 2 * x[:, 0]
    sparse = copy.deepcopy(dense)
    pumice.prune(sparse, "magnitude", density=0.5, progress=False)
    mask, w = sparse[0].weight != 0, dense[0].weight.detach()
    method = {"name": "refit", "share": 0.0, "damp": 0.0}
    repair(
        sparse,
        method,
        data=list(x.split(32)),
        samples=len(x),
        teacher=dense,
        loss=lambda m, b: distance(m, dense, b),
        progress=False,
    )
    seen = x[32:]
    for row in range(6):
        at = mask[row]
        best = torch.linalg.lstsq(seen[:, at], seen @ w[row]).solution
        torch.testing.assert_close(sparse[0].weight[row, at].detach(), best, rtol=1e-3, atol=1e-4)


def distance(model, dense, batch):
    x = next(iter(batch.values())) if isinstance(batch, dict) else batch
    with torch.no_grad():
        target = dense(x)
    return (model(x) - target).square().mean()


def test_bias_correction_restores_mean_outputs():
    """After it, every layer's mean output on the calibration data is the dense model's, in a chain of layers."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    sparse = copy.deepcopy(dense)
    pumice.prune(sparse, "magnitude", density=0.4, progress=False)
    x = torch.randn(320, 8) + 0.5
    learn = x[20:]
    with torch.no_grad():
        gap = (sparse(learn) - dense(learn)).mean(0).abs().max()
    repair(
        sparse,
        "correct",
        data=list(x.split(20)),
        samples=len(x),
        teacher=dense,
        loss=lambda m, b: distance(m, dense, b),
        progress=False,
    )
    with torch.no_grad():
        after = (sparse(learn) - dense(learn)).mean(0).abs().max()
    assert gap > 1e-2
    assert after < 1e-5


def test_gains_are_least_squares():
    dense, sparse = pruned(density=0.3)
    job = Job(find_views(sparse), text_batches()[4:], text_batches()[:4], dense)
    registry.repair.bind({"name": "correct", "windows": 16})(sparse, job)
    norm = "model.norm"
    found = {}
    for key, net in (("ours", sparse), ("theirs", dense)):
        rows = []
        handle = net.get_submodule(norm).register_forward_hook(lambda m, a, y, rows=rows: rows.append(y.detach()))
        with torch.no_grad():
            for batch in job.batches[:16]:
                net(**batch)
        handle.remove()
        found[key] = torch.cat(rows, 1).flatten(0, 1)
    # At the optimum the residual is orthogonal to each channel.
    residual = ((found["theirs"] - found["ours"]) * found["ours"]).mean(0)
    assert residual.abs().max() < 1e-4


def test_batch_norm_statistics_are_the_average():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    dense = copy.deepcopy(model)
    pumice.prune(model, "magnitude", density=0.3, progress=False)
    x = torch.randn(64, 3, 6, 6)
    job = Job(find_views(model), [{"input": part} for part in x.split(16)], [{"input": x[:4]}], dense)
    registry.repair.bind({"name": "correct", "biases": False, "norms": False})(model, job)
    with torch.no_grad():
        seen = model[0](x)
    torch.testing.assert_close(model[1].running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert model[1].momentum == 0.1
    assert not model[1].training


def test_features_vanish_at_the_dense_model():
    """Task, KL and SquareHead: at the dense weights only the task's loss is left; otherwise the features' part is positive."""
    dense, sparse = pruned()
    job = Job(find_views(sparse), text_batches()[4:], text_batches()[:4], dense)
    batch = job.batches[0]
    with torch.no_grad():
        assert float(Objective(copy.deepcopy(dense), job, 1.0, 1.0, task=0.0)(batch)) == pytest.approx(0, abs=1e-6)
        assert float(Objective(sparse, job, 0.0, 1.0, task=0.0)(batch)) > 0.01
        ours = Objective(sparse, job, 0.0, 0.0)(batch)
        torch.testing.assert_close(ours, sparse(**batch, labels=batch["input_ids"]).loss)


@pytest.mark.parametrize("targets", ["some", "all", "none"])
def test_guided_loss_is_cross_entropy_plus_divergence(targets):
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(7, 11, generator=generator, requires_grad=True)
    theirs = torch.randn(7, 11, generator=generator)
    target = torch.randint(0, 11, (7,), generator=generator)
    target[: {"some": 3, "all": 0, "none": 7}[targets]] = -100
    entropy = 0.0 if targets == "none" else torch.nn.functional.cross_entropy(ours, target)
    wanted = 0.7 * entropy + 1.3 * torch.nn.functional.kl_div(
        ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean"
    )
    found = guided_loss(ours, theirs, target, 0.7, 1.3)
    torch.testing.assert_close(found, wanted)
    (2 * found).backward()
    gradient, ours.grad = ours.grad, None
    (2 * wanted).backward()
    torch.testing.assert_close(gradient, ours.grad)


def test_a_share_of_the_positions_is_compared_and_the_mean_is_the_whole():
    dense, sparse = pruned()
    (batch,) = text_batches(1, 8)
    job = Job(find_views(sparse), [batch], [batch], teacher=dense)
    whole = float(Objective(sparse, job, 1.0, 0.0, 0.0)(batch).detach())
    part = Objective(sparse, job, 1.0, 0.0, 0.0, 0.5)
    # 8 positions, 4 at a time, all equally often: the mean converges to the whole.
    found = torch.tensor([float(part(batch).detach()) for _ in range(400)])
    assert found.std() > 0
    assert found.mean() == pytest.approx(whole, abs=5 * float(found.std()) / 20)
    with pytest.raises(PumiceError, match="logits=0"):
        Objective(sparse, job, logits=0)


def test_encoder_follows_the_teacher():
    """A model without a loss of its own is trained towards the dense model's outputs."""
    dense = tiny.bert()
    sparse = copy.deepcopy(dense)
    pumice.prune(sparse, "magnitude", density=0.4, progress=False)
    result = run(sparse, spec("perp"), dense)
    assert 0 < result.after < result.before


def test_what_makes_it_worse_is_undone():
    dense, sparse = pruned()
    before = copy.deepcopy(sparse.state_dict())

    def worse(model, job):
        """Break everything."""
        with torch.no_grad():
            model.model.norm.weight.mul_(30)
        return {}

    info = registry.MethodInfo("repair", "worse", worse, extras={"minutes": None})
    result = run(sparse, registry.Bound(info), dense)
    assert not result.steps[0].kept
    assert result.after == result.before
    assert "undone" in result.notes[0]
    assert all(torch.equal(before[key], value) for key, value in sparse.state_dict().items())


def test_an_interrupted_repair_leaves_the_model_as_it_was():
    _, sparse = pruned()
    before = copy.deepcopy(sparse.state_dict())
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return model(**batch, labels=batch["input_ids"]).loss

    with pytest.raises(KeyboardInterrupt):
        run(sparse, spec("perp"), loss=loss)
    assert all(torch.equal(before[key], value) for key, value in sparse.state_dict().items())


def test_clock_stops_a_refit_between_blocks(monkeypatch):
    dense, sparse = pruned()
    before = copy.deepcopy(sparse.state_dict())
    job = Job(find_views(sparse), text_batches()[4:], text_batches()[:4], dense)
    monkeypatch.setattr(Clock, "used", 1.0)
    facts = registry.repair.bind("refit")(sparse, job)
    assert facts["solved"] == facts["layers"] // 2
    assert any("time was up" in note for note in job.notes)
    second = {key for key in before if ".layers.1." in key}
    assert all(torch.equal(before[key], sparse.state_dict()[key]) for key in second)
    assert any(not torch.equal(before[key], sparse.state_dict()[key]) for key in set(before) - second)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "perpp"}, "did you mean 'perp'"),
        ({"method": {"name": "perp", "rnak": 4}}, "did you mean 'rank'"),
        ({"method": {"name": "perp", "mode": "dora"}}, "mode='dora'"),
        ({"method": []}, "names no repair"),
        ({"minutes": 0}, "minutes=0"),
        ({"method": "refit"}, "teacher=None"),
        ({"method": "squarehead"}, "teacher=None"),
        ({"data": text_batches()[:1]}, "one batch"),
        ({"teacher": tiny.llama(hidden_size=16)}, "no layer"),
        ({"model": tiny.llama()}, "no zeros"),
    ],
)
def test_refused(change, words):
    _, sparse = pruned()
    given = {"method": "refit" if "teacher" in change else "perp", "data": text_batches(), "progress": False, **change}
    model = given.pop("model", sparse)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PumiceError, match=words):
        repair(model, given.pop("method"), **given)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_from_disk_to_disk_and_by_prune(tmp_path, capsys):
    """`pumice repair` on a checkpoint, and pruning that repairs at the end; both load as sparse models."""
    torch.manual_seed(0)
    dense = tiny.llama()
    dense.save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(" ".join(f"w{(7 * i) % 96}" for i in range(4000)))
    common = ["--data", str(tmp_path / "text.txt"), "--samples", "12", "--seqlen", "24"]
    with pytest.raises(SystemExit) as code:
        main(
            ["prune", str(tmp_path / "dense"), "-o", str(tmp_path / "out"), "-m", "wanda", "--density", "0.5", *common]
        )
    assert code.value.code in (0, None)
    capsys.readouterr()
    arguments = ["--teacher", str(tmp_path / "dense"), "-m", "refit,perp", "--set", "perp.steps=4", "--json", *common]
    with pytest.raises(SystemExit) as code:
        main(["repair", str(tmp_path / "out"), "-o", str(tmp_path / "better"), *arguments])
    assert code.value.code in (0, None)
    result = json.loads(capsys.readouterr().out)
    assert [step["method"]["name"] for step in result["steps"]] == ["refit", "perp"]
    assert result["after"] < result["before"]
    a, b = (pumice.unpack(pumice.load(tmp_path / name)) for name in ("out", "better"))
    zeros = masks(a)
    assert all(torch.equal(mask, zeros[key]) for key, mask in masks(b).items())
    third = pumice.prune(
        str(tmp_path / "dense"),
        "wanda",
        density=0.5,
        data=str(tmp_path / "text.txt"),
        samples=12,
        seqlen=24,
        out=tmp_path / "both",
        repair={"name": "perp", "steps": 4},
        progress=False,
    )
    assert third.repair is not None
    assert third.repair["after"] < third.repair["before"]
    assert pumice.load(tmp_path / "both") is not None


def test_stream_is_not_disturbed():
    """Parametrised weights are gone after a repair: the walk sees plain parameters."""
    _, sparse = pruned()
    run(sparse, spec("perp"))
    assert len(Stream(sparse, find_views(sparse), text_batches()[:2]).units) == 2
