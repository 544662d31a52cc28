"""What TensorBoard is given, read back from the event files."""

import re

import pytest
from conftest import RUN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2


@pytest.fixture(scope="module")
def board(finished_run):
    return EventAccumulator(str(finished_run / RUN), {"tensors": 0, "images": 0}).Reload()


def test_scalars(board):
    tags = set(board.Tags()["scalars"])
    assert {"train/loss", "val/loss", "val/acc", "val/top5", "val/n", "lr"} <= tags
    assert not {"epoch", "hp_metric"} & tags
    assert len(board.Scalars("val/acc")) == 3
    assert [event.value for event in board.Scalars("val/n")] == [800] * 3
    # of an epoch's last step, so that both losses stand over the same place
    steps = [event.step for event in board.Scalars("val/loss")]
    assert steps == [8, 17, 26]


def test_both_losses_are_on_one_chart(board):
    summary = board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(summary)
    tags = board.Tags()["scalars"]
    assert "train/loss_step" in tags  # a chart of its own
    lines = layout.category[0].chart[0].multiline.tag
    found = [[tag for tag in tags if re.search(line, tag)] for line in lines]
    assert found == [["train/loss"], ["val/loss"]]


def test_figures(board):
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
    assert {"val/best_acc", "val/best_loss"} <= set(tags)
    best = max(event.value for event in board.Scalars("val/acc"))
    assert board.Scalars("val/best_acc")[-1].value == best
    content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["model.width"].number_value == 4
    assert found["seed_everything"].number_value == 43
    assert "model.lr" not in found  # what was not changed
