"""The command line: the fixed commands, layers of configuration, and bad input in one line."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import LAST, REPO, RUN, TINY

from allconv import checkpoints
from allconv.__main__ import COMMANDS, main
from allconv.data import CIFAR100
from allconv.model import AllCNN
from allconv.rundir import read_metrics, read_yaml
from allconv.training.settings import RECIPES


@pytest.mark.parametrize("args", [[], ["--help"], ["--version"], ["tset"], ["help"]])
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


def test_a_mistyped_command_is_shown_escaped(refused):
    assert r"no command te\x1b[31mst" in refused("te\x1b[31mst", code=2)


MEANT = {
    "train": "did you mean fit?",
    "evaluate": "did you mean test or validate?",
    "finetune": "did you mean fit --config finetune?",
    "resume": "did you mean fit --ckpt_path last?",
    "-V": "did you mean --version?",
    "--verson": "did you mean --version?",
    "--config demo fit": "the command comes first: allconv fit --config ...",
    "help fti": "did you mean fit?",
    "report a b c": "names: at most 2",
    "reproduce a b": "names: at most 1",
    "report --ckpt_path best": "--ckpt_path; name the checkpoint without a flag",
    "runs extra": "extra needs a flag in front of it",
    "export net.onnx": "did you mean --out net.onnx?",
    "export --out net.onnx last": "did you mean --ckpt_path last?",
    "predict a.png --top 1 b.png": "name all files together, before or after the flags",
    "predict -dash.png": "did you mean ./-dash.png?",
    "predict -x": "-x; see --help",
    "predict a.png --top x": "top is x: it must be a whole number",
    "report --split x": "split is x: it must be test or val",
}


@pytest.mark.parametrize("args", MEANT)
def test_what_was_meant_is_said(args, own_folder, refused):
    Path("-dash.png").touch()
    assert MEANT[args] in refused(*args.split(), code=2)


@pytest.mark.parametrize("args", ["help predict", "--help predict"])
def test_help_of_a_command(args, capsys):
    with pytest.raises(SystemExit) as end:
        main(args.split())
    assert end.value.code == 0
    assert "usage: allconv predict" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "test"])
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
    assert '"hpc"' not in text  # what Lightning's --ckpt_path takes, and ours does not


def printed_config(capsys, *args):
    """The configuration that a command would use."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*args, "--print_config"])
    found = capsys.readouterr()
    assert end.value.code == 0, found.err
    return yaml.safe_load(found.out)


def test_defaults_are_the_notebooks(capsys):
    config = printed_config(capsys, "fit")
    assert config["seed_everything"] == 43
    assert config["trainer"]["max_epochs"] == 100
    expected = yaml.safe_load((REPO / "configs/notebook.yaml").read_text())
    for group in ("model", "data"):
        for key, value in expected[group].items():
            assert config[group][key] == value


def test_later_layers_win(own_folder, capsys):
    Path("a.yaml").write_text("model: {width: 8, lr: 0.3}\ndata: {batch_size: 32}\n")
    Path("b.yaml").write_text("model: {width: 16}\n")
    args = "fit --config a.yaml --config=b.yaml --data.batch_size 10".split()
    config = printed_config(capsys, *args)
    assert (config["model"]["width"], config["model"]["lr"]) == (16, 0.3)
    assert config["data"]["batch_size"] == 10


def test_a_recipe_has_a_name(own_folder, capsys):
    config = printed_config(capsys, "fit", "--config", "demo")
    assert config["data"]["demo"] is True
    Path("demo").write_text("model: {width: 8}\n")  # a file goes before a recipe
    assert printed_config(capsys, "fit", "--config", "demo")["model"]["width"] == 8


def test_a_typo_in_a_recipe_names_it_or_all(refused):
    for args in (["--config", "dmeo"], ["--config=configs/dmeo.yaml"]):
        assert "did you mean demo?" in refused("fit", *args, code=2)
    line = refused("fit", "--config", "xyz", code=2)
    assert all(name in line for name in RECIPES)


