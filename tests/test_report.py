"""`report`: what the page says, that it needs no other file, and what is refused."""

import json
import math
import re
import shutil
import subprocess
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from allconv.__main__ import main
from allconv.calibration import fit_temperature
from allconv.commands.report_statistics import loss_and_ece, mcnemar, wilson
from allconv.model import AllCNN

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The text of a page, its images, and every address in it."""

    def __init__(self, path):
        super().__init__()
        self.text, self.images, self.addresses = "", [], []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [
            attrs[key] for key in ("src", "href", "srcset", "action") if key in attrs
        ]
        self.images += [attrs] if tag == "img" else []

    def handle_data(self, data):
        self.text += data.replace("\xa0", " ") + " "  # between cells there is none


def check_self_contained(path):
    """Everything is in the file: images that can be read, each with a description."""
    page = Page(path)
    assert path.stat().st_size < 3e6
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script", path.read_text("utf-8"))
    for image in page.images:
        assert len(image["alt"]) > 10
        content = b64decode(image["src"].split(",", 1)[1])
        if image["src"].startswith("data:image/svg+xml;"):
            assert ElementTree.fromstring(content).tag.endswith("svg")
        else:
            assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return page


@pytest.fixture(scope="session")
def pages(finished_run, tmp_path_factory):
    """The page of a run and the one of two checkpoints, in a copy of the run's folder."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(finished_run, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["report"])
        main(["report", "lightning_logs/version_0", "last", "--split", "val"])
    run = folder / "lightning_logs/version_0"
    return run / "report.html", run / "report_against_version_0_last.html"


def test_the_page_of_a_run_agrees_with_test(pages):
    page = check_self_contained(pages[0])
    found = json.loads(pages[0].with_name("test.json").read_text())
    assert f"{100 * found['test/acc']:.2f} % accuracy" in page.text
    assert f"{100 * found['test/top5']:.2f} %" in page.text
    assert f"{found['test/loss']:.4f}" in page.text
    assert f"{round(1000 * found['test/acc'])} of 1,000 test images" in page.text
    assert "not CIFAR-100" in page.text.split("% accuracy")[0]
    for part in ("best.ckpt", "95 % interval", "superclass accuracy", "Confused pairs",
                 "confident mistakes", "temperature", "red disc"):  # fmt: skip
        assert part in page.text
    assert "<td>trainer.max_epochs</td><td>3</td>" in pages[0].read_text("utf-8")
    kinds = [image["src"].split(";")[0] for image in page.images]
    assert kinds.count("data:image/svg+xml") == 2  # curves, reliability
    maps = [image["alt"] for image in page.images if "evidence map of" in image["alt"]]
    assert len(maps) >= 2 * 12 + 10


def test_the_page_of_two_counts_every_image(pages):
    page = check_self_contained(pages[1])
    both, only_a, only_b, neither = map(
        int, re.search(r"A right\s+(\d+)\s+(\d+)\s+A wrong\s+(\d+)\s+(\d+)", page.text).groups()
    )
    assert both + only_a + only_b + neither == 800
    assert (
        f"accuracy of {(both + only_a) / 8:.2f} % and B of {(both + only_b) / 8:.2f} %" in page.text
    )
    assert f"p = {mcnemar(only_a, only_b):.2g}" in page.text
    assert "also the images reported here" in page.text


def browse(path, folder, width=390):
    """What a page does in headless Chromium.

    Returns:
        Messages on its console, its requests, and the tables wider than the window.
    """
    log, probe = folder / "net.json", folder / "probe.html"
    script = "Array.from(document.querySelectorAll('table'), t => t.getBoundingClientRect().right)"
    probe.write_text(
        f"{path.read_text('utf-8')}<script>document.body.dataset.wide = {script}"
        ".filter(right => right > innerWidth).length</script>",
        "utf-8",
    )
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --enable-logging=stderr "
        f"--log-net-log={log} --user-data-dir={folder}/profile --window-size={width},800 --dump-dom"
    ).split()
    # no name is looked up: Chromium asks for things of its own as well, whatever the page is
    flags.append("--host-resolver-rules=MAP * ~NOTFOUND")
    done = subprocess.run(
        [CHROMIUM, *flags, probe.as_uri()], capture_output=True, text=True, timeout=300
    )
    wide = re.search(r'data-wide="(\d+)"', done.stdout)
    # a file's origin is null; Chromium's own requests have none
    requests = log.read_text().count('"initiator":"null"')
    return done.stderr.count(":CONSOLE:"), requests, int(wide[1])


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here: the pages are not opened in a browser")
def test_a_browser_shows_them_whole_without_error_or_request(pages, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<script>console.error(1)</script><img src='http://example.invalid/x.png'>"
        "<body><table><tr><td><div style='width: 600px'>wide</div></table>"
    )
    errors, requests, wide = browse(bad, tmp_path)
    assert errors >= 1
    assert requests >= 1
    assert wide == 1
    for page in pages:
        assert browse(page, tmp_path) == (0, 0, 0)


