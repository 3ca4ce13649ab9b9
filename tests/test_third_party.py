"""Networks of timm and ultralytics as they are on PyPI: accelerate finds the block in them, and nothing else
about them changes. The untouched network in float64 is the truth.
"""

import copy
import importlib.util
import io
import math
import warnings
from pathlib import Path

import pytest
import seeds
import tolerances
import torch
from torch import nn

from coordatt_fast import CoordAtt, accelerate, backends, explain, restore, use_backend

PACKAGES = ("timm", "torchvision", "ultralytics", "cv2", "yaml", "safetensors")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
if MISSING:  # installed, but broken, is an error
    pytest.skip(f"not installed: {', '.join(MISSING)}", allow_module_level=True)

from third_party import NETWORKS, ModelEMA, timm, timm_attention, yolo_save  # noqa: E402

from examples.third_party import tasks, ultralytics, yaml  # noqa: E402

MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
EACH = pytest.mark.parametrize("name", NETWORKS)
YOLO = "ultralytics yolov8n"


@pytest.fixture(autouse=True)
def _compiled_where_there_is_one():
    with use_backend("cpu" if backends()["cpu"].available else "auto"):
        yield


def without_kinks(model):
    """SiLU for every activation with a kink, means for maxima: of a million values some are so near a kink that
    rounding decides on which side they are, and one that changes sides moves gradients far more than rounding does."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.ReLU6, nn.Hardswish)):
                setattr(module, name, nn.SiLU())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))


@pytest.fixture(scope="module")
def pair():
    """A network by name, and the same after accelerate. Each call gives copies."""
    made = {}

    def give(name, dtype=torch.float32, smooth=False):
        if (name, smooth) not in made:
            theirs = NETWORKS[name].build()
            if smooth:
                without_kinks(theirs)
            ours = copy.deepcopy(theirs)
            made[name, smooth] = theirs, ours, accelerate(ours)
        theirs, ours, report = made[name, smooth]
        return copy.deepcopy(theirs).to(dtype), copy.deepcopy(ours).to(dtype), report

    return give


def results(network, model, images, training):
    """Outputs, gradients of the images and of every parameter, and statistics after one pass."""
    model.train(training).zero_grad()
    images = images.detach().clone().requires_grad_()
    outputs = network.outputs(model, images)
    g = seeds.generator(7)
    draws = [torch.randn(out.shape, generator=g, dtype=torch.float64) for out in outputs.values()]
    sum((out * draw.to(out.dtype)).sum() for out, draw in zip(outputs.values(), draws)).backward()
    found = {f"output {name}": out.detach() for name, out in outputs.items()} | {"d images": images.grad}
    found |= {f"d {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return found | {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}


def cancelled(truth):
    """Gradients that a normalisation further on cancels: rounding is all that is left of them."""
    sizes = {n: t.abs().max().item() for n, t in truth.items() if n.startswith("d ") and t is not None}
    return {n for n, size in sizes.items() if size < 1e-9 * max(sizes.values())}, max(sizes.values())


def same_formulas(found, truth):
    assert found.keys() == truth.keys()
    noise, scale = cancelled(truth)
    for name, value in truth.items():
        assert (value is None) == (found[name] is None), name
        if name in noise:
            assert found[name].abs().max() < 1e-9 * scale, name
        elif value is not None:
            assert max(tolerances.errors(found[name], value)) < tolerances.FORMULAS_AGREE, name


def group_errors(found, truth):
    """Root mean square of the error over that of the truth: of the outputs, of the gradients, of what else
    there is."""
    errors = {}
    for group, prefix in (("outputs", "output "), ("gradient of the images", "d images"), ("gradients", "d ")):
        names = [n for n in truth if n.startswith(prefix) and truth[n] is not None]
        wrong = sum((found[n].double() - truth[n]).square().sum().item() for n in names)
        errors[group] = math.sqrt(wrong / sum(truth[n].square().sum().item() for n in names))
    return errors


# What is replaced ----------------------------------------------------------------------------------


@EACH
def test_replaces_the_blocks_and_nothing_else(name, pair):
    network, (theirs, ours, report) = NETWORKS[name], pair(name)
    expected = [(path, network.cls, "fused", network.differs) for path in network.paths]
    assert [tuple(row) for row in report.replaced] == expected and not report.skipped
    assert [(row.path, row.norm, row.activation) for row in report.neighbours] == network.neighbours
    changed = [n for n, m in ours.named_modules() if type(m) is not type(theirs.get_submodule(n))]
    assert changed == network.changed
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options, tier, words",
    [
        ({}, "fused", "no bias"),
        ({"bias": True, "rd_channels": 9}, "fused", ""),
        ({"has_skip": True}, "fused", "adds x"),
        ({"act_layer": nn.SiLU}, "fused", "silu"),
        ({"norm_layer": None}, "fused", "no normalisation"),
        ({"norm_layer": timm_attention.GroupNorm1}, "hybrid", "GroupNorm1"),
        ({"act_layer": nn.GELU}, "hybrid", "GELU"),
    ],
    ids=str,
)
def test_options_of_timms_class(options, tier, words, training, cpu):
    network = NETWORKS["timm resnet50"]
    theirs = timm_attention.CoordAttn(48, **options).double()
    ours = copy.deepcopy(theirs)
    (row,) = accelerate(ours).replaced
    assert row.tier == tier and words in row.differs, row
    x = torch.randn(2, 48, 7, 10, dtype=torch.float64)
    assert explain(ours.train(training), x).tier == tier
    found = results(network, ours, x, training)
    same_formulas(found, results(network, theirs, x, training))


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: timm_attention.CoordAttn(48, gate_layer="hard_sigmoid"), "its output is not"),
        (lambda: timm_attention.SimpleCoordAttn(48), "fc1.weight is no part"),
        (lambda: timm_attention.EfficientLocalAttn(48), "conv_h is a 7 x 1 convolution"),
        (lambda: timm_attention.StripAttn(48), "conv_h is a 3 x 1 convolution"),
        (lambda: timm_attention.StripAttn(48, use_conv=False), "expected 1x1 convolutions"),
    ],
    ids=["hard gate", "simple", "local", "strip", "strip without convolutions"],
)
def test_timms_other_classes_are_left_alone(make, reason):
    module = make()
    kind = type(module)
    with pytest.warns(UserWarning, match="nothing to accelerate"):
        report = accelerate(nn.Sequential(module))
    (row,) = report.skipped
    assert not report.replaced and type(module) is kind
    assert (row.path, row.cls) == ("0", kind.__name__) and reason in row.reason, row


def test_a_network_of_look_alikes():
    with pytest.warns(UserWarning, match="nothing to accelerate"):
        report = accelerate(timm.create_model("efficientnet_b0", se_layer="scoord", num_classes=3))
    assert [row.path for row in report.skipped] == NETWORKS["timm efficientnet_b0"].paths


@pytest.mark.parametrize("kind", ["resnet18", "efficientnet_b0", "mobilenetv3_small_100"])
def test_networks_without_the_block(kind):
    """Squeeze-and-excitation and plain networks."""
    model = timm.create_model(kind, num_classes=3)
    kinds = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match="nothing to accelerate"):
        assert not accelerate(model).replaced
    assert [type(m) for m in model.modules()] == kinds


# What it computes ----------------------------------------------------------------------------------


@MODES
@EACH
def test_float64(name, training, pair):
    """Every output, gradient and statistic, element by element."""
    network, (theirs, ours, _) = NETWORKS[name], pair(name, torch.float64)
    images = network.batch(torch.float64)["img"]
    truth = results(network, theirs, images, training)
    same_formulas(results(network, ours, images, training), truth)


@MODES
@EACH
def test_float32(name, training, pair):
    """As close to the truth as the untouched network in float32, whose error depends on the order it sums
    in. Activations without kinks: test_float64 has those of the network."""
    network, (theirs, ours, report) = NETWORKS[name], pair(name, smooth=True)
    assert [row.tier for row in report.replaced] == ["fused"] * len(network.paths)
    kinked = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.MaxPool2d)
    assert not any(isinstance(module, kinked) for module in theirs.modules())
    images = network.batch(torch.float64)["img"].to(torch.float32)
    truth = results(network, copy.deepcopy(theirs).double(), images.double(), training)
    plain, found = [], []
    for layout in (torch.contiguous_format, torch.channels_last):
        given = images.contiguous(memory_format=layout)
        for model, errors in ((theirs, plain), (ours, found)):
            model = copy.deepcopy(model).to(memory_format=layout)
            errors.append(group_errors(results(network, model, given, training), truth))
    for errors in found:
        for group, error in errors.items():
            theirs_at_worst = max(p[group] for p in plain)
            bound = tolerances.NORM_FACTOR * theirs_at_worst + torch.finfo(torch.float32).eps
            assert error <= bound, f"{group}: {error:.3g}, the untouched network {theirs_at_worst:.3g}"


# Float64 shows that it is the same function: measured 6e-14.
PART = 1e-9


@EACH
def test_trains_side_by_side(name, pair):
    """Some steps with the loss that its users train it with: the same losses, which fall, and the same
    weights. In float64: in float32 a few steps amplify rounding, and test_float32 has each of them."""
    network, dtype = NETWORKS[name], torch.float64
    losses, models = [], pair(name, dtype)[:2]
    for model in models:
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        curve = []
        for step in range(5):
            loss = network.loss(model, network.batch(dtype, seed=step % 2))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimiser.step()
            curve.append(loss.item())
        losses.append(torch.tensor(curve, dtype=torch.float64))
    theirs, ours = losses
    bound = 1e-6 if name == YOLO else PART  # its loss is summed in float32 whatever the network computes in
    assert ((ours - theirs).abs() <= bound * theirs.abs()).all(), (ours, theirs)
    assert ours[-1] < ours[0], ours
    for (key, value), (_, other) in zip(models[1].state_dict().items(), models[0].state_dict().items()):
        gap = (value.double() - other.double()).norm() / other.double().norm().clamp_min(1e-3)
        assert gap <= PART, (key, gap)


def test_takes_in_what_timm_has_before_it(pair, calls, cpu):
    """Its normalisation with an activation, in float64; whatever else is in there makes each part run by itself."""
    network, (theirs, ours, _) = NETWORKS["timm efficientnet_b0"], pair("timm efficientnet_b0", torch.float64)
    block = theirs.blocks[2][0], ours.blocks[2][0]
    x = torch.randn(2, block[0].conv_pw.in_channels, 6, 5, dtype=torch.float64)
    changes = [
        (lambda m: None, 1),
        (lambda m: m.bn2.eval(), 1),
        (lambda m: setattr(m.bn2, "act", nn.ReLU()), 1),
        (lambda m: setattr(m.bn2, "act", nn.Identity()), 1),
        (lambda m: setattr(m.bn2, "act", nn.GELU()), 0),
        (lambda m: setattr(m.bn2, "act", nn.SiLU()), 1),
        (lambda m: setattr(m.bn2, "drop", nn.Tanh()), 0),
        (lambda m: setattr(m.bn2, "drop", nn.Identity()), 1),
        (lambda m: m.bn2.act.register_forward_hook(lambda _, args, out: out * 2), 0),
    ]
    for training in (True, False):
        for change, count in changes if training else changes[:1]:
            for module in block:
                module.train(training)
                change(module)
            same_formulas(results(network, block[1], x, training), results(network, block[0], x, training))
            assert len(calls) == (count if training else 0)
            calls.clear()


def test_timms_normalisation_of_another_version(monkeypatch, pair, calls):
    """One that does something else is not taken in."""
    from timm.layers import BatchNormAct2d

    forward = BatchNormAct2d.forward
    monkeypatch.setattr(BatchNormAct2d, "forward", lambda self, x: forward(self, x) * 2)
    _, (_, ours, _) = NETWORKS["timm efficientnet_b0"], pair("timm efficientnet_b0")
    ours.eval()(torch.zeros(1, 3, 64, 64))
    assert not calls


# What users do with it -----------------------------------------------------------------------------


@EACH
def test_checkpoints_both_ways(name, pair):
    """Saved by one and loaded by the other, which was something else before."""
    network, (theirs, ours, _) = NETWORKS[name], pair(name)
    images = network.batch(torch.float32)["img"]
    for source, target in ((ours, copy.deepcopy(theirs)), (theirs, copy.deepcopy(ours))):
        expected = network.outputs(source.eval(), images)
        with torch.no_grad():
            for tensor in target.state_dict().values():
                tensor.zero_()
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file), strict=True)
        with torch.no_grad():
            found = network.outputs(target.eval(), images)
        for key, value in expected.items():
            assert max(tolerances.errors(found[key], value.detach())) < 1e-5, key


@EACH
def test_restored(name, pair):
    network, (theirs, ours, _) = NETWORKS[name], pair(name)
    images = network.batch(torch.float32)["img"]
    assert restore(ours) == network.changed
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    with torch.no_grad():
        expected, found = (network.outputs(m.eval(), images) for m in (theirs, ours))
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_whole_yolo_as_its_trainer_keeps_it(pair):
    """Its moving average of the weights, pickled whole in half precision, read again, convolutions and
    normalisations fused for inference.
    """
    network, (theirs, ours, _) = NETWORKS[YOLO], pair(YOLO)
    images = network.batch(torch.float32)["img"]
    kept = []
    for model in (theirs, ours):
        average = ModelEMA(model)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
        average.update(model)
        file = io.BytesIO()
        yolo_save({"model": copy.deepcopy(average.ema).half()}, file)
        file.seek(0)
        kept.append(torch.load(file, weights_only=False)["model"].float().eval())
    assert [type(m).__name__.removeprefix("Accelerated") for m in kept[1].modules()] == [
        type(m).__name__ for m in kept[0].modules()
    ]
    for prepare in (lambda model: model, lambda model: model.fuse(verbose=False)):
        with torch.no_grad(), warnings.catch_warnings():
            expected, found = (network.outputs(prepare(model), images) for model in kept)
        for key, value in expected.items():
            assert max(tolerances.errors(found[key], value)) < 1e-5, key
    block, x = kept[1].get_submodule("model.22"), torch.zeros(1, 64, 8, 12)
    assert explain(block, x).tier == ("fused" if backends()["cpu"].available else "reference")


def test_a_reloaded_yolo_whose_neck_reads_the_map_again(tmp_path, monkeypatch):
    """The block by its class in the yaml, its input read once more by a later layer; saved in half precision, and
    read by ultralytics' own loader, which sets attributes on modules.
    """
    monkeypatch.setattr(tasks, "CoordAtt", CoordAtt)
    file = Path(ultralytics.__file__).parent / "cfg/models/v8/yolov8.yaml"
    spec = yaml.safe_load(file.read_text())
    *neck, _ = spec["head"]
    again = [[15, 1, "CoordAtt", [64, 64]], [[15, -1], 1, "Concat", [1]]]
    spec |= {"scale": "n", "nc": 3, "head": [*neck, *again, [[23, 18, 21], 1, "Detect", ["nc"]]]}
    seeds.seed(0)
    model = tasks.DetectionModel(spec, ch=3, verbose=False).half()
    images = NETWORKS[YOLO].batch()["img"]
    yolo_save({"model": copy.deepcopy(model), "ema": None, "train_args": {}}, tmp_path / "last.pt")
    read, _ = tasks.load_checkpoint(tmp_path / "last.pt")
    assert type(read.model[22]) is CoordAtt and read.model[23].f == [15, -1]
    with torch.no_grad():
        expected, found = (NETWORKS[YOLO].outputs(m.float().eval(), images) for m in (model, read))
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_timms_moving_average(pair):
    network, (_, ours, _) = NETWORKS["timm efficientnet_b0"], pair("timm efficientnet_b0")
    average = timm.utils.ModelEmaV3(ours, decay=0.5)
    before = copy.deepcopy(average.module.state_dict())
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(3.0)
    average.update(ours)
    assert restore(average.module) == network.changed
    for key, value in average.module.state_dict().items():
        if key.endswith("conv_h.weight"):
            assert torch.allclose(value, 2 * before[key])
