"""Whatever a file holds, a reader takes it or refuses it with its own error.

By hand, with many examples and their numbers:
ALLCONV_EXAMPLES=5000 pytest -n 0 --hypothesis-show-statistics tests/test_readers.py
"""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import LAST
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from allconv import checkpoints, rundir
from allconv.__main__ import main
from allconv.datasets import images
from allconv.datasets.cifar100 import DataError
from allconv.datasets.demo import Demo

EXAMPLES = os.environ.get("ALLCONV_EXAMPLES")
few = settings(
    max_examples=int(EXAMPLES or 40),
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def damage(draw, content, places=None):
    """The content cut anywhere or nowhere, with up to three bytes changed."""
    damaged, size = bytearray(content), len(content)
    anywhere = st.integers(0, size - 1)
    for place in draw.draw(st.lists(anywhere if places is None else places | anywhere, max_size=3)):
        damaged[place] ^= draw.draw(st.integers(1, 255))
    del damaged[draw.draw(st.just(size) | st.integers(0, size)) :]
    return bytes(damaged)


def load(name):
    """The checkpoint, or None if it is refused with its name."""
    try:
        return checkpoints.load(Path(name))
    except checkpoints.CheckpointError as error:
        assert name in str(error)


@few
@given(st.data())
def test_a_damaged_checkpoint_is_refused_or_the_same(run, draw):
    """Never other weights."""
    expected = checkpoints.load(LAST)
    Path("damaged.ckpt").write_bytes(damage(draw, LAST.read_bytes()))
    if found := load("damaged.ckpt"):
        assert found.hparams == expected.hparams
        assert found.step == expected.step
        assert all(torch.equal(v, found.weights[key]) for key, v in expected.weights.items())


# what JSON, YAML and a checkpoint can hold
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
texts = st.sampled_from("epoch width folder classes demo data num_classes 0".split())
nested = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)


@few
@given(st.data())
def test_any_value_in_a_checkpoint_is_refused_or_left_alone(run, draw):
    content = torch.load(LAST, weights_only=True)
    key = draw.draw(st.sampled_from([*content]))
    within = [content]
    if isinstance(content[key], dict) and content[key] and draw.draw(st.booleans()):
        within, key = [content[key]], draw.draw(st.sampled_from([*content[key]]))
    within[0][key] = draw.draw(nested)
    torch.save(content, "any.ckpt")
    if found := load("any.ckpt"):
        assert found.net().width == 4
        assert found.dataset.classes


@few
@given(metadata=nested | st.dictionaries(texts | st.just("hparams"), nested))
def test_any_metadata_of_an_export_is_refused_or_read(metadata, run):
    weights = {k: v.contiguous() for k, v in checkpoints.load(LAST).weights.items()}
    content = {"allconv": json.dumps(metadata)}
    Path("any.safetensors").write_bytes(safetensors.torch.save(weights, content))
    if found := load("any.safetensors"):
        assert found.net().width == 4


@few
@given(st.data())
def test_damaged_data_are_refused_or_read(own_folder, draw):
    """A record form has no checksum; the official files have one (tests/test_cifar100.py)."""
    demo = Demo(Path("data"))
    demo.prepare()
    path, record = Path("data/cifar-100-demo/train.bin"), 3074
    kept = path.with_name("kept")
    if not kept.exists():
        shutil.copy(path, kept)
    count = kept.stat().st_size // record
    labels = st.integers(0, count - 1).map(lambda n: n * record + 1)
    damaged = damage(draw, kept.read_bytes(), labels)
    if draw.draw(st.booleans()):
        damaged = damaged[: draw.draw(st.integers(0, count)) * record]
    path.write_bytes(damaged)
    try:
        sets = demo.load("train")
    except DataError as error:
        assert "train.bin" in str(error) or "val_size" in str(error)
        return
    assert sum(map(len, sets.values())) == len(damaged) // record


FILES = {
    **dict.fromkeys(("PNG", "JPEG", "BMP", "WEBP"), "RGB"),
    **{"GIF": "P", "TIFF": "RGBA", "PPM": "L"},
}


def encoded(format):
    """A small image as a file of the format."""
    file = io.BytesIO()
    gradient = Image.linear_gradient("L").resize((40, 30)).convert(FILES[format])
    gradient.save(file, format)
    return file.getvalue()


@few
@given(st.data())
def test_a_damaged_image_is_refused_or_read(draw):
    content = encoded(draw.draw(st.sampled_from(list(FILES))))
    try:
        found = images.read(io.BytesIO(damage(draw, content)))
    except images.ImageError:
        return
    assert images.reduce(found).shape == (3, 32, 32)


CONFIG = """seed_everything: 43
trainer: {max_epochs: 3, callbacks: [{class_path: A}]}
data:
  demo: true
"""
yamls = st.text() | st.text("abc: -[]{}&*!|>%@`,#\n\t 0.1e?'\"")


@few
@given(st.data())
def test_any_configuration_is_refused_or_read(own_folder, draw):
    content = draw.draw(st.none() | yamls)
    raw = damage(draw, CONFIG.encode()) if content is None else content.encode("utf-8", "replace")
    Path("config.yaml").write_bytes(raw)
    try:
        assert isinstance(rundir.read_yaml(Path("config.yaml")), dict)
    except rundir.RunError as error:
        assert "config.yaml" in str(error)


@few
@given(st.data())
def test_a_damaged_table_is_refused_or_read(run, draw):
    path = Path("damaged/metrics.csv")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damage(draw, (run / "metrics.csv").read_bytes()))
    try:
        rows = rundir.read_metrics(path.parent)
    except rundir.RunError as error:
        assert "metrics.csv" in str(error)
        return
    assert all("epoch" in row for row in rows)


KEYS = [
    *("model.width", "model.residuals", "model.dropout", "model.rectify_logits", "model.lr"),
    *("model.milestones", "model.warmup", "model.muon_lr", "model.compile", "data.data_dir"),
    *("data.batch_size", "data.val_size", "data.split_seed", "data.crop", "data.flip"),
    *("data.sizes", "data.demo", "seed_everything", "trainer.max_epochs", "init"),
]
values = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.text("0123456789.-+e[]{},: nulltrueinfa'\"#&*!|>%@`"),
    st.integers().map(str),
    st.floats().map(str),
)


@settings(few, max_examples=int(EXAMPLES or 25))
@given(key=st.sampled_from(KEYS), value=values)
def test_any_value_is_taken_or_refused_in_one_line(key, value, own_folder, capfd):
    with pytest.raises(SystemExit) as end:
        main(["fit", f"--{key}={value}", "--print_config"])
    said = capfd.readouterr()
    assert end.value.code in (0, 2)
    if end.value.code:
        assert len(said.err.splitlines()) == 1
        assert said.err.startswith("allconv: ")
