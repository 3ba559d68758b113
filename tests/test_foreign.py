"""Shards of others: read by a map of fields, counted once, and nothing of them left out without a word."""

import gzip
import io
import json
import tarfile
from collections import Counter

import pytest
import webdataset
from PIL import Image

from glimpseprune.config import UserError
from glimpseprune.data import shards
from glimpseprune.data.foreign import Fields, key_of, of_split, places, split_name
from glimpseprune.data.shards import Damage, Shards, Store
from serving import site
from test_shards import picture

CAPTIONS = {"question": "=describe the picture", "answers": "txt"}


def jpeg(seed: int, size=(20, 12), **options) -> bytes:
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, "JPEG", quality=95, subsampling=0, **options)
    return buffer.getvalue()


def tar(path, members) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as stream:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            stream.addfile(info, io.BytesIO(data))


def like_img2dataset(number: int, image: bool = True):
    """Members as img2dataset writes them; what it could not fetch has no image."""
    key = f"{number:09d}"
    meta = {"caption": f"caption {number}", "url": "http://x/y.jpg", "key": key, "status": "success", "exif": "{}"}
    return [
        *([(f"{key}.jpg", jpeg(number))] if image else []),
        (f"{key}.txt", f"caption {number}\n".encode()),
        (f"{key}.json", json.dumps(meta).encode()),
    ]


@pytest.fixture
def folder(tmp_path):
    """Shards 00000 to 00002 of 4 samples, the second of each without a picture; beside each a file of statistics."""
    for shard in range(3):
        numbers = range(4 * shard, 4 * shard + 4)
        members = [member for n in numbers for member in like_img2dataset(n, image=n % 4 != 1)]
        tar(tmp_path / "others" / f"{shard:05d}.tar", members)
        (tmp_path / "others" / f"{shard:05d}_stats.json").write_text("{}")
    return tmp_path / "others"


@pytest.fixture
def store(tmp_path):
    return Store(cache=str(tmp_path / "cache"), fields=CAPTIONS)


def test_img2dataset_by_a_map_of_fields(folder, store):
    reader = Shards(folder, "train", store=store)
    assert reader.counts == [3, 3, 3]
    assert reader.left_out == Counter({"no image (jpg;jpeg;png)": 3})
    sample = reader.read(4)
    assert (sample.key, sample.question, sample.answers) == ("00001-000000006", "describe the picture", ("caption 6",))
    assert sample.images[0].tobytes() == Image.open(io.BytesIO(jpeg(6))).convert("RGB").tobytes()
    assert sample.boxes is None
    assert sample.kind == "all"


def test_it_agrees_with_webdataset(folder, store):
    reader = Shards(folder, "train", store=store)
    urls = sorted(map(str, folder.glob("*.tar")))
    records = [r for r in webdataset.WebDataset(urls, shardshuffle=False).decode("pil") if "jpg" in r]
    assert len(records) == len(reader)
    for index, record in enumerate(records):
        sample = reader.read(index)
        assert sample.key.endswith(record["__key__"])
        assert sample.answers == (record["txt"].strip(),)
        assert sample.images[0].tobytes() == record["jpg"].tobytes()


@pytest.mark.parametrize(
    ("fields", "members", "expected"),
    [
        ({}, {"jpg": b"", "json": {"question": "q", "answers": ["a", 2]}}, ("q", ("a", "2"), None, "all")),
        ({}, {"jpg": b"", "json": {"question": "q"}, "txt": b" a "}, ("q", ("a",), None, "all")),
        (
            {"question": "json.qa.q", "answers": "json.qa.a"},
            {"jpg": b"", "json": {"qa": {"q": "q", "a": 1.5}}},
            ("q", ("1.5",), None, "all"),
        ),
        ({"question": "q.txt", "answers": "cls"}, {"jpg": b"", "q.txt": b"q", "cls": b"3"}, ("q", ("3",), None, "all")),
        (
            {"boxes": "json.boxes", "kind": "json.type"},
            {"jpg": b"", "json": {"question": "q", "answer": "a", "boxes": [[1, 2, 3, 4]], "type": "x"}},
            ("q", ("a",), [[(1, 2, 3, 4)]], "x"),
        ),
        (
            {"question": "=q; r", "answers": "json.a;json.b"},
            {"jpg": b"", "json": {"b": "b"}},
            ("q; r", ("b",), None, "all"),
        ),
    ],
)
def test_fields(tmp_path, fields, members, expected):
    made = {"jpg": jpeg(0)}
    data = [
        (f"k.{s}", made.get(s) or (json.dumps(v).encode() if isinstance(v, dict) else v)) for s, v in members.items()
    ]
    tar(tmp_path / "x" / "0.tar", data)
    sample = Shards(tmp_path / "x", "train", store=Store(cache=str(tmp_path / "c"), fields=fields)).read(0)
    assert (sample.question, sample.answers, sample.boxes, sample.kind) == expected


