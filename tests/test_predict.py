"""`predict` and `allconv.load`: every kind of picture file, and every kind of file that is none."""

import csv
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

import allconv
from allconv import data, demo, pictures, runs
from allconv.__main__ import main
from allconv.predict import LOW, SHEET


@pytest.fixture
def photo():
    """A picture without symmetry, 60 x 40."""
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 60, 3)).astype(np.uint8))


def predict(capsys, *args):
    """The rows of the command's csv, in the folder of a tiny run on the demo set."""
    capsys.readouterr()
    main(["predict", *map(str, args), "--ckpt_path", "best", "--format", "csv"])
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_formats_modes_and_sizes(run, photo, capsys):
    folder = Path("pics")
    (folder / "under").mkdir(parents=True)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        photo.convert(mode).save(folder / f"{mode}.png")
    for mode in ("L", "RGB", "CMYK"):
        photo.convert(mode).save(folder / "under" / f"{mode}.JPG", "JPEG")
    photo.convert("RGBA").save(folder / "under/alpha.webp")
    photo.save(folder / "a phone's.jpeg", "MPO", save_all=True, append_images=[photo])
    for size in ((1, 1), (900, 7), (7, 900)):
        photo.resize(size).save(folder / f"{size[0]} x {size[1]}.png")
    (folder / "notes.txt").write_text("not one of them")
    rows = predict(capsys, folder, "pics/L.png", "--top", "2")
    expected = [*sorted(p for p in folder.rglob("*.*") if p.suffix != ".txt"), folder / "L.png"]
    assert [row["picture"] for row in rows] == [str(p) for p in expected for _ in range(2)]
    assert [row["rank"] for row in rows] == ["1", "2"] * 15


