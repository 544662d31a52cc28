"""`report`: what the page says, that it needs nothing else, and what is refused."""

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
from allconv.model import AllCNN
from allconv.report import fit_temperature, mcnemar, paired_interval, wilson

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
    """Everything is in the file: pictures that can be read, each with words for it."""
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


def test_the_page_of_a_run_says_what_test_says(pages):
    page = check_self_contained(pages[0])
    found = json.loads(pages[0].with_name("test.json").read_text())
    assert f"{100 * found['test/acc']:.2f} % accuracy" in page.text
    assert f"{100 * found['test/top5']:.2f} %" in page.text
    assert f"{found['test/loss']:.4f}" in page.text
    assert f"{round(1000 * found['test/acc'])} of 1,000 test pictures" in page.text
    assert "not CIFAR-100" in page.text.split("% accuracy")[0]
    for part in ("best.ckpt", "highest validation accuracy", "95 % interval", "errors stay inside",
                 "Confused pairs", "most confident mistakes", "temperature", "max_epochs: 3",
                 "red disc"):  # fmt: skip
        assert part in page.text
    kinds = [image["src"].split(";")[0] for image in page.images]
    assert kinds.count("data:image/svg+xml") == 4  # curves, classes, confusion, reliability
    maps = [image["alt"] for image in page.images if "under the map of" in image["alt"]]
    assert len(maps) >= 2 * 12 + 10


def test_the_page_of_two_counts_every_picture(pages):
    page = check_self_contained(pages[1])
    both, only_a, only_b, neither = map(
        int, re.search(r"A right\s+(\d+)\s+(\d+)\s+A wrong\s+(\d+)\s+(\d+)", page.text).groups()
    )
    assert both + only_a + only_b + neither == 800
    assert f"accuracy of {(both + only_a) / 8:.2f} %, B of {(both + only_b) / 8:.2f} %" in page.text
    assert f"p = {mcnemar(only_a, only_b):.2g}" in page.text
    assert "which here are the pictures reported as well" in page.text


def browse(path, folder, width=360):
    """Open a page in headless Chromium: what it says on its console, and how often it asks out."""
    log, profile = folder / "net.json", folder / "profile"
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --enable-logging=stderr "
        f"--log-net-log={log} --user-data-dir={profile} --window-size={width},800 "
        f"--screenshot={folder}/page.png"
    ).split()
    # no name is looked up: Chromium asks for things of its own as well, whatever the page is
    flags.append("--host-resolver-rules=MAP * ~NOTFOUND")
    done = subprocess.run(
        [CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert (folder / "page.png").stat().st_size > 1000
    # a file's origin is null; Chromium's own requests have none
    return done.stderr.count(":CONSOLE:"), log.read_text().count('"initiator":"null"')


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here: the pages are not opened in a browser")
def test_a_browser_opens_them_without_error_or_request(pages, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error(1)</script><img src='http://example.invalid/x.png'>")
    errors, requests = browse(bad, tmp_path)
    assert errors >= 1
    assert requests >= 1
    assert browse(pages[0], tmp_path) == (0, 0)
    assert browse(pages[1], tmp_path, 1200) == (0, 0)


def test_statistics():
    assert mcnemar(0, 0) == mcnemar(7, 7) == 1
    assert mcnemar(5, 1) == mcnemar(1, 5) == 2 * (1 + 6) / 64
    assert 0 < mcnemar(4000, 3000) < 1e-30
    low, high = wilson(7019, 10_000)
    # the interval holds the shares whose own standard error reaches the one that was found
    for share in (low, high):
        sigma = math.sqrt(share * (1 - share) / 10_000)
        assert math.isclose(abs(0.7019 - share), 1.959964 * sigma)
    assert wilson(0, 10)[0] == 0
    low, high = paired_interval(60, 40, 1000)
    assert 0 < low + 0.0002 < 0.02 < high < 0.04
    assert paired_interval(40, 60, 1000) == (-high, -low)


def test_the_temperature_is_found():
    torch.manual_seed(0)
    logits = 2 * torch.randn(20_000, 10)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert math.isclose(fit_temperature(3 * logits, labels), 3, rel_tol=0.03)


BAD = {
    "gone.ckpt": "A is gone.ckpt: no such file",
    "best gone.ckpt": "B is gone.ckpt: no such file",
    "empty": "empty/checkpoints/best.ckpt: no such file",
    "text.ckpt": "text.ckpt: not a checkpoint that can be read",
    "best bare.pt": "A has other pictures than B",
    "ten.pt": "size mismatch for conv9.0.weight",
    "--out lightning_logs": "lightning_logs",
    "broken": "config.yaml",
}


@pytest.mark.parametrize("args", BAD)
def test_bad_input_is_one_line_and_1(args, run, refused):
    Path("empty").mkdir()
    Path("text.ckpt").write_text("weights")
    torch.save(AllCNN(width=4).state_dict(), "bare.pt")
    torch.save(AllCNN(width=4, num_classes=10).state_dict(), "ten.pt")
    shutil.copytree(run, "broken")
    Path("broken/config.yaml").write_text("model: {width: 3\n")
    assert BAD[args] in refused("report", *args.split(), code=1)
    assert not (run / "report.html").exists()


def test_bad_usage_is_one_line_and_2(run, refused):
    assert "split" in refused(*"report --split train".split(), code=2)
    assert "did you mean --data_dir?" in refused(*"report --data_dri x".split(), code=2)


def test_without_a_run_there_is_no_report(own_folder, refused):
    assert "no run with a best.ckpt" in refused("report", code=1)
