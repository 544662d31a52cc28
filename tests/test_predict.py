"""`predict`, `images` and `allconv.load`: every kind of image file, and every kind that is none."""

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
from allconv import checkpoints
from allconv.__main__ import main
from allconv.augment import normalize
from allconv.commands.predict import LOW, SHEET
from allconv.datasets import cifar100, demo, images


@pytest.fixture
def photo():
    """An image without symmetry, 60 x 40."""
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
        photo.convert(mode).save(folder / "under" / f"{mode}.tif")
    for suffix in ("webp", "gif", "bmp", "ppm", "pgm", "avif"):
        photo.save(folder / f"x.{suffix}")
    photo.save(folder / "a phone's.jpeg", "MPO", save_all=True, append_images=[photo])
    for size in ((1, 1), (900, 7), (7, 900)):
        photo.resize(size).save(folder / f"{size[0]} x {size[1]}.png")
    expected = sorted(path for path in folder.rglob("*.*"))
    (folder / "notes.txt").write_text("not one of them")
    photo.save(folder / ".hidden.png")
    (folder / ".cache").mkdir()
    photo.save(folder / ".cache" / "x.png")
    rows = predict(capsys, folder, "pics/L.png", "--top", "2")
    expected.append(folder / "L.png")
    assert [row["image"] for row in rows] == [str(p) for p in expected for _ in range(2)]
    assert [row["rank"] for row in rows] == ["1", "2"] * len(expected)
    main(["predict", "pics", "--ckpt_path", "best"])
    assert "pics: 3 other or hidden files ignored .txt\n" in capsys.readouterr().err


def test_a_cifar_image_goes_through_unchanged(own_folder):
    demo.Demo(Path("data")).prepare()
    given = demo.Demo(Path("data")).load("test")["test"].images
    for i, image in enumerate(given[:20]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{i}.png")
        assert torch.equal(images.reduce(images.read(f"{i}.png")), image)


def test_a_real_cifar_image_goes_through_unchanged(real_data, own_folder):
    for image in cifar100.Official(real_data).load("test")["test"].images[::500]:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save("a.png")
        given = normalize(image[None], cifar100.MEAN, cifar100.STD)[0]
        assert torch.equal(images.preprocess("a.png"), given)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "avif"])
def test_upright_by_exif(suffix, photo, own_folder):
    smooth = photo.resize((6, 4)).resize((60, 40))  # so that compression changes little
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    smooth.transpose(Image.Transpose.ROTATE_90).save(f"turned.{suffix}", exif=exif)
    turned = images.read(f"turned.{suffix}")
    assert turned.size == smooth.size
    assert (images.reduce(turned).float() - images.reduce(smooth).float()).abs().mean() < 8


def test_transparent_is_white_and_16_bits_are_not_cut_off(own_folder):
    Image.new("RGBA", (40, 40), (200, 0, 0, 0)).save("clear.webp", lossless=True)
    Image.new("RGB", (40, 40), (1, 2, 3)).save("clear.png", transparency=(1, 2, 3))
    Image.new("P", (40, 40), 5).save("clear.gif", transparency=5)
    for name in ("clear.webp", "clear.png", "clear.gif"):
        assert (images.reduce(images.read(name)) == 255).all()
    for name in ("deep.png", "deep.tif", "deep.pgm"):
        Image.fromarray(np.full((40, 40), 25_700, np.uint16)).save(name)
        assert (images.reduce(images.read(name)) == 100).all()


def test_the_centre_is_used():
    wide = Image.new("RGB", (96, 32))
    wide.paste((255, 255, 255), (32, 0, 64, 32))
    assert (images.reduce(wide) == 255).all()
    assert (images.reduce(wide.transpose(Image.Transpose.ROTATE_90)) == 255).all()


def test_preprocess_takes_files_images_arrays_and_tensors(photo, own_folder):
    photo.save("a.png")
    expected = images.preprocess(photo)
    assert expected.shape == (3, 32, 32)
    array = np.array(photo)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for given in ("a.png", Path("a.png"), io.BytesIO(Path("a.png").read_bytes()), array, tensor):
        assert torch.equal(images.preprocess(given), expected)
    grey = images.preprocess(photo.convert("L"))
    for given in (np.array(photo.convert("L")), torch.from_numpy(np.array(photo.convert("L")))):
        assert torch.equal(images.preprocess(given), grey)
    for wrong, said in (
        (tensor.float(), r"float32 \(3, 40, 60\): expected uint8 \(3, H, W\) or \(H, W\)"),
        (tensor.bfloat16(), "bfloat16"),
        (tensor[:2], r"uint8 \(2, 40, 60\)"),
        (array[..., :2], r"\(40, 60, 2\): expected uint8 \(H, W, 3\)"),
        (array[0, 0], r"\(3,\)"),
        (tensor[None], r"\(1, 3, 40, 60\)"),
        (array[:0], r"\(0, 60, 3\)"),
        ("missing.png", "no such file"),
        ("https://a.org/b.png", "no such file; download it first"),
        (5, "expected an image or its file, not int"),
        (None, "not NoneType"),
        (b"bytes", "not bytes"),
    ):
        with pytest.raises(images.ImageError, match=said):
            images.preprocess(wrong)