def test_a_forgotten_config_is_named(own_folder, refused):
    for args in (["demo"], ["--model.width", "4", "dmeo"]):
        assert "did you mean --config demo?" in refused("fit", *args, code=2)


def test_flags_win_over_files_that_come_after_them(own_folder, capsys):
    Path("a.yaml").write_text("trainer: {default_root_dir: b}\n")
    args = "fit --trainer.default_root_dir=a --config a.yaml --config demo".split()
    assert printed_config(capsys, *args)["trainer"]["default_root_dir"] == "a"
    args = "fit --data.batch_size 7 --config a.yaml --config demo".split()
    assert printed_config(capsys, *args)["data"]["batch_size"] == 7


def test_the_settings_of_a_group_may_be_a_file(own_folder):
    Path("model.yaml").write_text("width: 2\n")
    Path("data.yaml").write_text("{demo: true, batch_size: 50}\n")
    limits = "--trainer.max_epochs 1 --trainer.limit_train_batches 2".split()
    main(["fit", "--model", "model.yaml", "--data", "data.yaml", *limits])
    config = read_yaml(RUN / "config.yaml")
    assert (config["model"]["width"], config["data"]["batch_size"]) == (2, 50)
    main(["fit", "--ckpt_path", "last", "--data", "data.yaml", "--trainer.max_epochs", "2"])
    assert len(read_metrics(RUN)) == 2


def test_a_run_is_found_through_a_configuration(run, capsys):
    """`ckpt_path` and `trainer.default_root_dir` in a file count as the flags do."""
    Path("last.yaml").write_text("ckpt_path: last\n")
    assert printed_config(capsys, "fit", "--config", "last.yaml")["model"]["width"] == 4
    Path("moved").mkdir()
    Path("lightning_logs").rename("moved/lightning_logs")
    Path("root.yaml").write_text("trainer: {default_root_dir: moved}\n")
    main(["test", "--config", "root.yaml"])
    assert "best.ckpt, epoch" in capsys.readouterr().out
    config = printed_config(capsys, *"fit --config root.yaml --ckpt_path last".split())
    assert config["model"]["width"] == 4


def test_print_config_shows_what_will_be_used(run, capsys):
    config = printed_config(capsys, "fit", "--ckpt_path", "last")
    assert config["model"]["width"] == 4
    assert config["data"]["demo"] is True
    assert config["trainer"]["max_epochs"] == 3


# what is switched off, whether there is a run directory, what is not printed, what is not left
OFF = {
    "fast_dev_run true": (False, "None", "data?*"),
    "barebones true": (False, "epoch", "data?*"),
    "enable_checkpointing false": (True, "--ckpt_path", "**/*.ckpt"),
    "enable_model_summary false": (True, "net.conv9", "none"),
    "logger false": (False, "None", "**/*.ckpt"),
}


def test_a_trial_of_a_run_that_is_resumed_is_refused(run, refused):
    line = refused("fit", "--ckpt_path", "last", "--trainer.fast_dev_run", "true", code=2)
    assert "leave --ckpt_path out" in line


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")  # barebones
@pytest.mark.parametrize("flag", OFF)
def test_what_is_switched_off_is_off(flag, own_folder, capfd, caplog):
    main([*TINY, "--trainer.max_epochs", "1", *f"--trainer.{flag}".split()])
    said = "".join(capfd.readouterr()) + caplog.text
    recorded, word, left = OFF[flag]
    assert Path("lightning_logs").exists() == recorded
    assert word not in said
    assert ("next: " in said) == recorded
    assert not list(Path().glob(left))
    assert ("net.conv9" in said) == (flag not in ("barebones true", "enable_model_summary false"))


