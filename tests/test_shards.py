"""Shards: what is written comes back, plain webdataset can read it, and damage costs no more than what is damaged."""

import io
import json
import os
import pickle
import re
import shutil
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from glimpseprune.config import UserError
from glimpseprune.data import shards
from glimpseprune.data.shards import Damage, Shards, write
from glimpseprune.types import Sample


def picture(seed: int, size: tuple[int, int] = (20, 12)) -> Image.Image:
    """An image that differs from pixel to pixel and from seed to seed."""
    width, height = size
    return Image.frombytes("RGB", size, bytes((seed * 31 + i * 7) % 256 for i in range(width * height * 3)))


def make(number: int, **changes) -> Sample:
    sample = Sample(
        key=f"made-{number:04d}",
        question=f"wie viele, Nr. {number} – 几个?",
        answers=(str(number), "viele"),
        images=[picture(number)],
        boxes=[[(1.0, 2.0, 10.5, 12.0)]],
        kind="odd" if number % 2 else "even",
        dataset="made",
        scene=f"scene-{number // 2}",
    )
    for name, value in changes.items():
        setattr(sample, name, value)
    return sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Split train: 10 samples in shards of 4, 4 and 2."""
    write(map(make, range(10)), tmp_path / "data", split="train", shard_size=4, meta={"source": "made"})
    return tmp_path / "data"


def pixels(sample: Sample) -> list[tuple]:
    return [(image.size, image.mode, image.tobytes()) for image in sample.images]


def survey(folder: Path, split: str = "train") -> tuple[list[str], dict[int, str]]:
    """Keys that can be read, and the damage at each index that cannot."""
    keys, damage = [], {}
    reader = Shards(folder, split)
    for index in range(len(reader)):
        try:
            keys.append(reader.read(index).key)
        except Damage as error:
            damage[index] = str(error)
    return keys, damage


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def headers(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return {member.name: member for member in tar}


def without_checksums(data: bytes) -> bytes:
    return re.sub(rb', "crc32": \{[^}]*\}, "own_crc32": \d+\}$', b"}", data)


def rewrite(path: Path, change) -> None:
    """Rewrite a tar through ``change(name, data) -> data, (name, data) or None``, and its size in the manifest. What
    is changed is from before there were checksums."""
    with tarfile.open(path) as tar:
        members = [(member.name, without_checksums(tar.extractfile(member).read())) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            changed = change(name, data)
            if changed is None:
                continue
            name, data = changed if isinstance(changed, tuple) else (name, changed)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    manifest = json.loads((path.parent / "manifest.json").read_text())
    for entry in manifest["splits"]["train"]["shards"]:
        if entry["name"] == path.name:
            entry["bytes"] = path.stat().st_size
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------------------------ writing and reading


def test_what_is_written_comes_back(folder):
    reader = Shards(folder, "train")
    assert len(reader) == 10
    assert reader.counts == [4, 4, 2]
    for index in (9, 0, 4, 3, 7, 8, 1, 2, 5, 6):
        read, made = reader.read(index), make(index)
        assert pixels(read) == pixels(made)
        read.images = made.images
        assert read == made


def test_many_images_no_boxes_and_other_modes(tmp_path):
    images = [picture(1), picture(2, (7, 9)).convert("L"), picture(3).convert("P"), picture(4).convert("RGBA")]
    boxes = [[(0, 0, 20, 12), (1, 1, 1, 1)], [], [(0.5, 0, 3, 4)], []]
    write([make(0, images=images, boxes=boxes), make(1, boxes=None)], tmp_path, split="val")
    reader = Shards(tmp_path, "val")
    first = reader.read(0)
    assert [image.size for image in first.images] == [(20, 12), (7, 9), (20, 12), (20, 12)]
    assert pixels(first) == [(i.size, "RGB", i.convert("RGB").tobytes()) for i in images]
    assert first.boxes == boxes
    assert reader.read(1).boxes is None


def test_jpeg_files_stay_jpeg(tmp_path):
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "photo.jpg", quality=80)
    photo = Image.open(tmp_path / "photo.jpg")
    write([make(0, images=[photo]), make(1, images=[photo.copy()])], tmp_path / "out", split="train")
    names = list(headers(tmp_path / "out" / "train-000000.tar"))
    assert names == ["made-0000.0.jpg", "made-0000.json", "made-0001.0.png", "made-0001.json"]
    stored, lossless = (Shards(tmp_path / "out", "train").read(i).images[0].tobytes() for i in (0, 1))
    assert lossless == photo.tobytes()
    assert max(abs(a - b) for a, b in zip(stored, lossless)) <= 2  # encoded with the same tables


@pytest.mark.parametrize(("image_format", "suffix"), [("png", "png"), ("jpg", "jpg")])
def test_image_format_can_be_forced(tmp_path, image_format, suffix):
    write([make(0)], tmp_path, split="train", image_format=image_format)
    assert f"made-0000.0.{suffix}" in headers(tmp_path / "train-000000.tar")


def test_one_image_changed_in_place_is_not_taken_for_the_last_one(tmp_path):
    canvas = picture(0)

    def samples():
        for number in range(3):
            canvas.putpixel((0, 0), (number, 0, 0))
            yield make(number, images=[canvas])

    write(samples(), tmp_path, split="train")
    reader = Shards(tmp_path, "train")
    assert [reader.read(i).images[0].getpixel((0, 0)) for i in range(3)] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]


def test_plain_webdataset_reads_the_same(folder):
    urls = sorted(map(str, folder.glob("*.tar")))
    records = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [record["__key__"] for record in records] == [make(i).key for i in range(10)]
    for number, record in enumerate(records):
        assert record["0.png"].tobytes() == picture(number).tobytes()
        assert record["json"]["question"] == make(number).question
        assert record["json"]["answers"] == [str(number), "viele"]


def test_manifest(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["splits"]["train"]
    assert (entry["split"], entry["source"], entry["count"]) == ("train", "made", 10)
    assert entry["kinds"] == {"even": 5, "odd": 5}
    assert [(s["name"], s["count"]) for s in entry["shards"]] == [
        ("train-000000.tar", 4),
        ("train-000001.tar", 4),
        ("train-000002.tar", 2),
    ]
    assert all((folder / s["name"]).stat().st_size == s["bytes"] for s in entry["shards"])
    write([make(77)], folder, split="val")
    assert list(json.loads((folder / "manifest.json").read_text())["splits"]) == ["train", "val"]
    assert Shards(folder, "val").read(0).key == "made-0077"
    assert len(Shards(folder, "train")) == 10


def test_same_samples_same_bytes(folder, tmp_path):
    write(map(make, range(10)), tmp_path / "again", split="train", shard_size=4, meta={"source": "made"})
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_limit_takes_the_first(folder):
    reader = Shards(folder, "train", limit=5)
    assert len(reader) == 5
    assert reader.counts == [4, 1, 0]
    assert [reader.read(i).key for i in range(5)] == [make(i).key for i in range(5)]
    assert len(Shards(folder, "train", limit=99)) == 10
    with pytest.raises(UserError, match="limit is 0"):
        Shards(folder, "train", limit=0)


def test_few_shards_are_kept_open_and_a_reader_can_be_sent_to_another_process(folder, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN", 1)
    reader = Shards(folder, "train")
    for index in (0, 9, 5, 1, 8):
        assert reader.read(index).key == make(index).key
        assert len(reader._open) == 1
    assert pickle.loads(pickle.dumps(reader)).read(5).key == make(5).key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key": "a.b"}, "key 'a.b'"),
        ({"key": "../../etc"}, "key '../../etc'"),
        ({"key": "x" * 81}, "1 to 80"),
        ({"question": " "}, "question"),
        ({"answers": ()}, "answers"),
        ({"answers": ("",)}, "an answer must be a text that is not empty"),
        ({"answers": "27"}, "answers must be a list of texts, not str"),
        ({"answers": {"27": 3}}, "answers must be a list of texts, not dict"),
        ({"question": "a\ud800b"}, "question holds '\\ud800', half of a surrogate pair"),
        ({"answers": ("\udfff",)}, "an answer holds '\\udfff'"),
        ({"kind": "\ud800"}, "kind holds"),
        ({"scene": "\ud800"}, "scene holds"),
        ({"dataset": 7}, "dataset must be a text"),
        ({"question": "a" * 8193}, "question has 8193 characters, more than the 8192 allowed"),
        ({"answers": ("a",) * 300_000}, "member 'json' has"),
        ({"images": ["picture.png"]}, "no attribute"),
        ({"images": [Image.new("F", (9, 9), -1)], "boxes": None}, "an image of mode F with values from -1"),
        ({"images": [Image.new("1", (8192, 8192))] * 3, "boxes": None}, "201326592 pixels together"),
        ({"boxes": [[(0, 0, 10**400, 5)]]}, "int too large"),
        ({"boxes": [[(0, 0, True, 5)]]}, "four finite numbers"),
        ({"boxes": [[(-1, 0, 3, 5)]]}, "not inside"),
        ({"images": []}, "0 images"),
        ({"boxes": []}, "one list per image"),
        ({"boxes": [[(0, 0, 21, 5)]]}, "not inside its image of 20 x 12"),
        ({"boxes": [[(5, 5, 4, 6)]]}, "not inside"),
        ({"boxes": [[(0, 0, float("nan"), 5)]]}, "four finite numbers"),
        ({"images": [Image.new("RGB", (1, 300))], "boxes": None}, "sides differ"),
    ],
)
def test_invalid_samples_are_not_written(tmp_path, changes, words):
    with pytest.raises(UserError, match="invalid sample") as error:
        write([make(0), make(1, **changes)], tmp_path, split="train")
    assert words in str(error.value)


def test_numbers_and_lists_of_any_kind_are_written_as_plain_ones(tmp_path):
    boxes = np.array([[1, 2, 10.5, 12]], np.float32)
    odd = make(0, answers=["3", np.str_("three")], boxes=[boxes])
    write([odd, make(1, boxes=[[np.int64([0, 0, 3, 4]), [np.float64(1), 2, 3, 4]]])], tmp_path, split="train")
    first, second = map(Shards(tmp_path, "train").read, range(2))
    assert first.answers == ("3", "three")
    assert first.boxes == [[(1.0, 2.0, 10.5, 12.0)]]
    assert second.boxes == [[(0, 0, 3, 4), (1.0, 2, 3, 4)]]


def test_keys_are_unique_and_a_split_is_not_empty(tmp_path):
    with pytest.raises(UserError, match="1 keys stand more than once, such as 'made-0003'"):
        write([make(3), make(1), make(3)], tmp_path, split="train", shard_size=2)
    with pytest.raises(UserError, match="no samples for split 'val'"):
        write([], tmp_path / "empty", split="val")


# ----------------------------------------------------------------------------------------------------------- damage


def without(*lost: int) -> list[str]:
    return [make(i).key for i in range(10) if i not in lost]


def spoil_json(**changes):
    def change(name, data):
        return json.dumps({**json.loads(data), **changes}).encode() if name == "made-0005.json" else data

    return change


def png_bomb(side: int) -> bytes:
    """The start of a PNG of so many pixels squared, with pixel data to come."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [len(c[4:]).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg_of_many_scans() -> bytes:
    """501 scans that hold nothing, each of which a decoder would go through the picture for."""
    buffer = io.BytesIO()
    picture(0).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    scan = whole[whole.index(b"\xff\xda") : -2]
    return whole[:-2] + scan * 501 + whole[-2:]