def test_odd_names_and_few_images(run, capfd):
    """A folder name is not a formula, and a class may have no image."""
    shutil.copytree(run, "a$b_$c")
    data = Path("data/cifar-100-demo/test.bin")
    data.write_bytes(data.read_bytes()[: 13 * 3074])  # of the first two classes
    main(["report", "a$b_$c"])
    assert capfd.readouterr().out.startswith("a$b_$c/checkpoints/best.ckpt on ")
    assert "of 13 test images" in Page(Path("a$b_$c/report.html")).text
    main(["report", "a$b_$c", "best", "--out", "new/two.html"])
    assert "a$b_$c" in Page(Path("new/two.html")).text
    out, err = capfd.readouterr()
    assert out.startswith("A: a$b_$c/")
    assert err.count("A: 13 test images") == err.count("B: 800 val images") == 1


def test_statistics():
    assert mcnemar(0, 0) == mcnemar(7, 7) == 1
    assert mcnemar(5, 1) == mcnemar(1, 5) == 2 * (1 + 6) / 64
    assert 0 < mcnemar(4000, 3000) < 1e-30
    low, high = wilson(7019, 10_000)
    # the interval holds the proportions whose own standard error reaches the one that was found
    for share in (low, high):
        sigma = math.sqrt(share * (1 - share) / 10_000)
        assert math.isclose(abs(0.7019 - share), 1.959964 * sigma)
    assert wilson(0, 10)[0] == 0


def test_calibration():
    torch.manual_seed(0)
    logits = 2 * torch.randn(20_000, 10)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert loss_and_ece(logits, labels)[1] < 0.01
    loss, ece = loss_and_ece(3 * logits, labels)
    assert math.isclose(loss, torch.nn.functional.cross_entropy(3 * logits, labels), rel_tol=1e-5)
    confidence, predicted = (3 * logits).softmax(1).max(1)
    # the net is too sure in every bin, so the gaps add up to that of the means
    gap = confidence.mean() - (predicted == labels).float().mean()
    assert math.isclose(ece, gap, abs_tol=1e-3)
    temperature = fit_temperature(3 * logits, labels)
    assert math.isclose(temperature, 3, rel_tol=0.03)
    best = loss_and_ece(3 * logits / temperature, labels)[0]
    assert all(best < loss_and_ece(3 * logits / (temperature * x), labels)[0] for x in (0.99, 1.01))


BAD = {
    "gone.ckpt": "A is gone.ckpt: no such file",
    "best gone.ckpt": "B is gone.ckpt: no such file",
    "empty": "no such file",
    "text.ckpt": "text.ckpt: not a readable .ckpt or .safetensors",
    "best bare.pt": "A and B know different classes",
    "ten.pt": "ten.pt: has 10 classes, but CIFAR-100 has 100",
    "nan.pt": "conv1.0.bias",
    "broken": "config.yaml",
    "--out text.ckpt/page.html": "text.ckpt",
}


@pytest.mark.parametrize("args", BAD)
def test_bad_input_is_one_line_and_1(args, run, refused):
    Path("empty").mkdir()
    Path("text.ckpt").write_text("weights")
    state = AllCNN(width=4).state_dict()
    torch.save(state, "bare.pt")
    state["conv1.0.bias"][0] = math.nan
    torch.save(state, "nan.pt")
    torch.save(AllCNN(width=4, num_classes=10).state_dict(), "ten.pt")
    shutil.copytree(run, "broken")
    Path("broken/config.yaml").write_text("model: {width: 3\n")
    assert BAD[args] in refused("report", *args.split(), code=1)
    assert not (run / "report.html").exists()


USAGE = {
    "--split train": "split",
    "--data_dri x": "did you mean --data_dir?",
    "--out lightning_logs": "lightning_logs: its ending must be .html",
    "--out lightning_logs/version_0/checkpoints/best.ckpt": "best.ckpt: its ending must be .html",
    "--out y.txt": "--out is y.txt: its ending must be .html",
}


@pytest.mark.parametrize("args", USAGE)
def test_bad_usage_is_one_line_and_2(args, run, refused):
    """Before a net has run: nothing but the line is on the error stream."""
    assert USAGE[args] in refused("report", *args.split(), code=2)


def test_without_a_run_there_is_no_report(own_folder, refused):
    assert "no run with a best.ckpt" in refused("report", code=1)