def bomb(side):
    """The head of a PNG file that claims to have side x side pixels."""
    head = b"IHDR" + struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    length, check = (struct.pack(">I", n) for n in (len(head) - 4, zlib.crc32(head)))
    return b"\x89PNG\r\n\x1a\n" + length + head + check + struct.pack(">I", 9) + b"IDAT"


def test_unreadable_files_are_listed_and_the_rest_done(run, photo, capsys):
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
    Image.fromarray(np.ones((40, 40), np.float32)).save(folder / "50.tif")
    os.mkfifo("pipe.png")
    Path("empty").mkdir()
    photo.save("line\nbreak\x1b[1m.png")
    given = ["pics", "pipe.png", "empty", "missing.png", "", "line\nbreak\x1b[1m.png"]
    with pytest.raises(SystemExit) as end:
        main(["predict", *given, "--ckpt_path", "best", "--format", "json"])
    assert end.value.code == 1
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert len(rows) == 66 + 1  # 00 to 69 without 10, 30, 40 and 41; and the last one
    assert rows[-1]["image"] == given[-1]
    skipped = [line for line in err.splitlines() if "skipped" in line]
    for name, reason in (
        ("pics/10.png", "not an image"),
        ("pics/20.jpg", "not an image"),
        ("pics/30.png", "truncated"),
        ("pics/40.png", "exceeds limit"),
        ("pics/41.png", "exceeds limit"),
        ("pics/50.tif", "floating-point"),
        ("pipe.png", "not a"),
        ("empty", "a folder without images"),
        ("missing.png", "no such file"),
        ("", "no such file"),
    ):
        (line,) = [line for line in skipped if f" {name}: " in line]
        assert reason in line
    assert len(skipped) == 10
    main(["predict", given[-1], "--ckpt_path", "best"])
    assert r"line\nbreak\x1b[1m.png" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff", "avif"])
def test_of_an_animation_the_first_frame_is_used(suffix, run, photo, capsys):
    photo.resize((32, 32)).save("still.png")
    first, second = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    first.save(f"moving.{suffix}", save_all=True, append_images=[second, second])
    red = images.reduce(images.read(f"moving.{suffix}")).float().mean((1, 2))
    assert red[0] > 250
    assert red[2] < 5
    main(["predict", f"moving.{suffix}", f"moving.{suffix}", "still.png", "--ckpt_path", "best"])
    assert "frames or pages: 2; the first" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [name.lower() for name in images.FORMATS])
def test_damaged_files_raise_nothing_else(suffix, photo):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    photo.save(buffer, suffix, exif=exif)
    whole, rng = buffer.getvalue(), np.random.RandomState(0)
    for _ in range(60):
        data = np.frombuffer(whole, np.uint8).copy()
        # headers are where it hurts
        places = rng.randint(0, rng.choice([32, 256, len(data)]), rng.choice([1, 4]))
        data[places % len(data)] = rng.choice([0, 1, 127, 255])
        for damaged in (data, data[: rng.randint(len(data))]):
            try:
                images.reduce(images.read(io.BytesIO(damaged.tobytes())))
            except images.ImageError as error:
                assert "\n" not in str(error)


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
        mine = {row["class"]: float(row["probability"]) for row in rows if row["image"] == name}
        assert mine == found
        assert objects[i]["confident"] is (max(shares.values()) >= LOW)


def test_json_of_nothing_is_a_list(run, capsys):
    with pytest.raises(SystemExit):
        main("predict missing.png --ckpt_path best --format json".split())
    assert json.loads(capsys.readouterr().out) == []


@pytest.fixture
def stdin_is():
    """Makes a file the standard input, as the shell does."""
    before = os.dup(0)

    def redirect(name):
        with open(name, "rb") as file:
            os.dup2(file.fileno(), 0)

    yield redirect
    os.dup2(before, 0)
    os.close(before)


