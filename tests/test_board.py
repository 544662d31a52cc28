"""What TensorBoard is given, read back from the event files."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from allconv.figures import confusion, curves


@pytest.fixture
def board(finished_run):
    run = finished_run / "lightning_logs/version_0"
    return EventAccumulator(str(run), {"tensors": 0, "images": 0}).Reload()


def test_scalars(board):
    tags = set(board.Tags()["scalars"])
    assert {"train/loss", "val/loss", "val/acc", "val/top5", "val/n", "lr"} <= tags
    assert "hp_metric" not in tags
    assert len(board.Scalars("val/acc")) == 3
    assert [event.value for event in board.Scalars("val/n")] == [800] * 3


def test_both_losses_are_on_one_chart(board):
    summary = board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(summary)
    assert list(layout.category[0].chart[0].multiline.tag) == ["train/loss", "val/loss"]


def test_pictures(board):
    tags = board.Tags()["images"]
    assert {"predictions", "confusion"} <= set(tags)
    for tag in ("predictions", "confusion"):
        image = board.Images(tag)[-1]
        assert image.width > 500
        assert image.height > 300


def test_configuration_is_text(board):
    text = board.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "width: 4" in text
    assert "max_epochs: 3" in text


def test_hyperparameters_have_the_final_figures(board):
    tags = board.Tags()["scalars"]
    assert {"hp/val_acc", "hp/val_loss"} <= set(tags)
    best = max(event.value for event in board.Scalars("val/acc"))
    assert board.Scalars("hp/val_acc")[-1].value == best


def test_curves_of_nothing_and_of_one_epoch():
    row = {"epoch": 0, "train/loss": 4.0, "val/loss": 4.1, "val/acc": 0.1, "val/top5": 0.3}
    assert not curves([], "no epoch yet").axes[0].lines
    figure = curves([row], "one epoch")
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]


def test_confusion_puts_groups_side_by_side():
    import torch

    groups = {"x": ("a", "c"), "y": ("b",)}
    matrix = torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 4]])  # of a, b, c
    figure = confusion(matrix, ("a", "b", "c"), groups, "three")
    shown = figure.axes[0].images[0].get_array()
    assert shown.tolist() == [[75, 0, 25], [0, 100, 0], [0, 0, 100]]