@pytest.mark.parametrize(
    ("member", "data", "said"),
    [
        ("json", b"[1]", "no question (json.question)"),
        ("json", b"{", "Expecting property name"),
        ("json", b'{"question": "q", "answer": {"a": 1}}', "a text or a list of texts is needed, not dict"),
        ("json", b'{"question": " ", "answer": "a"}', "question must be a text that is not empty"),
        ("json", b'{"question": "q", "answer": "a", "boxes": [[0, 0, 99, 99]]}', "is not inside its image of 20 x 12"),
        ("json", b"x" * (shards.JSON_BYTES + 1), "more than the 1048576 allowed"),
        ("jpg", b"GIF89a", "neither PNG nor JPEG"),
        ("json", b'{"question": "q", "answer": "' + b"a" * 9000 + b'"}', "9000 characters, more than the 8192 allowed"),
    ],
)
def test_bad_samples_are_damage_by_name(tmp_path, member, data, said):
    good = {"jpg": jpeg(0), "json": b'{"question": "q", "answer": "a"}'}
    tar(
        tmp_path / "x" / "0.tar",
        [(f"k.{s}", d) for s, d in (good | {member: data}).items()] + [(f"l.{s}", d) for s, d in good.items()],
    )
    reader = Shards(tmp_path / "x", "train", store=Store(cache=str(tmp_path / "c"), fields={"boxes": "json.boxes"}))
    with pytest.raises(Damage, match=r"0\.tar\[0\] \(k\): ") as error:
        reader.read(0)
    assert said in str(error.value)
    assert reader.read(1).key == "0-l"


def test_a_folder_is_counted_once(folder, store, monkeypatch):
    walked = []
    walk = shards._complete
    monkeypatch.setattr(shards, "_complete", lambda stream, *rest: walked.append(stream.name) or walk(stream, *rest))
    Shards(folder, "train", store=store)
    assert len(walked) == 3
    Shards(folder, "train", store=store)
    assert len(walked) == 3
    tar(folder / "00001.tar", like_img2dataset(99))
    assert Shards(folder, "train", store=store).counts == [3, 1, 3]
    assert len(walked) == 4
    Shards(folder, "train", store=Store(cache=store.cache, fields={**CAPTIONS, "answers": "json.caption"}))
    assert len(walked) == 7


def test_names_are_never_paths(tmp_path, store):
    names = ["../../up", "/etc/passwd", "./a/b", "a" * 90, "ünï cöde", "x y"]
    tar(tmp_path / "x" / "0.tar", [(f"{n}.{s}", d) for n in names for s, d in (("jpg", jpeg(1)), ("txt", b"t"))])
    reader = Shards(tmp_path / "x", "train", store=store)
    found = [reader.read(index).key for index in range(len(reader))]
    assert len(found) == len(set(found)) == 6
    assert all(shards._KEY.fullmatch(key) for key in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "x"]


def test_a_key_that_comes_twice_is_left_out_and_counted(tmp_path, store):
    one = [("k.jpg", jpeg(0)), ("k.txt", b"t")]
    other = [("l.jpg", jpeg(1)), ("l.txt", b"t")]
    tar(tmp_path / "x" / "0.tar", one + other + one)
    reader = Shards(tmp_path / "x", "train", store=store)
    assert len(reader) == 2
    assert sum(reader.left_out.values()) == 1


def test_packed_shards_of_others(folder, store):
    plain = [Shards(folder, "train", store=store).read(index).answers for index in range(9)]
    for file in folder.glob("*.tar"):
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    reader = Shards(folder, "train", store=store)
    assert [reader.read(index).answers for index in range(9)] == plain


def test_shards_of_others_from_an_address(folder, store):
    pytest.importorskip("aiohttp")
    near = Shards(folder, "train", store=store)
    with site(folder) as web:
        far = Shards(web.url, "train", store=store)
        assert (far.counts, far.left_out) == (near.counts, near.left_out)
        assert [far.read(i).answers for i in range(9)] == [near.read(i).answers for i in range(9)]
        Shards(web.url, "train", store=store)
        assert web.asked["00001.tar"] == 1
        assert not any("passwd" in name for name in web.asked)


def test_which_shards_are_of_a_split():
    named = ["train-0.tar", "train-1.tar", "val-0.tar", "trainings.tar"]
    assert of_split(named, "train") == ["train-0.tar", "train-1.tar"]
    assert of_split(named, "val") == ["val-0.tar"]
    assert of_split(["00000.tar", "00001.tar", "val-0.tar"], "train") == ["00000.tar", "00001.tar"]
    assert of_split(["00000.tar"], "val") == []


def test_what_cannot_be_read_is_said(folder, store, tmp_path):
    with pytest.raises(UserError, match=r"no manifest.json: there are only 00000.*are read with data.fields=\{\}"):
        Shards(folder, "train")
    with pytest.raises(UserError, match="no shards of split 'val' in"):
        Shards(folder, "val", store=store)
    with pytest.raises(
        UserError, match=r"no sample of split 'train' .* has what data.fields asks for: .*no answers \(cap\)"
    ):
        Shards(folder, "train", store=Store(cache=store.cache, fields={"question": "=q", "answers": "cap"}))
    for fields, said in (
        ({"imag": "jpg"}, "data.fields.imag.*did you mean"),
        ({"image": "=x"}, "data.fields.image: give the suffix"),
        ({"question": ""}, "data.fields.question"),
    ):
        with pytest.raises(UserError, match=said):
            Shards(folder, "train", store=Store(cache=store.cache, fields=fields))


def test_parts():
    assert split_name("./a/b.c.JPG") == ("a/b", "c.jpg")
    assert split_name("a.json") == ("a", "json")
    assert split_name(".hidden") is None
    assert split_name("dir.d/x.jpg") == ("dir.d/x", "jpg")
    assert places("json.a.b; txt") == [("json", ("a", "b")), ("txt", ())]
    assert key_of("00001.tar", "00001") == "00001-00001"
    assert len(key_of("s.tar", "k" * 500)) == 80
    assert key_of("s.tar", "a b") != key_of("s.tar", "a_b")
    assert set(vars(Fields())) == {"image", "question", "answers", "boxes", "kind"}
