"""Images that prepare stores: the files that they are, within a limit of pixels, and every one decoded."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import picture
from glimpseprune import images, prepare
from glimpseprune.data.pixels import PixelLimit
from glimpseprune.data.shards import ImageEncoder, Shards, file_of, write
from glimpseprune.types import Sample


def photo(size: tuple[int, int] = (60, 40)) -> Image.Image:
    return picture(*size)


def encoded(image: Image.Image, name: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **how)
    return buffer.getvalue()


def exif(turn: int) -> Image.Exif:
    said = Image.Exif()
    said[0x0112] = turn
    return said


def png_of_16_bits() -> bytes:
    """A PNG of 60 x 40 pixels of three channels, which Pillow takes for one of 8 bits."""
    rows = np.random.default_rng(0).integers(0, 1 << 16, (40, 180), dtype=np.uint16).astype(">u2")
    header = (60).to_bytes(4, "big") + (40).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    made = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        made += len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
    return made


AS_THEY_ARE = {
    "jpeg": lambda: encoded(photo(), "JPEG", quality=71),
    "progressive": lambda: encoded(photo(), "JPEG", progressive=True),
    "grey jpeg": lambda: encoded(photo().convert("L"), "JPEG"),
    "jpeg with metadata": lambda: encoded(photo(), "JPEG", exif=exif(1), comment=b"of a scanner"),
    "png": lambda: encoded(photo(), "PNG"),
    "black and white": lambda: encoded(photo().convert("1"), "PNG"),
    "palette": lambda: encoded(photo().convert("P"), "PNG"),
}
MADE_ANEW = {
    "turned": lambda: encoded(photo(), "JPEG", exif=exif(6)),
    "cmyk": lambda: encoded(photo().convert("CMYK"), "JPEG"),
    "transparent": lambda: encoded(photo().convert("RGBA"), "PNG"),
    "16 bits": lambda: encoded(Image.fromarray(np.full((40, 60), 300, np.uint16)), "PNG"),
    "16 bits in colour": lambda: png_of_16_bits(),
    "animated": lambda: encoded(photo(), "PNG", save_all=True, append_images=[Image.new("RGB", (60, 40))]),
    "several frames": lambda: encoded(photo(), "MPO", save_all=True, append_images=[photo()]),
    "webp": lambda: encoded(photo(), "WEBP"),
    "bmp": lambda: encoded(photo(), "BMP"),
    "gif": lambda: encoded(photo(), "GIF"),
    "tiff": lambda: encoded(photo(), "TIFF"),
    "ppm": lambda: encoded(photo(), "PPM"),
    "jpeg 2000": lambda: encoded(photo(), "JPEG2000"),
}
JPEGS = ("jpeg", "progressive", "grey jpeg", "jpeg with metadata", "turned", "cmyk", "several frames")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two questions on each of the pictures above."""
    rows = []
    for place, (name, make) in enumerate({**AS_THEY_ARE, **MADE_ANEW}.items()):
        (tmp_path / f"{place}.img").write_bytes(make())
        rows += [{"image": f"{place}.img", "question": f"{n}?", "answer": "a", "kind": name} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def made(folder: Path, *more: str) -> dict[str, dict]:
    argv = ["source=jsonl", f"options.path={folder / 'rows.jsonl'}", "options.shares={train: 1}", "overwrite=true"]
    prepare.main([*argv, f"out={folder / 'out'}", *more])
    return json.loads((folder / "out" / "manifest.json").read_text())["splits"]


def stored(folder: Path) -> list[tuple[str, bytes]]:
    """(ending, content) of each image, in order."""
    with tarfile.open(folder / "out" / "train-000000.tar") as tar:
        members = [member for member in tar if not member.name.endswith(".json")]
        return [(member.name.rpartition(".")[2], tar.extractfile(member).read()) for member in members]


def test_files_are_stored_as_they_are_where_any_reader_sees_the_same_in_them(folder):
    made(folder)
    found = stored(folder)
    originals = [(folder / f"{place // 2}.img").read_bytes() for place in range(len(found))]
    for place, name in enumerate([name for name in AS_THEY_ARE for _ in range(2)]):
        assert found[place][1] == originals[place], name
        assert found[place][0] == ("jpg" if name in JPEGS else "png")
    for place, name in enumerate([name for name in MADE_ANEW for _ in range(2)], 2 * len(AS_THEY_ARE)):
        assert found[place][1] != originals[place], name
        assert found[place][0] == ("jpg" if name in JPEGS else "png")
    reader = Shards(folder / "out", "train")
    for place, original in enumerate(originals):
        shown = np.asarray(images.shown(Image.open(io.BytesIO(original))).convert("RGB"), int)
        read = np.asarray(reader.read(place).images[0], int)
        assert read.shape == shown.shape
        assert np.abs(read - shown).mean() < (8 if found[place][0] == "jpg" else 0.1)


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_a_format_that_is_asked_for_is_that_of_all_and_spares_files_that_have_it(folder, image_format):
    made(folder, f"image_format={image_format}")
    found = stored(folder)
    assert {ending for ending, _ in found} == {image_format}
    kept = [data == (folder / f"{place // 2}.img").read_bytes() for place, (_, data) in enumerate(found)]
    assert kept == [
        name in AS_THEY_ARE and (name in JPEGS) == (image_format == "jpg")
        for name in [*AS_THEY_ARE, *MADE_ANEW]
        for _ in range(2)
    ]


def test_a_picture_that_a_source_has_opened_itself_is_stored_as_it_is_and_drawn_on_as_it_is_then(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(photo(), "JPEG", quality=71))
    opened = Image.open(tmp_path / "a.jpg")

    def samples():
        yield Sample("a", "?", ("a",), [opened])
        yield Sample("b", "?", ("a",), [opened])  # decoded by now
        opened.putpixel((0, 0), (255, 0, 255))
        opened.putpixel((1, 1), (255, 0, 255))
        yield Sample("c", "?", ("a",), [opened])

    write(samples(), tmp_path / "out", split="train")
    found = stored(tmp_path)
    assert found[0] == found[1] == ("jpg", (tmp_path / "a.jpg").read_bytes())
    assert found[2][1] != found[0][1]


def test_a_jpeg_of_many_scans_is_made_anew(tmp_path):
    data = encoded(photo(), "JPEG", progressive=True)
    at = data.index(b"\xff\xda")
    many = data[:-2] + data[at:-2] * 501 + data[-2:]
    image = images.of_file(many, ("JPEG",))
    assert ImageEncoder()(image, file_of(image))[1] != many


def test_shards_that_are_made_of_shards_keep_their_files(folder):
    made(folder)
    before, reader = stored(folder), Shards(folder / "out", "train")
    write((reader.read(index) for index in range(len(reader))), folder / "again", split="train")
    with tarfile.open(folder / "again" / "train-000000.tar") as tar:
        again = [tar.extractfile(member).read() for member in tar if not member.name.endswith(".json")]
    assert again == [data for _, data in before]


def test_an_image_that_is_larger_is_left_out_by_name_or_made_smaller(folder):
    (folder / "large.jpg").write_bytes(encoded(photo((200, 100)), "JPEG"))
    (folder / "turned.jpg").write_bytes(encoded(photo((200, 100)), "JPEG", exif=exif(6)))
    rows = [
        {"image": "large.jpg", "question": "?", "answer": "a", "boxes": [[20, 10, 100, 50], [0, 0, 200, 100]]},
        {
            "image": ["0.img", "turned.jpg"],
            "question": "?",
            "answer": "a",
            "boxes": [[[1, 2, 3, 4]], [[10, 20, 50, 100]]],
        },
        {"image": "0.img", "question": "?", "answer": "a", "boxes": [[1, 2, 3, 4]]},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused = made(folder, "max_pixels=5000")["train"]
    assert refused["count"] == 1 and "changed" not in refused
    assert refused["invalid"]["reasons"] == {"image of … x … pixels, more than the max_pixels=…": 2}
    assert refused["invalid"]["first"][0] == "rows-0000001: image of 200 x 100 pixels, more than the max_pixels=5000"
    entry = made(folder, "max_pixels=5000", "large_images=shrink")["train"]
    assert entry["count"] == 3 and "invalid" not in entry
    assert entry["changed"]["first"] == [
        "rows-0000001: image of 200 x 100 pixels stored with 100 x 50",
        "rows-0000002: image of 100 x 200 pixels stored with 50 x 100",
    ]
    first, second, third = map(Shards(folder / "out", "train").read, range(3))
    assert [image.size for image in first.images] == [(100, 50)]
    assert first.boxes == [[(10, 5, 50, 25), (0, 0, 100, 50)]]
    assert [image.size for image in second.images] == [(60, 40), (50, 100)]
    assert second.boxes == [[(1, 2, 3, 4)], [(5, 10, 25, 50)]]
    assert [ending for ending, _ in stored(folder)] == ["jpg"] * 4
    assert stored(folder)[1][1] == stored(folder)[3][1] == (folder / "0.img").read_bytes()
    whole = np.asarray(images.shown(Image.open(folder / "large.jpg")).resize((100, 50), Image.Resampling.LANCZOS), int)
    assert np.abs(np.asarray(first.images[0], int) - whole).mean() < 3


@pytest.mark.parametrize("size", [(28, 29), (3000, 16), (16, 3000), (999, 1001), (5000, 5000)])
@pytest.mark.parametrize("most", [784, 5000, 999_999])
def test_no_image_has_more_pixels_than_the_limit_and_none_that_has_not_changes(size, most):
    given = Image.new("RGB", size)
    (sample, change) = PixelLimit(most, "shrink")(Sample("a", "?", ("a",), [given], [[(0, 0, *size)]]))
    (image,), ((box,),) = sample.images, sample.boxes
    assert image.width * image.height <= most
    assert box == (0, 0, *image.size)
    if size[0] * size[1] <= most:
        assert image is given and not change
    else:
        assert image.width * image.height > 0.9 * most - image.width - image.height
        assert str(size[0]) in change


def test_a_box_outside_of_its_picture_is_not_inside_of_the_smaller_one():
    with pytest.raises(ValueError, match="is not inside its image of 100 x 100"):
        PixelLimit(784, "shrink")(Sample("a", "?", ("a",), [Image.new("L", (100, 100))], [[(0, 0, 100.9, 5)]]))


@pytest.mark.parametrize("damage", ["cut", "spoilt"])
@pytest.mark.parametrize("more", [(), ("max_pixels=1000", "large_images=shrink")])
def test_every_image_is_decoded_for_every_question(folder, damage, more):
    """Also at the second time of asking, when Pillow would give what it has got."""
    data = encoded(photo((64, 64)), "PNG")
    half = len(data) // 2
    (folder / "bad.png").write_bytes(data[:half] + (bytes(200) + data[half + 200 :] if damage == "spoilt" else b""))
    rows = [{"image": name, "question": "?", "answer": "a"} for name in ("0.img", "bad.png", "bad.png", "0.img")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = made(folder, *more)["train"]
    assert entry["count"] == 2 and entry["invalid"]["count"] == 2
    (reason,) = entry["invalid"]["reasons"]
    assert reason.startswith("an image cannot be read: ")


def test_a_file_that_is_too_large_to_store_is_not_read(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(photo(), "PNG"))
    opened = Image.open(tmp_path / "a.png")
    assert images.file_of(opened, 10) is None
    assert images.file_of(opened, 1 << 20) == (tmp_path / "a.png").read_bytes()
    assert np.array_equal(images.shown(opened), photo())  # it still stands where it was
    assert images.file_of(opened, 1 << 20) is None
    assert images.file_of(photo(), 1 << 20) is None
