"""The command line: the fixed commands, layers of configuration, and bad input in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPO, TINY

from allconv.__main__ import COMMANDS, main
from allconv.model import AllCNN


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["--version"], ["tset"]])
def test_answers_without_importing_torch(args):
    code = (
        "import sys\nfrom allconv.__main__ import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: print(end.code)\n"
        "assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
    )
    if args == ["tset"]:
        assert found.stdout == "2\n"
        assert found.stderr == "allconv: no command tset; did you mean test?\n"
    elif args == ["--version"]:
        assert found.stdout.startswith("allconv 0.")
    else:
        for command in COMMANDS:
            assert f"\n  {command} " in found.stdout


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_help_lists_every_key(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for key in ("--config", "--ckpt_path", "--seed_everything", "--init", "--model.width",
                "--model.residuals", "--model.dropout", "--model.rectify_logits",
                "--data.data_dir", "--data.batch_size", "--data.val_size", "--data.split_seed",
                "--data.demo", "--trainer.max_epochs"):  # fmt: skip
        assert key in text


def test_defaults_are_the_notebooks(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["seed_everything"] == 43
    assert config["trainer"]["max_epochs"] == 100
    expected = yaml.safe_load((REPO / "configs/notebook.yaml").read_text())
    for group in ("model", "data"):
        for key, value in expected[group].items():
            assert config[group][key] == value


def test_later_layers_win(own_folder, capsys):
    Path("a.yaml").write_text("model: {width: 8, lr: 0.3}\ndata: {batch_size: 32}\n")
    Path("b.yaml").write_text("model: {width: 16}\n")
    with pytest.raises(SystemExit):
        main("fit --config a.yaml --config b.yaml --data.batch_size 10 --print_config".split())
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["model"]["width"], config["model"]["lr"]) == (16, 0.3)
    assert config["data"]["batch_size"] == 10


def test_bare_commands_find_the_newest_run(run, capfd):
    main([*TINY, "--trainer.max_epochs", "1"])
    said = capfd.readouterr().out
    for word in ("best epoch 1 of 1", "lightning_logs/version_1", "python -m allconv test",
                 "tensorboard --logdir lightning_logs"):  # fmt: skip
        assert word in said
    main(["test"])
    assert Path("lightning_logs/version_1/test.json").is_file()
    assert not Path("lightning_logs/version_2").exists()


def test_table_of_layers_is_printed_before_training(own_folder, capfd):
    main([*TINY, "--trainer.max_epochs", "1", "--model.width", "64", "--trainer.fast_dev_run", "1"])
    text = "".join(capfd.readouterr())
    for part in ("net.conv9", "[1, 64, 32, 32]", "[1, 128, 16, 16]", "[1, 256, 8, 8]", "1.4 M",
                 "392 M"):  # fmt: skip
        assert part in text
    assert "MulticlassAccuracy" not in text


def test_evaluation_takes_the_runs_configuration(own_folder):
    main([*TINY, "--trainer.max_epochs", "1", "--data.split_seed", "5", "--data.val_size", "300"])
    main(["validate"])
    found = json.loads(Path("lightning_logs/version_0/validate.json").read_text())
    assert found["val/n"] == 300
    assert found["split_seed"] == 5
    assert found["remark"] is None
    assert "demo" in found["data"]
    main(["validate", "--data.split_seed", "6"])
    found = json.loads(Path("lightning_logs/version_0/validate.json").read_text())
    assert "another split" in found["remark"]


def test_evaluation_writes_beside_the_run(run):
    found = json.loads((run / "test.json").read_text())
    assert found["test/n"] == 1000
    assert found["checkpoint"] == "lightning_logs/version_0/checkpoints/best.ckpt"
    for name in ("test.png", "test_confusion.png", "curves.png"):
        assert (run / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    main(["test", "--ckpt_path", "last"])
    assert json.loads((run / "test.json").read_text())["epoch"] == 3
    main(["test", "--ckpt_path", str(run / "checkpoints/last.ckpt")])
    assert len(list(Path("lightning_logs").iterdir())) == 1


def test_init_starts_from_weights(run):
    last = str(run / "checkpoints/last.ckpt")
    main([*TINY, "--init", last, "--model.lr", "1e-9", "--trainer.max_epochs", "1"])
    old = torch.load(last, weights_only=True)["state_dict"]
    new = torch.load("lightning_logs/version_1/checkpoints/last.ckpt", weights_only=True)
    for key, value in new["state_dict"].items():
        if key.endswith("weight"):
            torch.testing.assert_close(value, old[key], atol=1e-5, rtol=0)


def test_without_a_run_nothing_is_evaluated(own_folder, refused):
    for command in ("test", "validate"):
        assert "no run with a best.ckpt" in refused(command, code=1)
    assert "no run with a last.ckpt" in refused("fit", "--ckpt_path", "last", code=1)


BAD_USAGE = {
    "--model.widht 3": "did you mean --model.width?",
    "--modle.width 3": "did you mean --model.width?",
    "--model.with=3": "did you mean --model.width?",
    "--trainer.max_epoch 3": "did you mean --trainer.max_epochs?",
    "--batch_size 3": "unrecognized",
    "--model.width abc": "model.width",
    "--model.width 1.5": "model.width",
    "--model.width 0": "width is 0: it must be at least 1",
    "--model.width -4": "width is -4",
    "--model.num_classes 1": "num_classes is 1",
    "--model.dropout 1": "dropout is 1.0",
    "--model.dropout nope": "model.dropout",
    "--model.residuals maybe": "model.residuals",
    "--model.rectify_logits 3": "model.rectify_logits",
    "--model.lr 0": "model.lr is 0.0: it must be above 0",
    "--model.lr -0.1": "model.lr is -0.1",
    "--model.momentum 1": "model.momentum is 1.0",
    "--model.weight_decay -1": "model.weight_decay is -1.0",
    "--model.gamma 0": "model.gamma is 0.0",
    "--model.warmup 1.5": "model.warmup is 1.5",
    "--model.muon_lr -1": "model.muon_lr is -1.0",
    "--model.label_smoothing 1": "model.label_smoothing is 1.0",
    "--model.milestones twenty": "model.milestones",
    "--data.batch_size 0": "data.batch_size is 0",
    "--data.batch_size many": "data.batch_size",
    "--data.val_size 5001": "data.val_size is 5001: it must be a multiple of 100",
    "--data.val_size 0": "data.val_size is 0",
    "--data.val_size 50000": "data.val_size is 50000",
    "--data.split_seed -1": "data.split_seed is -1",
    "--data.crop 32": "data.crop is 32",
    "--data.sizes [[2,20]]": "data.sizes has",
    "--data.cutmix 1.5": "data.cutmix is 1.5: it must be from 0 to 1",
    "--data.demo perhaps": "data.demo",
    "--trainer.accelerator warp": "accelerator",
    "--trainer.devices 0": "devices",
    "--trainer.precision 7": "precision",
    "--trainer.max_epochs ten": "trainer.max_epochs",
    "--seed_everything x": "seed_everything",
    "--config missing.yaml": "missing.yaml",
    "--config broken.yaml": "broken.yaml",
    "--config binary.yaml": "binary.yaml",
    "--config unknown.yaml": "did you mean model.width?",
    "--config list.yaml": "list.yaml",
}


@pytest.mark.parametrize("args", BAD_USAGE)
def test_bad_usage_is_one_line_and_2(args, own_folder, refused):
    Path("broken.yaml").write_text("model: {width: 3\n")
    Path("binary.yaml").write_bytes(bytes(range(256)))
    Path("unknown.yaml").write_text("model:\n  widht: 3\n")
    Path("list.yaml").write_text("- 1\n- 2\n")
    line = refused("fit", "--data.demo", "true", *args.split(), code=2)
    assert BAD_USAGE[args] in line
    assert not Path("lightning_logs").exists()


def bad_checkpoints(run):
    whole = (run / "checkpoints/best.ckpt").read_bytes()
    Path("cut.ckpt").write_bytes(whole[:1000])
    Path("empty.ckpt").write_bytes(b"")
    Path("text.ckpt").write_text("weights")
    torch.save({"fc.weight": torch.zeros(2)}, "other.ckpt")
    torch.save([1, 2], "list.ckpt")
    state = AllCNN(width=4).state_dict()
    del state["conv9.0.weight"]
    torch.save(state, "part.pt")


@pytest.mark.parametrize(
    "name",
    "cut.ckpt empty.ckpt text.ckpt other.ckpt list.ckpt part.pt gone.ckpt .".split(),
)
@pytest.mark.parametrize("command", ["test --ckpt_path", "fit --ckpt_path", "fit --init"])
def test_bad_checkpoints_are_one_line_and_1(command, name, run, refused):
    bad_checkpoints(run)
    before = sorted(Path("lightning_logs").rglob("*"))
    args = [*command.split(), name, "--data.demo", "true"]
    if command == "fit --init":
        args += ["--model.width", "4"]
    assert name in refused(*args, code=1)
    assert sorted(Path("lightning_logs").rglob("*")) == before


def test_contradicting_the_checkpoint_is_refused(run, refused):
    line = refused("test", "--model.width", "8", code=1)
    assert "model.width is 8" in line
    assert "made with 4" in line
    assert "model.lr is 0.5" in refused(*"fit --ckpt_path last --model.lr 0.5".split(), code=1)
    line = refused("fit", "--init", "last", "--model.width", "8", "--data.demo", "true", code=1)
    assert "made with model.width 4, but it is 8 here" in line


def test_resuming_on_another_split_is_refused(run, refused):
    line = refused(
        *"fit --ckpt_path last --data.split_seed 9 --trainer.max_epochs 5".split(),
        code=1,
    )
    assert "the checkpoint was trained with" in line


def test_a_finished_run_says_how_to_go_on(run, refused):
    assert "max_epochs" in refused(*"fit --ckpt_path last --trainer.max_epochs 2".split(), code=2)


def test_a_diverging_run_stops_with_its_step(own_folder, refused):
    line = refused(*TINY, *["--model.lr", "1e30", "--trainer.log_every_n_steps", "2"], code=1)
    assert "the training loss is" in line
    assert "at step" in line
    assert not Path("lightning_logs/version_0/checkpoints/best.ckpt").exists()
    assert Path("lightning_logs/version_0/checkpoints/last.ckpt").exists()