def png_of_much_text(png: bytes) -> bytes:
    """With 10 MB of text in 10 kB."""
    data = b"zTXtComment\0\0" + zlib.compress(bytes(10 << 20), 9)
    at = png.index(b"IDAT") - 4
    return png[:at] + (len(data) - 4).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big") + png[at:]


def other_format(name: str) -> bytes:
    buffer = io.BytesIO()
    picture(0).save(buffer, name)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n, d: b"{not json" if n == "made-0005.json" else d, "Expecting"),
        (lambda n, d: b"\xff\xfe\xfa" if n == "made-0005.json" else d, "decode"),
        (lambda n, d: b"[" * 100_000 if n == "made-0005.json" else d, "recursion"),
        (lambda n, d: b"[1]" if n == "made-0005.json" else d, "not an object"),
        (lambda n, d: b" " * (1 << 20) + d if n == "made-0005.json" else d, "more than the 1048576 allowed"),
        (spoil_json(question=7), "question"),
        (spoil_json(answers="red"), "answers"),
        (spoil_json(answers=[1]), "an answer"),
        (spoil_json(question="a\ud800"), "surrogate"),
        (spoil_json(dataset="\udc00"), "surrogate"),
        (spoil_json(question="?" * 8193), "8193 characters"),
        (spoil_json(boxes=[[[0, 0, 10**400, 1]]]), "int too large"),
        (spoil_json(boxes=[[[0, 0, True, 1]]]), "four finite numbers"),
        (lambda n, d: d[:-1] + b', "kind": "odd"}' if n == "made-0005.json" else d, "a key stands twice"),
        (lambda n, d: d.replace(b'"odd"', b"9" * 5000) if n == "made-0005.json" else d, "4300 digits"),
        (lambda n, d: jpeg_of_many_scans() if n == "made-0005.0.png" else d, "more than 500 scans"),
        (lambda n, d: png_of_much_text(d) if n == "made-0005.0.png" else d, "too large"),
        (spoil_json(kind=None), "kind"),
        (spoil_json(images=["0.png", "1.png"]), "member '1.png' is missing"),
        (spoil_json(images=["../../secret"]), "is missing"),
        (spoil_json(images=[{}]), "names of members"),
        (spoil_json(images=["0.png"] * 65), "at most 64"),
        (spoil_json(boxes=7), "not iterable"),
        (spoil_json(boxes=[["abcd"]]), "four finite numbers"),
        (spoil_json(boxes=[[[0, 0, 1e999, 1]]]), "four finite numbers"),
        (spoil_json(boxes=[[[0, 0, 99, 1]]]), "not inside"),
        (spoil_json(boxes=[[], []]), "one list per image"),
        (lambda n, d: None if n == "made-0005.json" else d, "member 'json' is missing"),
        (lambda n, d: None if n == "made-0005.0.png" else d, "member '0.png' is missing"),
        (lambda n, d: b"no image" if n == "made-0005.0.png" else d, "neither PNG nor JPEG"),
        (lambda n, d: d[: len(d) // 2] if n == "made-0005.0.png" else d, "truncated"),
        (lambda n, d: other_format("GIF") if n == "made-0005.0.png" else d, "neither PNG nor JPEG"),
        (lambda n, d: png_bomb(9000) if n == "made-0005.0.png" else d, "image of 9000 x 9000"),
        (lambda n, d: png_bomb(60000) if n == "made-0005.0.png" else d, "exceeds limit"),
    ],
)
def test_a_damaged_sample_is_named_and_costs_no_other(folder, change, words):
    rewrite(folder / "train-000001.tar", change)
    tracemalloc.start()
    keys, damage = survey(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert keys == without(5)
    assert list(damage) == [5]
    assert damage[5].startswith("train-000001.tar[1] (made-0005): ")
    assert words in damage[5]
    assert peak < 16 << 20


def test_every_flipped_byte_is_noticed_or_changes_nothing(tmp_path):
    """In members, headers and padding, wherever it is; one in 29 of them."""
    write([make(0), make(1)], tmp_path, split="train")
    path = tmp_path / "train-000000.tar"
    whole, noticed = path.read_bytes(), 0
    intact = [make(0), make(1)]
    for at in range(0, len(whole), 29):
        patch(path, at, bytes([whole[at] ^ 0x21]))
        reader = Shards(tmp_path, "train")
        for index, expected in enumerate(intact):
            try:
                read = reader.read(index)
            except Damage:
                noticed += 1
            else:
                assert pixels(read) == pixels(expected)
                read.images = expected.images
                assert read == expected
        patch(path, at, whole[at : at + 1])
    assert noticed > 50


def test_checksums_are_of_each_member_and_of_the_json_and_shards_without_are_read(folder):
    path = folder / "train-000000.tar"
    json_at, png_at = (headers(path)[f"made-0001.{end}"].offset_data for end in ("json", "0.png"))
    said = path.read_bytes()[json_at:].partition(b"\0")[0]
    assert json.loads(said)["crc32"] == {
        "0.png": zlib.crc32(path.read_bytes()[png_at:][: headers(path)["made-0001.0.png"].size])
    }
    for at, wrong in ((said.index(b"crc32"), b"crc23"), (said.index(b"own_crc32"), b"own_crc23"), (-2, b"\x39")):
        patch(path, json_at + at % len(said), wrong)
        assert survey(folder)[1] == {1: "train-000000.tar[1] (made-0001): the checksum of the json is another"}
        patch(path, json_at, said)
    rewrite(path, lambda n, d: d)
    assert survey(folder) == (without(), {})


def test_a_sample_is_bounded_however_often_it_shows_an_image(folder, monkeypatch):
    monkeypatch.setattr(shards, "SAMPLE_PIXELS", 3 * 20 * 12)
    times = {"made-0001.json": 64, "made-0003.json": 3}

    def change(name, data):
        if name not in times:
            return data
        return json.dumps({**json.loads(data), "images": ["0.png"] * times[name], "boxes": None}).encode()

    rewrite(folder / "train-000000.tar", change)
    keys, damage = survey(folder)
    assert keys == without(1)
    assert damage[1].endswith("the images have 960 pixels together, more than the 720 allowed")
    assert [image.size for image in Shards(folder, "train").read(3).images] == [(20, 12)] * 3


def test_a_key_that_stands_twice_is_damage_the_second_time(folder):
    rewrite(folder / "train-000000.tar", lambda n, d: (n.replace("0002", "0000"), d))
    keys, damage = survey(folder)
    assert keys == without(2)
    assert damage == {2: "train-000000.tar[2] (made-0000): another sample before it has this key"}


@pytest.mark.parametrize("member", ["made-0005.json", "made-0005.0.png"])
def test_a_damaged_header_costs_one_sample(folder, member):
    path = folder / "train-000001.tar"
    patch(path, headers(path)[member].offset + 100, b"damage")
    keys, damage = survey(folder)
    assert keys == without(5)
    assert list(damage) == [5]
    assert damage[5].startswith("train-000001.tar[1] (made-0005): member")


def test_a_sample_without_any_header_is_missed_at_the_end_of_its_shard(folder):
    path = folder / "train-000001.tar"
    members = headers(path)
    start, end = members["made-0005.0.png"].offset, members["made-0006.0.png"].offset
    patch(path, start, bytes(end - start))  # a hole, as file systems leave after a crash; plain tar ends here
    keys, damage = survey(folder)
    assert keys == without(5)
    assert damage == {7: "train-000001.tar[3]: only 3 of 4 samples are left in this shard"}


def test_a_truncated_shard_loses_what_is_cut_off(folder):
    path = folder / "train-000001.tar"
    cut = headers(path)["made-0006.json"].offset_data + 5
    with open(path, "r+b") as stream:
        stream.truncate(cut)
    keys, damage = survey(folder)
    assert keys == without(6, 7)
    assert damage == {
        6: "train-000001.tar[2] (made-0006): member 'json' is missing",
        7: "train-000001.tar[3]: only 3 of 4 samples are left in this shard",
    }
    with open(path, "r+b") as stream:
        stream.truncate(0)
    assert survey(folder)[0] == without(4, 5, 6, 7)
    with pytest.raises(UserError, match="sha256 differs from manifest.json for train-000001.tar"):
        Shards(folder, "train", verify=True)


def test_a_shard_that_is_cut_or_goes_while_it_is_read(folder):
    reader = Shards(folder, "train")
    reader.read(4)
    with open(folder / "train-000001.tar", "r+b") as stream:
        stream.truncate(headers(folder / "train-000001.tar")["made-0005.json"].offset_data + 5)
    with pytest.raises(Damage, match=r"train-000001.tar\[1\] \(made-0005\): member 'json' is cut off after 5 of"):
        reader.read(5)
    (folder / "train-000002.tar").unlink()
    with pytest.raises(Damage, match=r"train-000002.tar\[0\]: .*No such file"):
        reader.read(8)


def test_names_in_a_tar_are_never_paths(folder, tmp_path):
    path = folder / "train-000001.tar"
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("evil.json")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(link)
        for name in ("../../out.json", "/out.json", "a/b.json", "..json"):
            tar.addfile(tarfile.TarInfo(name))
    rewrite(folder / "train-000000.tar", lambda n, d: d)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][1].update(count=9, bytes=path.stat().st_size)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = sorted(tmp_path.rglob("*"))
    keys, damage = survey(folder)
    assert keys == without()
    assert all("only 4 of 9 samples" in message for message in damage.values())
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------------------------------------------------- folders


