"""`export`: files that others read, and that say of themselves what is in them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, TINY
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from allconv.__main__ import main
from allconv.checkpoints import PRETRAINED
from allconv.commands import export
from allconv.datasets.cifar100 import MEAN, STD
from allconv.datasets.demo import CLASSES, FOLDER


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["allconv"])


def test_safetensors_hold_the_weights_and_what_they_are(run, capsys):
    main(["validate"])
    main(["export", "--out", "net.safetensors"])
    said = capsys.readouterr().out
    assert "next: python -m allconv test --ckpt_path net.safetensors\n" in said
    saved = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    weights = load_file("net.safetensors")
    assert {f"net.{name}" for name in weights} == {
        name for name in saved["state_dict"] if name.startswith("net.")
    }
    for name, value in weights.items():
        assert torch.equal(value, saved["state_dict"][f"net.{name}"])
    metadata = metadata_of("net.safetensors")
    tested = json.loads((run / "test.json").read_text())
    validated = json.loads((run / "validate.json").read_text())
    assert metadata["classes"] == list(CLASSES)
    assert (metadata["mean"], metadata["std"]) == (list(MEAN), list(STD))
    assert metadata["hparams"]["width"] == 4
    assert metadata["epoch"] == tested["epoch"]
    for name in ("val_size", "split_seed"):
        assert metadata[name] == validated[name]
    assert metadata["demo"] is True
    for name in ("acc", "top5", "n"):
        assert metadata["test"][name] == tested[f"test/{name}"]
        assert metadata["val"][name] == pytest.approx(validated[f"val/{name}"], abs=1e-6)
    assert metadata["recipe"]["model"]["lr"] == 0.1
    assert metadata["recipe"]["seed_everything"] == 43
    assert "data_dir" not in metadata["recipe"]["data"]


def test_the_same_net_gives_the_same_bytes(run):
    main(["export", "--out", "one.safetensors"])
    for first in ("one.safetensors", PRETRAINED):
        main(["export", "--out", "two.safetensors", "--ckpt_path", str(first)])
        assert Path(first).read_bytes() == Path("two.safetensors").read_bytes()


def test_a_calibrated_net_gives_the_same_answers_with_a_lower_loss(run, capsys):
    main(["validate"])
    main("export --out net.safetensors --calibrate".split())
    temperature = float(capsys.readouterr().out.split("the temperature ")[1].split()[0])
    main("validate --ckpt_path net.safetensors".split())
    before, now = (
        json.loads(Path(p).read_text()) for p in (run / "validate.json", "validate.json")
    )
    assert now["val/acc"] == before["val/acc"]
    assert now["val/loss"] < before["val/loss"]
    metadata = metadata_of("net.safetensors")
    assert metadata["temperature"] == pytest.approx(temperature, abs=1e-4)
    assert metadata["val"].keys() == {"acc", "top5", "n"}
    main("export --out again.safetensors --ckpt_path net.safetensors --calibrate".split())
    assert "the temperature 1.0000" in capsys.readouterr().out
    assert metadata_of("again.safetensors")["temperature"] == pytest.approx(temperature, abs=1e-4)


def test_there_is_nothing_to_calibrate_on(own_folder, refused):
    main([*TINY, "--data.val_size", "0"])
    last = "lightning_logs/version_0/checkpoints/last.ckpt"
    said = refused("export", "--out=x.onnx", "--calibrate", f"--ckpt_path={last}", code=1)
    assert "data.val_size was 0" in said


def test_an_exported_net_is_tested_like_its_checkpoint(run):
    main(["export", "--out", "net.safetensors"])
    main(["test", "--ckpt_path", "net.safetensors"])
    found, expected = (json.loads(Path(p).read_text()) for p in ("test.json", run / "test.json"))
    assert found["test/acc"] == expected["test/acc"]


def test_figures_of_another_checkpoint_are_left_out(run):
    shutil.copy(run / "checkpoints/last.ckpt", run / "checkpoints/other.ckpt")
    main(["export", "--out", "net.safetensors", "--ckpt_path", str(run / "checkpoints/other.ckpt")])
    assert "test" not in metadata_of("net.safetensors")


@pytest.mark.slow
def test_onnx_gives_the_results_of_the_run(run, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="an extra: .[export]")
    main(["export", "--out", "net.onnx"])
    said = capsys.readouterr().out
    assert float(re.search(r"torch's within (\S+)", said)[1]) <= 1e-4
    content = Path("net.onnx").read_bytes()
    assert str(REPO).encode() not in content
    net = onnxruntime.InferenceSession(content)
    metadata = net.get_modelmeta().custom_metadata_map
    assert metadata["classes"].split(",") == list(CLASSES)
    assert json.loads(metadata["allconv"])["demo"] is True
    records = np.fromfile(f"data/{FOLDER}/test.bin", np.uint8).reshape(-1, 3074)
    (logits,) = net.run(None, {"images": records[:, 2:].reshape(-1, 3, 32, 32)})
    right = (logits.argmax(1) == records[:, 1]).mean()
    assert right == pytest.approx(json.loads((run / "test.json").read_text())["test/acc"])
    # and the README's example reads it
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    example = next(block for block in blocks if "onnxruntime" in block)
    image = Image.fromarray(records[0, 2:].reshape(3, 32, 32).transpose(1, 2, 0))
    image.save(re.search(r"[\w.]+\.(png|jpg)", example)[0], quality=100, subsampling=0)
    exec(example, {})
    assert CLASSES[logits[0].argmax()] in capsys.readouterr().out


@pytest.mark.slow
def test_an_onnx_file_with_other_logits_is_not_left(run, refused, monkeypatch):
    pytest.importorskip("onnxruntime", reason="an extra: .[export]")
    monkeypatch.setattr(export, "TOLERANCE", -1)
    assert "differ from torch's" in refused("export", "--out", "net.onnx", code=1)
    assert not list(Path().glob("net*"))


def test_missing_packages_are_named(run, refused, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    line = refused("export", "--out", "net.onnx", code=1)
    # what a clone has as an extra, so that it can be installed beside the wheel too
    extra = re.search(r"\nexport = \[(.*)\]", (REPO / "pyproject.toml").read_text())[1]
    assert line.endswith(f"pip install {' '.join(re.findall(r'[a-z]+', extra))}")


def test_what_cannot_be_exported_is_refused(run, refused):
    assert "out is net.pt" in refused("export", "--out", "net.pt", code=2)
    Path("file").touch()
    assert "file" in refused("export", "--out", "file/net.safetensors", code=1)
    torch.save(weights_of(run), "epoch9.pt")
    line = refused("export", "--out", "net.safetensors", "--ckpt_path", "epoch9.pt", code=1)
    assert "does not say on what it was trained" in line
    assert not list(Path().glob("net*"))


def test_a_net_that_is_not_trained_or_not_finite_is_refused(run, refused):
    path = run / "checkpoints/best.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["net.conv3.0.weight"][0, 0, 0, 0] = float("nan")
    torch.save(saved, path)
    assert "conv3.0.weight" in refused("export", "--out", "net.safetensors", code=1)
    few = "--data.demo true --model.width 4 --trainer.max_steps 1"
    main(["fit", *few.split()])
    refused("export", "--out", "net.safetensors", "--ckpt_path", "last", code=1)
    assert not list(Path().glob("net*"))


def weights_of(run):
    state = torch.load(run / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    return {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}