def test_a_cifar_picture_goes_through_unchanged(own_folder):
    records = demo.pictures("test")[:20, 1:]
    for i, image in enumerate(data.Pictures(records).images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{i}.png")
        assert torch.equal(pictures.reduce(pictures.read(f"{i}.png")), image)


def test_a_real_cifar_picture_goes_through_unchanged(real_data, own_folder):
    for i, image in enumerate(data.Pictures(data.read(real_data, "test")).images[::500]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{i}.png")
        assert torch.equal(pictures.reduce(pictures.read(f"{i}.png")), image)
        given = data.normalize(image[None])[0]
        assert torch.equal(pictures.preprocess(f"{i}.png"), given)


def test_upright_by_exif(photo, own_folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    photo.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    photo.save("upright.png")
    turned, upright = (pictures.reduce(pictures.read(f"{n}.png")) for n in ("turned", "upright"))
    assert torch.equal(turned, upright)


def test_transparent_is_white_and_16_bits_are_not_cut_off(own_folder):
    Image.new("RGBA", (40, 40), (200, 0, 0, 0)).save("clear.webp", lossless=True)
    Image.new("RGB", (40, 40), (1, 2, 3)).save("clear.png", transparency=(1, 2, 3))
    for name in ("clear.webp", "clear.png"):
        assert (pictures.reduce(pictures.read(name)) == 255).all()
    Image.fromarray(np.full((40, 40), 25_700, np.uint16)).save("deep.png")
    assert (pictures.reduce(pictures.read("deep.png")) == 100).all()


def test_the_centre_is_used(own_folder):
    wide = Image.new("RGB", (96, 32))
    wide.paste((255, 255, 255), (32, 0, 64, 32))
    assert (pictures.reduce(wide) == 255).all()
    assert (pictures.reduce(wide.transpose(Image.Transpose.ROTATE_90)) == 255).all()


def bomb(side):
    """The head of a PNG file that claims to have side x side pixels."""
    head = b"IHDR" + struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    length, check = (struct.pack(">I", n) for n in (len(head) - 4, zlib.crc32(head)))
    return b"\x89PNG\r\n\x1a\n" + length + head + check + struct.pack(">I", 9) + b"IDAT"


def test_what_is_no_picture_is_named_and_the_rest_done(run, photo, capsys):
    folder = Path("pics")
    folder.mkdir()
    for i in range(70):  # more than a batch
        photo.save(folder / f"{i:02}.png")
    whole = (folder / "00.png").read_bytes()
    (folder / "10.png").write_bytes(b"")
    (folder / "20.jpg").write_text("a text")
    (folder / "30.png").write_bytes(whole[: len(whole) // 2])
    (folder / "40.png").write_bytes(bomb(10_000))
    (folder / "41.png").write_bytes(bomb(100_000))
    for name in ("50.webp", "51.png"):
        photo.save(folder / name, save_all=True, append_images=[photo.rotate(180)])
    photo.save("moving.gif", save_all=True, append_images=[photo.rotate(180)])
    os.mkfifo("pipe.png")
    Path("empty").mkdir()
    photo.save("line\nbreak.png")
    given = ["pics", "moving.gif", "pipe.png", "empty", "missing.png", "line\nbreak.png"]
    with pytest.raises(SystemExit) as end:
        main(["predict", *given, "--ckpt_path", "best", "--format", "json"])
    assert end.value.code == 1
    out, err = capsys.readouterr()
    # 00 to 69 without 10, 30, 40, 41 and 51; and the last one
    assert len(json.loads(out)) == 65 + 1
    lines = [line for line in err.splitlines() if "skipped" in line]
    for name, reason in (
        ("pics/10.png", "not a PNG"),
        ("pics/20.jpg", "not a PNG"),
        ("pics/30.png", "truncated"),
        ("pics/40.png", "too large"),
        ("pics/41.png", "too large"),
        ("pics/50.webp", "animated, 2 frames"),
        ("pics/51.png", "animated, 2 frames"),
        ("moving.gif", "not a PNG"),
        ("pipe.png", "no such file"),
        ("empty", "no picture"),
        ("missing.png", "no such file"),
    ):
        (line,) = [line for line in lines if f" {name}: " in line]
        assert reason in line
    assert len(lines) == 11
    assert r"line\nbreak.png" not in out.replace(r"line\nbreak.png", "", 1)


def test_json_csv_and_python_say_the_same(run, photo, capsys):
    photo.save("a.png")
    photo.rotate(90).save("b.jpg")
    rows = predict(capsys, "a.png", "b.jpg", "--top", "100")
    main("predict a.png b.jpg --ckpt_path best --format json --top 100".split())
    objects = json.loads(capsys.readouterr().out)
    net = allconv.load("best")
    assert not net.training
    assert net.classes == demo.CLASSES  # of the set that it was trained on
    for i, name in enumerate(("a.png", "b.jpg")):
        logits = net(net.preprocess(name)[None])
        shares = dict(zip(net.classes, logits.softmax(1)[0].tolist(), strict=True))
        found = {best["class"]: best["probability"] for best in objects[i]["top"]}
        assert found == pytest.approx(shares, abs=2e-6)
        mine = {row["class"]: float(row["probability"]) for row in rows if row["picture"] == name}
        assert mine == found
        assert objects[i]["confident"] is (max(shares.values()) >= LOW)
        with Image.open(name) as image:
            assert torch.equal(net.preprocess(image), net.preprocess(Path(name)))


def test_table_and_sheet(run, photo, capsys):
    Path("pics").mkdir()
    for i in range(SHEET + 1):
        photo.resize((600, 400)).save(f"pics/costs ${i}$ \u732b.jpg")
    main("predict pics --ckpt_path best --out sheet.PNG".split())
    out, err = capsys.readouterr()
    assert out.count("%") == 5 * (SHEET + 1)
    assert out.count("(uncertain)") == SHEET + 1  # three epochs of a tiny net
    assert f"with {SHEET} of {SHEET + 1} pictures" in err
    assert "100 classes of the drawn demo set" in err
    with Image.open("sheet.PNG") as sheet:
        assert sheet.width > 1000
        assert sheet.height > 1000


def test_refused(run, photo, refused, monkeypatch, tmp_path):
    photo.save("a.png")
    assert "one of the pictures" in refused("predict", "a.png", "--out", "./a.png", code=2)
    assert ".png" in refused("predict", "a.png", "--out", "sheet.jpg", code=2)
    assert "folder" in refused("predict", "a.png", "--out", "nowhere/sheet.png", code=2)
    assert "top is 101" in refused("predict", "a.png", "--top", "101", code=2)
    assert "--format" in refused("predict", "a.png", "--fromat", "csv", code=2)
    assert "names" in refused("predict", code=2)
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path / "none")
    assert "best.ckpt" in refused("predict", "../a.png", "--ckpt_path", "best", code=1)
    assert "no such file" in refused("predict", "../a.png", "--ckpt_path", "x.ckpt", code=1)


def test_packaged_weights_are_the_default(own_folder, photo, capsys):
    photo.save("a.png")
    main(["predict", "a.png"])
    assert str(runs.PRETRAINED) in capsys.readouterr().err
    assert allconv.load().classes == data.CLASSES


def test_importing_allconv_does_not_import_torch():
    code = "import allconv, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