def test_without_a_logger_checkpoints_are_lightnings(own_folder):
    main([*TINY, *"--trainer.logger false --trainer.enable_checkpointing true".split()])
    assert [path.suffix for path in Path("checkpoints").iterdir()] == [".ckpt"]
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        ("--trainer.limit_val_batches 1", "144 of 3,200 training and 500 of 800 validation"),
        ("--trainer.fast_dev_run 1", "16 of 3,200 training and 500 of 800 validation"),
        ("--trainer.limit_val_batches 0", "144 of 3,200 training and 0 of 800 validation"),
        (
            "--trainer.limit_val_batches 1 --trainer.check_val_every_n_epoch 2",
            "144 of 3,200 training and 500 of 800 validation",
        ),
        ("--trainer.check_val_every_n_epoch 2", "144 of 3,200 training and 800 validation"),
    ],
)
def test_the_head_counts_what_is_used(flags, counts, own_folder, capfd):
    main([*TINY, "--trainer.max_epochs", "2", *flags.split()])
    assert f": {counts} images" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flags", "end", "left"),
    [
        ("--trainer.max_epochs -1 --trainer.max_steps 11", "?", "0:00"),
        ("--trainer.max_epochs 999999 --trainer.max_time 00:00:00:01", "999999", "0:00:0"),
    ],
)
def test_the_estimate_ends_with_the_run(flags, end, left, own_folder, capfd):
    main([*TINY, *flags.split()])
    said = capfd.readouterr().out
    assert f"epochs 1 to {end}, " in said
    assert f"\nabout {left}" in said


def test_evaluation_takes_the_runs_configuration(own_folder, capfd):
    """And bare commands find the newest run, and say what to type next."""
    args = "--trainer.max_epochs 1 --data.split_seed 5 --data.val_size 300".split()
    main(["fit", "--config", "demo", *TINY[1:], *args])
    assert yaml.safe_load((RUN / "config.yaml").read_text())["recipe"] == "demo"
    said = capfd.readouterr().out
    for words in ("best epoch 1 of 1", str(RUN), "python -m allconv test",
                  "tensorboard --logdir lightning_logs"):  # fmt: skip
        assert words in said
    main(["validate"])
    found = json.loads((RUN / "validate.json").read_text())
    assert found["val/n"] == 300
    assert found["split_seed"] == 5
    assert found["remark"] is None
    assert "demo" in found["data"]
    main(["validate", "--data.split_seed", "6"])
    found = json.loads((RUN / "validate.json").read_text())
    assert "another split" in found["remark"]
    assert [path.name for path in Path("lightning_logs").iterdir()] == ["version_0"]