def trouble(folder: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as error:
        Shards(folder, split)
    message = str(error.value)
    assert str(folder) in message
    assert f"`python -m src.prepare source=<name> out={folder}`" in message
    assert "\n" not in message
    return message


def test_missing_empty_and_foreign_folders(tmp_path):
    assert "there is no such folder" in trouble(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "it is a file" in trouble(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no manifest.json: it is empty" in trouble(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"):
        (tmp_path / "other" / name).write_text("")
    assert "there are only a.jpg, b.jpg, c.jpg and 2 more" in trouble(tmp_path / "other")


def test_manifest_that_misses_or_does_not_match(folder):
    assert "there is no split 'test', only train" in trouble(folder, "test")
    shutil.copy(folder / "train-000002.tar", folder / "train-000003.tar")
    assert "train-000003.tar are there but not in manifest.json" in trouble(folder)
    (folder / "train-000003.tar").unlink()
    (folder / "train-000001.tar").rename(folder / "elsewhere.tar")
    assert "train-000001.tar of 3 shards in manifest.json are missing" in trouble(folder)
    (folder / "elsewhere.tar").rename(folder / "train-000001.tar")
    with open(folder / "train-000000.tar", "ab") as stream:
        stream.write(bytes(512))
    assert "train-000000.tar are longer than manifest.json says" in trouble(folder)
    (folder / "manifest.json").unlink()
    assert "there are only train-000000.tar, train-000001.tar, train-000002.tar" in trouble(folder)


@pytest.mark.parametrize("name", ["manifest.json", "train-000001.tar"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_file_is_refused_and_not_waited_for(folder, name, kind):
    (folder / name).unlink()
    if kind == "fifo":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero")
    assert name in (said := trouble(folder))
    assert "no file" in said


def test_links_to_files_are_files(folder, tmp_path):
    for path in list(folder.iterdir()):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert survey(folder) == (without(), {})


def test_a_file_that_becomes_a_pipe_is_damage(folder):
    reader = Shards(folder, "train")
    (folder / "train-000002.tar").unlink()
    os.mkfifo(folder / "train-000002.tar")
    with pytest.raises(Damage, match=r"train-000002.tar\[1\]: it is no file"):
        reader.read(9)


def test_a_count_that_is_off_by_one(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][2]["count"] = 3
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert survey(folder) == (without(), {10: "train-000002.tar[2]: only 2 of 3 samples are left in this shard"})
    manifest["splits"]["train"]["shards"][2]["count"] = 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.warns(
        UserWarning, match="train-000002.tar: it holds more than the 1 samples that manifest.json counts"
    ):
        assert survey(folder) == (without(9), {})


def manifest_text(**changes) -> str:
    shard = {"name": "train-000000.tar", "count": 1, "bytes": 1, "sha256": "", **changes}
    return json.dumps({"format": "glimpseprune-shards-1", "splits": {"train": {"shards": [shard]}}})


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"format": "glimpseprune-shards-1", "splits": {"train": {"shards": []}}}',
        '{"format": "glimpseprune-shards-1", "splits": ["train"]}',
        '{"format": "another", "splits": {}}',
        manifest_text(name="../train-000000.tar"),
        manifest_text(name="train-000001.tar"),
        manifest_text(count="1"),
        manifest_text(count=0),
        manifest_text(count=True),
        manifest_text(count=1.0),
        manifest_text(count=10**18, bytes=10**22),
        manifest_text(count=2, bytes=1500),
        manifest_text(count=-1),
        "[" * 200_000,
        '{"format": ' + "9" * 5000 + "}",
        manifest_text(bytes=None),
    ],
)
def test_broken_manifests(folder, text):
    (folder / "manifest.json").write_text(text)
    assert "manifest.json" in trouble(folder)


def test_verify_passes_on_what_was_written_and_names_what_was_changed(folder):
    assert len(Shards(folder, "train", verify=True)) == 10
    path = folder / "train-000002.tar"
    patch(path, headers(path)["made-0008.0.png"].offset_data + 60, b"\x01\x02\x03")
    Shards(folder, "train")
    with pytest.raises(UserError, match=r"sha256 differs from manifest.json for train-000002.tar; make them with"):
        Shards(folder, "train", verify=True)