def test_standard_input(run, photo, capfd, refused, stdin_is):
    photo.save("a.png")
    expected = [{**row, "image": "-"} for row in predict(capfd, "a.png")]
    stdin_is("a.png")
    assert predict(capfd, "-") == expected
    assert "replace" in refused("predict", "-", "--out", "a.png", code=2)
    read, write = os.pipe()
    os.write(write, Path("a.png").read_bytes())
    os.close(write)
    stdin_is(f"/dev/fd/{read}")
    os.close(read)
    assert predict(capfd, "-") == expected


def test_sheet(run, photo, capsys):
    Path("pics").mkdir()
    for i in range(SHEET + 1):
        photo.resize((600, 400)).save(f"pics/costs ${i}$ \u732b.jpg")
    photo.convert("P").save("a.gif", save_all=True, append_images=[photo.rotate(9)])
    main("predict pics --ckpt_path best --out sheet.PNG".split())
    out, err = capsys.readouterr()
    assert out.count("%") == 5 * (SHEET + 1)
    assert out.count("(uncertain)") == SHEET + 1  # three epochs of a tiny net
    assert f"{SHEET} of {SHEET + 1} images" in err
    assert len(err.splitlines()) == 2
    with Image.open("sheet.PNG") as sheet:
        assert sheet.width > 1000
        assert sheet.height > 1000
    main("predict a.gif --ckpt_path best --out new/sheet.PNG --top 100".split())
    with Image.open("new/sheet.PNG") as sheet:
        assert sheet.height < 400


def test_a_sheet_replaces_no_image(run, photo, refused):
    Path("sub").mkdir()
    photo.save("a.png")
    before = Path("a.png").read_bytes()
    Path("linked").symlink_to("sub")
    Path("soft.png").symlink_to("a.png")
    os.link("a.png", "hard.png")
    for out in ("a.png", "./a.png", "sub/../a.png", "soft.png", "hard.png"):
        assert "replace" in refused("predict", "a.png", "--out", out, code=2)
    photo.save("sub/b.png")
    assert "replace" in refused("predict", "sub", "--out", "linked/b.png", code=2)
    assert "replace" in refused("predict", "soft.png", "--out", "a.png", code=2)
    assert Path("a.png").read_bytes() == before
    assert Path("soft.png").is_symlink()


def test_refused(run, photo, refused, monkeypatch, tmp_path):
    photo.save("a.png")
    assert ".png" in refused("predict", "a.png", "--out", "sheet.jpg", code=2)
    assert ".png" in refused("predict", "a.png", "--out", "", code=2)
    assert r"no\nwhere" in refused("predict", "a.png", "--out", "no\nwhere", code=2)
    assert "top is 101" in refused("predict", "a.png", "--top", "101", code=2)
    assert "--format" in refused("predict", "a.png", "--fromat", "csv", code=2)
    assert "IMAGE" in refused("predict", code=2)
    assert "ckpt_path" in refused("predict", "a.png", "--ckpt_path", "", code=1)
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path / "none")
    assert "best.ckpt" in refused("predict", "../a.png", "--ckpt_path", "best", code=1)
    assert "no such file" in refused("predict", "../a.png", "--ckpt_path", "x.ckpt", code=1)


@pytest.mark.parametrize("command", ["predict", "reproduce", "report", "bench"])
def test_help_tells_no_default_of_null(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert "null)" not in said.replace("(type: str | null)", "")
    assert command != "predict" or "by default 5 (type: int)" in " ".join(said.split())
    assert command != "predict" or f"below {LOW:.0%} is marked" in " ".join(said.split())


def test_packaged_weights_are_the_default(own_folder, photo, capsys):
    photo.save("a.png")
    main(["predict", "a.png"])
    assert str(checkpoints.PRETRAINED) in capsys.readouterr().err
    assert allconv.load().classes == cifar100.CLASSES


@pytest.mark.parametrize(
    ("args", "unwanted"),
    [
        (["--help"], "torch numpy PIL matplotlib lightning"),
        (["a.png"], "matplotlib lightning torchvision torchmetrics"),
        (["a.png", "--out", "sheet.png"], "matplotlib.pyplot lightning torchvision torchmetrics"),
    ],
)
def test_imports_what_it_needs(args, unwanted, photo, own_folder):
    photo.save("a.png")
    code = (
        "import sys; from allconv.__main__ import main\n"
        f"try: main(['predict', *{args!r}])\n"
        "except SystemExit: pass\n"
        f"sys.exit({{*{unwanted.split()!r}}} & {{*sys.modules}} or 0)"
    )
    # an unknown backend of matplotlib, as a shell may name it for other programs, does no harm
    env = {**os.environ, "PYTHONPATH": str(REPO), "MPLBACKEND": "foo"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_importing_allconv_does_not_import_torch():
    code = "import allconv, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