def test_evaluation_writes_beside_the_run(run):
    found = json.loads((run / "test.json").read_text())
    assert found["test/n"] == 1000
    assert found["checkpoint"] == "lightning_logs/version_0/checkpoints/best.ckpt"
    for name in ("test.png", "test_confusion.png", "curves.png"):
        assert (run / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    main(["test", "--ckpt_path", str(LAST), "--trainer.precision", "bf16-mixed"])
    last = json.loads((run / "test_last.json").read_text())
    assert (last["epoch"], last["precision"]) == (3, "bf16-mixed")
    assert found["precision"] == "32-true"
    assert json.loads((run / "test.json").read_text()) == found
    assert (run / "test_last_confusion.png").is_file()
    assert len(list(Path("lightning_logs").iterdir())) == 1


def test_without_a_run_nothing_is_evaluated(own_folder, refused):
    for command in ("test", "validate"):
        assert "no run with a best.ckpt" in refused(command, code=1)
    assert "no run with a last.ckpt" in refused("fit", "--ckpt_path", "last", code=1)


def test_a_part_of_the_evaluation_images_has_all_classes(own_folder):
    """The files are read in label order."""
    data = CIFAR100(demo=True)
    data.prepare_data()
    for loader in (data.val_dataloader(), data.test_dataloader()):
        _, labels = next(iter(loader))
        assert len(labels) < len(loader.dataset)
        assert len(labels.unique()) == len(data.dataset.classes)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")  # barebones
def test_an_evaluation_of_nothing_is_refused(run, refused, capfd):
    before = (run / "test.json").read_text()
    line = refused("test", "--trainer.limit_test_batches", "0", code=1)
    assert "nothing was measured: trainer.limit_test_batches is 0" in line
    with pytest.raises(SystemExit):
        main(["test", "--trainer.barebones", "true"])
    assert "trainer.barebones" in capfd.readouterr().err.splitlines()[-1]
    assert (run / "test.json").read_text() == before


def test_an_empty_name_is_no_checkpoint(run, refused):
    """A script's variable that was never set must not start another run."""
    for command in ("fit", "test"):
        assert "ckpt_path is empty" in refused(command, "--ckpt_path", "", code=1)
    assert "ckpt_path is empty" in refused("export", "--out", "a.onnx", "--ckpt_path", "", code=1)
    assert "A is empty" in refused("report", "", code=1)
    assert "init is empty" in refused("fit", "--init", "", "--data.demo", "true", code=1)
    assert "init is empty" in refused("fit", "--init=", "--data.demo", "true", code=1)
    assert len(list(Path("lightning_logs").iterdir())) == 1


# what is not refused ends soon
SHORT = "fit --data.demo true --trainer.max_epochs 1 --trainer.limit_train_batches 1".split()
BAD_USAGE = {
    "--model.widht 3": "did you mean --model.width?",
    "--modle.width 3": "did you mean --model.width?",
    "--model.with=3": "did you mean --model.width?",
    "--trainer.max_epoch 3": "did you mean --trainer.max_epochs?",
    "--trainer.gpus 1": "did you mean --trainer.devices?",  # of Lightning 1
    "--resume last": "did you mean --ckpt_path?",
    "--data.num_workers 2": "none are needed",
    "--batch_size 3": "did you mean --data.batch_size?",
    "--lr 1": "did you mean --model.lr?",
    "--epochs 3": "did you mean --trainer.max_epochs?",
    "--seed 3": "did you mean --seed_everything?",
    "--optimizer Adam": "settings of the model here: --model.lr",
    "--model.learning_rate 1": "settings of the model here: --model.lr",
    "--trainer.lr 1": "did you mean --model.lr?",
    "--trainer.seed 1": "did you mean --seed_everything?",
    "--trainer.logger csv": "did you mean CSVLogger?",
    "--config dmeo.yaml": "dmeo.yaml: no such file; did you mean demo?",
    "model.ckpt": "did you mean --ckpt_path model.ckpt?",
    "last": "did you mean --ckpt_path last?",
    "3": "did you mean --ckpt_path 3?",
    "foo": "foo needs a flag in front of it",
    "--model.batch_size 1": "did you mean --data.batch_size?",
    "--model.label-smoothing 1": "did you mean --model.label_smoothing?",
    "--no-model.residuals": "did you mean --model.residuals?",
    "--trainer.max_epochs 0": "max_epochs is 0: it must be above 0",
    "--trainer.max_steps 0": "max_steps is 0: it must be above 0",
    "--trainer.max_epochs abc": "max_epochs is abc: it must be a whole number or null",
    "--trainer.callbacks+=EarlyStopping": "(after the class: --trainer.callbacks.monitor=",
    "--model.width abc": "model.width is abc: it must be a whole number",
    "--model.width 1.5": "model.width",
    "--model.width 0": "width is 0: it must be",
    "--model.width -4": "width is -4",
    "--model.num_classes 1": "num_classes is 1",
    "--model.num_classes 99": "num_classes is 99, but the demo set",
    "--model.width 1000000000": "width is 1000000000",
    "--model.dropout 1": "dropout is 1.0",
    "--model.residuals maybe": "model.residuals",
    "--model.lr 0": "model.lr is 0.0: it must be above 0",
    "--model.momentum 1": "model.momentum is 1.0",
    "--model.weight_decay -1": "model.weight_decay is -1.0",
    "--model.gamma 0": "model.gamma is 0.0",
    "--model.warmup 1.5": "model.warmup is 1.5",
    "--model.muon_lr -1": "model.muon_lr is -1.0",
    "--model.label_smoothing 1": "model.label_smoothing is 1.0",
    "--model.milestones twenty": "model.milestones",
    "--model.milestones [-3]": "model.milestones",
    "--data.batch_size 0": "data.batch_size is 0",
    "--data.val_size 5001": "data.val_size is 5001: it must be from 0 to 49900 in steps of 100",
    "--data.val_size 50000": "data.val_size is 50000",
    "--data.split_seed -1": "data.split_seed is -1",
    "--data.crop 32": "data.crop is 32",
    "--data.sizes [[2,20]]": "data.sizes",
    "--data.cutmix 1.5": "data.cutmix is 1.5: it must be from 0 to 1",
    "--trainer.accelerator warp": "accelerator",
    "--trainer.accelerator tpu": "torch_xla",
    "--trainer.devices 0": "devices",
    "--trainer.strategy ddp_notebook": "trainer.strategy is ddp_notebook: use ddp",
    "--trainer.devices 1000": "trainer.devices is 1000",
    "--trainer.accumulate_grad_batches 0": "accumulate_grad_batches is 0: it must be above 0",
    "--trainer.accumulate_grad_batches -1": "accumulate_grad_batches is -1",
    "--trainer.check_val_every_n_epoch 0": "check_val_every_n_epoch is 0",
    "--trainer.limit_train_batches 0": "limit_train_batches is 0",
    "--trainer.limit_train_batches -1": "limit_train_batches is -1",
    "--trainer.limit_val_batches -1": "limit_val_batches",
    "--trainer.val_check_interval 0": "val_check_interval is 0",
    "--trainer.limit_val_batches x": "it must be a number or null",
    "--trainer.precision 7": "or transformer-engine-float16 or",
    "--trainer.max_epochs -1 --model.warmup 0.2": "trainer.max_epochs",
    "--seed_everything x": "seed_everything",
    "--seed_everything -1": "seed_everything",
    "--seed_everything 99999999999": "seed_everything",
    "--config": "--config",
}


@pytest.mark.parametrize("args", BAD_USAGE)
def test_bad_usage_is_one_line_and_2(args, own_folder, refused):
    line = refused(*SHORT, *args.split(), code=2)
    assert BAD_USAGE[args] in line
    assert "did you mean" in BAD_USAGE[args] or "did you mean" not in line
    assert "object at 0x" not in line  # our insides
    assert not RUN.exists()


BAD_CONFIGS = {
    "broken": b"model: {width: 3\n",
    "binary": bytes(range(256)),
    "list": b"- 1\n- 2\n",
    "unknown": b"model:\n  widht: 3\n",
    "aliases": b"a: &a [1, 1]\nb: &b [*a, *a]\nmodel: {milestones: [*b, *b]}\n",
    "deep": b"model: " + 5000 * b"[" + 5000 * b"]",
    "twice": b"model: {width: 2}\nmodel: {lr: 0.1}\n",
    "no_trainer": b"trainer: null\n",
    "number": b"model: 3\n",
    "empty": b"",
    "date": b"model: {width: 2026-02-30}\n",
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_configuration_is_named_in_one_line(name, own_folder, refused):
    Path(f"{name}.yaml").write_bytes(BAD_CONFIGS[name])
    line = refused(*SHORT, "--config", f"{name}.yaml", code=2)
    words = {"unknown": "did you mean model.width?", "no_trainer": "trainer", "number": "model"}
    assert words.get(name, f"{name}.yaml") in line
    assert len(line) < 400
    assert not Path("lightning_logs").exists()


def test_a_configuration_that_is_no_file_is_named_in_one_line(own_folder, refused):
    os.mkfifo("pipe.yaml")
    for name in ("pipe.yaml", "missing.yaml", "."):
        assert name in refused(*SHORT, "--config", name, code=2)


def bad_checkpoints(run):
    """What may lie where a checkpoint is looked for."""
    whole = (run / "checkpoints/best.ckpt").read_bytes()
    Path("cut.ckpt").write_bytes(whole[:1000])
    Path("empty.ckpt").write_bytes(b"")
    torch.save({"fc.weight": torch.zeros(2)}, "other.ckpt")
    torch.save([1, 2], "list.ckpt")
    torch.save({"conv1.0.weight": 3}, "number.ckpt")
    torch.save({"state_dict": None}, "none.ckpt")
    state = AllCNN(width=4).state_dict()
    torch.save({**state, "conv5.0.weight": torch.full((8, 8, 3, 3), torch.nan)}, "nan.pt")
    del state["conv9.0.bias"]
    torch.save(state, "part.pt")
    return sorted(path for path in Path().iterdir() if path.suffix in (".ckpt", ".pt"))


def test_bad_checkpoints_are_named(run):
    found = bad_checkpoints(run)
    assert len(found) == 8
    for path in found:
        with pytest.raises(checkpoints.CheckpointError, match=path.name):
            checkpoints.load(path)


def hostile(content, name):
    """Change a checkpoint that was read."""
    state, weight = content["state_dict"], "net.conv5.0.weight"
    if name == "expanded":  # 1 number that stands for 8.5 GB, as a shape and no values
        state["net.conv1.0.weight"] = torch.zeros(1).expand(6000, 3, 3, 3)
        state["net.conv9.0.weight"] = torch.zeros(1).expand(100, 2**21, 1, 1)
    elif name == "sparse":
        state[weight] = state[weight].to_sparse()
    elif name == "complex":
        state[weight] = state[weight].to(torch.complex64)
    elif name == "no epoch":
        content["loops"] = {"fit_loop": 3}
    elif name == "other types":
        content["hyper_parameters"] |= {"residuals": [1]}
    elif name == "no optimizer":
        content["optimizer_states"] = []
    elif "schedule" in name:
        states = {"no schedule": [], "empty schedule": [{}], "a schedule": [3]}
        content["lr_schedulers"] = states[name]


NAMES = ["expanded", "sparse", "complex", "no epoch", "other types", "no optimizer", "bomb"]
NAMES += ["no schedule", "empty schedule", "a schedule"]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_checkpoints_are_refused(name, run):
    content = torch.load(LAST, weights_only=True)
    hostile(content, name)
    torch.save(content, "hostile.ckpt")
    if name == "bomb":
        with zipfile.ZipFile("hostile.ckpt", "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("hostile/bomb", bytes(10**7))
    with pytest.raises(checkpoints.CheckpointError, match=r"hostile\.ckpt"):
        checkpoints.load(Path("hostile.ckpt"), resume=True)


@pytest.mark.parametrize("wrong", [{"lr": "fast"}, {"lr": -1.0}, {"warmup": "x"}, {"color": 3}])
@pytest.mark.parametrize("command", ["test", "fit"])
def test_wrong_hyperparameters_are_the_checkpoints(command, wrong, run, refused):
    """And no fault of the flags."""
    content = torch.load(LAST, weights_only=True)
    content["hyper_parameters"] |= wrong
    torch.save(content, "wrong.ckpt")
    line = refused(command, "--ckpt_path", "wrong.ckpt", "--data.demo", "true", code=1)
    assert line.startswith("allconv: wrong.ckpt: ")
    assert next(iter(wrong)) in line


def test_sizes_are_those_of_the_weights_and_not_what_a_checkpoint_claims(run):
    content = torch.load(LAST, weights_only=True)
    content["hyper_parameters"] |= {"width": 2**20, "num_classes": 10**9}
    torch.save(content, "claims.ckpt")
    assert checkpoints.load(Path("claims.ckpt")).net().width == 4


@pytest.mark.parametrize("command", ["test --ckpt_path", "fit --ckpt_path", "fit --init"])
def test_bad_checkpoints_are_one_line_and_1(command, run, refused):
    bad_checkpoints(run)
    before = sorted(Path("lightning_logs").rglob("*"))
    for name in ("cut.ckpt", "other.ckpt", "gone.ckpt"):
        args = [*command.split(), name, "--data.demo", "true"]
        if command == "fit --init":
            args += ["--model.width", "4"]
        assert name in refused(*args, code=1)
    assert sorted(Path("lightning_logs").rglob("*")) == before


def test_weights_of_a_checkpoint_without_its_state_cannot_be_resumed(run, refused):
    content = torch.load(LAST, weights_only=True)
    kept = ("state_dict", "hyper_parameters", "epoch", "global_step")
    torch.save({key: content[key] for key in kept}, LAST)
    args = ["fit", "--ckpt_path", "last", "--trainer.max_epochs", "4"]
    assert "last.ckpt" in refused(*args, code=1)


def test_contradicting_the_checkpoint_is_refused(run, refused):
    line = refused("test", "--model.width", "8", code=1)
    assert "model.width is 8" in line
    assert line.strip().endswith("made with 4: leave it out")
    line = refused("fit", "--ckpt_path", "last", "--model.width", "8", code=1)
    assert line.strip().endswith("made with 4: leave it out, or start a new run")
    assert "model.lr is 0.5" in refused(*"fit --ckpt_path last --model.lr 0.5".split(), code=1)
    line = refused("fit", "--init", "last", "--model.width", "8", "--data.demo", "true", code=1)
    assert "last.ckpt" in line


def test_what_a_run_cannot_go_on_with_is_refused(run, refused):
    go_on = ["fit", "--ckpt_path", "last"]
    line = refused(*go_on, *"--data.split_seed 9 --trainer.max_epochs 5".split(), code=1)
    assert "data.split_seed is 9, but the run was trained with 43" in line
    assert "max_epochs" in refused(*go_on, "--trainer.max_epochs", "2", code=2)
    assert "--init" in refused(*go_on, "--init", "best", code=2)


def test_code_that_a_runs_configuration_names_is_not_run(run, capfd, refused):
    """config.yaml comes with a run folder of someone else's, and so may a module beside it."""
    Path("harmless.py").write_text("open('was_run', 'w')\nclass Callback: pass\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    for place in ("callbacks", "logger", "plugins"):
        config["trainer"][place] = [{"class_path": f"harmless.{place}"}]
    lambdas = {"class_path": "lightning.pytorch.callbacks.LambdaCallback"}
    lambdas["init_args"] = {"on_test_start": "harmless.function"}
    config["trainer"]["callbacks"] += ["harmless.text", lambdas]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    main(["test"])
    said = capfd.readouterr().err
    for name in ("callbacks", "plugins", "text", "function"):
        assert f"left out: harmless.{name}" in said
    before = (run / "config.yaml").read_bytes()
    said = refused("fit", "--ckpt_path", "last", "--trainer.max_epochs", "4", code=1)
    assert "harmless." in said
    assert ", code that only config.yaml names: repeat the flag" in said
    assert (run / "config.yaml").read_bytes() == before
    assert not Path("was_run").exists()


def test_an_edited_configuration_of_a_run_is_not_passed_over(run, refused):
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("\n  lr: 0.1\n", "\n  lr: 0.2\n"))
    line = refused("fit", "--ckpt_path", "last", "--trainer.max_epochs", "4", code=1)
    assert "model.lr is 0.2, but" in line


@pytest.mark.parametrize("content", [bytes(range(256)), b"model: {"], ids=["binary", "broken"])
def test_a_damaged_configuration_of_a_run_is_named_in_one_line(content, run, refused):
    (run / "config.yaml").write_bytes(content)
    for args in (["test"], ["fit", "--ckpt_path", "last", "--trainer.max_epochs", "4"]):
        assert "version_0/config.yaml" in refused(*args, code=1)


def test_a_diverging_run_stops_with_its_step(own_folder, refused, capfd):
    # no words of layers, so that the error is the one line
    args = [*TINY, "--model.lr", "1e30", "--trainer.log_every_n_steps", "2"]
    line = refused(*args, "--trainer.enable_model_summary", "false", code=1)
    assert "the training loss is" in line
    assert "at step" in line
    assert not LAST.with_name("best.ckpt").exists()
    assert f"name {LAST}" in refused("test", "--ckpt_path", "version_0", code=1)
