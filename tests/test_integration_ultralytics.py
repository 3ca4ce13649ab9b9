"""coordatt_fast.ultralytics on a real YOLO: a yaml with the block, training, resuming, running average, validation,
prediction, export, reload; acceleration that outlives ultralytics' rebuilding of the network.
"""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import seeds
import third_party
import tolerances
import torch
import yaml
from harness import feature_map
from torch import nn

import coordatt_fast
import coordatt_fast.ultralytics as integration
from coordatt_fast import CoordAtt
from coordatt_fast.accelerate import Accelerated

ultralytics = pytest.importorskip("ultralytics")


def spec(block):
    """YOLOv8n whose neck reads a map with the block before it twice."""
    found = yaml.safe_load((Path(ultralytics.__file__).parent / "cfg/models/v8/yolov8.yaml").read_text())
    *neck, _ = found["head"]
    heads = [[-1, 1, block, ["c2", "c2"]], [18, 1, block, [128, 128]], [15, 1, block, [64, 64, 16]]]
    return found | {"scale": "n", "nc": 2, "head": [*neck, *heads, [[24, 23, 22], 1, "Detect", ["nc"]]]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model yaml and a data set: the photographs that ultralytics ships, cut in pieces, with boxes."""
    import cv2
    import torchvision
    from ultralytics.utils.nms import TorchNMS

    # torchvision's compiled operators are those of another build of torch; ultralytics has this one in plain PyTorch.
    monkeypatch.setattr(torchvision.ops, "nms", TorchNMS.nms)
    monkeypatch.chdir(tmp_path)
    assets = ultralytics.utils.ROOT / "assets"
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True), (tmp_path / "labels" / split).mkdir(parents=True)
    for i, name in enumerate(("bus.jpg", "zidane.jpg")):
        picture = cv2.resize(cv2.imread(str(assets / name)), (128, 128))
        for j, part in enumerate((picture, picture[:, ::-1])):
            for split in ("train", "val"):
                cv2.imwrite(str(tmp_path / f"images/{split}/{i}{j}.png"), part)
                (tmp_path / f"labels/{split}/{i}{j}.txt").write_text(f"{i} 0.5 0.5 0.6 0.7\n")
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump({"path": str(tmp_path), "train": "images/train", "val": "images/val", "names": ["bus", "man"]})
    )
    return tmp_path


def options(folder, **more):
    quiet = {"plots": False, "verbose": False, "workers": 0, "device": "cpu", "project": str(folder / "runs")}
    return {"data": str(folder / "data.yaml"), "imgsz": 64, "batch": 4, "amp": False, **quiet, **more}


def blocks(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


def build(folder, block):
    path = folder / f"yolov8n-{block.lower()}.yaml"
    path.write_text(yaml.safe_dump(spec(block)))
    return ultralytics.YOLO(str(path), task="detect")


def outputs(model, x):
    out = model.eval()(x)
    return out[0] if isinstance(out, (tuple, list)) else out


def test_a_yaml_with_the_block_through_its_life(folder):
    integration.register("FastCoordAtt")
    yolo = build(folder, "FastCoordAtt")
    assert len(blocks(yolo.model, CoordAtt)) == 3
    assert [b.conv1.in_channels for b in blocks(yolo.model, CoordAtt)] == [256, 128, 64]
    yolo.train(**options(folder, epochs=2, name="first"))
    losses = [float(row.split(",")[2]) for row in (folder / "runs/first/results.csv").read_text().split("\n")[1:3]]
    assert all(loss > 0 for loss in losses)
    best = folder / "runs/first/weights/best.pt"
    loaded = ultralytics.YOLO(str(best))
    x = feature_map((1, 3, 64, 96), seeds.generator(0), torch.float32)
    assert len(blocks(loaded.model, CoordAtt)) == 3
    kept = x.clone()
    plain = copy.deepcopy(loaded.model)
    with coordatt_fast.use_backend("reference"), torch.no_grad():
        expected = outputs(plain, x)
    with torch.no_grad():
        got = outputs(loaded.model, x)
    assert torch.equal(x, kept) and max(tolerances.errors(got, expected)) < 1e-4
    assert loaded.val(**options(folder, name="val")).box.map >= 0
    fused = copy.deepcopy(loaded.model).fuse(verbose=False)
    with torch.no_grad():
        assert max(tolerances.errors(outputs(fused, x), expected)) < 1e-3
    assert len(loaded.predict(str(folder / "images/val/00.png"), imgsz=64, verbose=False, device="cpu")) == 1


def test_the_tutorial(folder, monkeypatch):
    """Every block of docs/ultralytics.md, in order, in an empty folder."""
    page = (Path(__file__).parent.parent / "docs/ultralytics.md").read_text()
    (folder / "tutorial").mkdir()
    monkeypatch.chdir(folder / "tutorial")
    monkeypatch.setattr(ultralytics.nn.tasks, "CoordAtt", ultralytics.nn.tasks.CoordAtt)
    space = {"__name__": "__main__"}
    monkeypatch.setattr(sys.modules["__main__"], "CoordAtt", None, raising=False)
    code = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    assert len(code) == 5
    for block in code:
        exec(compile(block, "docs/ultralytics.md", "exec"), space)
    assert len(blocks(space["best"].model, CoordAtt)) == 2
    assert space["total"][-1] < 0.8 * space["total"][0], space["total"]
    assert len(space["boxes_found"]) == 1 and len(blocks(space["own"].model, Accelerated)) == 2


def test_a_name_of_theirs_is_refused():
    with pytest.raises(ValueError, match="'Conv', which is a layer of ultralytics"):
        integration.register("Conv")


def test_acceleration_lasts(folder):
    """Training rebuilds the network from its yaml; that, its running average and what is saved are accelerated too."""
    block = third_party.plain_block()
    yolo = build(folder, block.__name__)
    report = integration.accelerate(yolo)
    assert len(report.replaced) == 3 and not report.skipped
    callbacks = copy.copy(yolo.callbacks["on_predict_start"])
    integration.accelerate(yolo)
    assert yolo.callbacks["on_predict_start"] == callbacks
    seen = {}

    def look(trainer):
        seen["model"] = len(blocks(trainer.model, Accelerated)), trainer.model is not yolo.model
        seen["average"] = len(blocks(trainer.ema.ema, Accelerated))

    yolo.add_callback("on_train_start", look)
    yolo.train(**options(folder, epochs=1, name="run"))
    assert seen == {"model": (3, True), "average": 3}
    assert len(blocks(yolo.model, Accelerated)) == 3
    last = ultralytics.YOLO(str(folder / "runs/run/weights/last.pt"))
    assert len(blocks(last.model, Accelerated)) == 3
    yolo.predict(str(folder / "images/val/00.png"), imgsz=64, verbose=False, device="cpu")
    assert len(blocks(yolo.predictor.model.model, Accelerated)) == 3


def test_what_is_no_ultralytics_model_is_refused():
    with pytest.raises(TypeError, match="an ultralytics model with a PyTorch network, got a Linear"):
        integration.accelerate(nn.Linear(1, 1))


@pytest.fixture(autouse=True)
def _quiet():
    """Without ultralytics' warnings; it also sets what is deterministic in the process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.use_deterministic_algorithms(True)
