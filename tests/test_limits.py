"""Sizes are known without decoding; what is above a limit is left out and counted, or shrunk with its boxes."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from glimpseprune.backbones.qwen2_5_vl import Backbone
from glimpseprune.config import UserError
from glimpseprune.data.collate import Collator
from glimpseprune.data.limits import Limits, dropped, image_sizes, measure, tokens_of
from glimpseprune.data.mixture import Mixture
from glimpseprune.data.module import ShardDataModule
from glimpseprune.data.shards import Shards, Store, write
from glimpseprune.data.stream import ShardDataset, ShardLoader
from glimpseprune.train import tell_left_out
from test_shards import headers, make, patch, picture

SIZES = [(20, 12), (40, 30), (100, 100), (200, 50), (60, 60)]


def area(size) -> int:
    """In place of a backbone: a visual token for each 100 pixels."""
    return size[0] * size[1] // 100


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """20 samples in shards of 6, of five sizes in turn."""
    samples = (make(n, images=[picture(n, SIZES[n % 5])]) for n in range(20))
    write(samples, tmp_path / "data", split="train", shard_size=6)
    return tmp_path / "data"


def keys(samples):
    return [sample.key for sample in samples]


def test_sizes_are_those_of_what_is_read(folder, tmp_path):
    turned = Image.new("RGB", (30, 10))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif, comment=b"x" * 60000, icc_profile=bytes(200_000))
    samples = [
        make(0, images=[picture(0), picture(1, (9, 40))], boxes=None),
        make(1, images=[Image.open(tmp_path / "turned.jpg")], boxes=None),
    ]
    write(samples, tmp_path / "odd", split="train")
    for place in (folder, tmp_path / "odd"):
        reader = Shards(place, "train")
        for index in range(len(reader)):
            assert reader.sizes(index) == [image.size for image in reader.read(index).images]


def test_a_photograph_that_is_stored_turned_is_measured_as_it_is_shown(tmp_path):
    import tarfile

    photo, buffer = Image.new("RGB", (30, 10)), io.BytesIO()
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(buffer, "JPEG", exif=exif, icc_profile=bytes(200_000))  # a header longer than what is read at first
    (tmp_path / "x").mkdir()
    with tarfile.open(tmp_path / "x" / "0.tar", "w") as tar:
        for name, data in (("k.jpg", buffer.getvalue()), ("k.txt", b"t")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    reader = Shards(tmp_path / "x", "train", store=Store(fields={"question": "=q", "answers": "txt"}))
    assert reader.sizes(0) == [(10, 30)] == [reader.read(0).images[0].size]


def test_sizes_are_read_once(folder, monkeypatch):
    first = image_sizes(Shards(folder, "train"))
    assert [size for shard in first for (size,) in shard] == [SIZES[n % 5] for n in range(20)]
    monkeypatch.setattr(Shards, "sizes", lambda *_: pytest.fail("read again"))
    assert image_sizes(Shards(folder, "train")) == first
    monkeypatch.undo()
    shutil.rmtree(folder)
    write(map(make, range(3)), folder, split="train")
    assert image_sizes(Shards(folder, "train")) == [[[(20, 12)]] * 3]


def test_a_reader_with_a_limit_is_measured_as_far_as_it_goes(folder):
    assert [len(shard) for shard in image_sizes(Shards(folder, "train", limit=8))] == [6, 2, 0, 0]


def test_damage_is_left_to_the_reader(folder):
    patch(
        folder / "train-000000.tar", headers(folder / "train-000000.tar")["made-0002.0.png"].offset_data, b"not a PNG"
    )
    found = measure(Shards(folder, "train"), area, Limits(max_tokens=50))
    assert found.lengths[2] == 0
    assert found.keep[2]


def test_what_is_above_is_left_out_and_counted(folder):
    found = measure(Shards(folder, "train"), area, Limits(max_pixels=9_999, max_tokens=30))
    assert found.lengths[:5].tolist() == [2, 12, 100, 100, 36]
    assert found.keep.tolist() == [True, True, False, False, False] * 4
    assert found.left_out == {"above data.max_pixels=9999": 8, "above data.max_tokens=30": 4}
    assert dropped(found, [30, 36, 100]) == [(30, 12, 944 / 1000), (36, 8, 0.8), (100, 0, 0.0)]


def test_what_is_left_out_is_dealt_to_nobody_and_stands_in_for_nobody(folder):
    patch(
        folder / "train-000000.tar", headers(folder / "train-000000.tar")["made-0000.0.png"].offset_data, b"not a PNG"
    )
    for epoch in range(2):
        data = ShardDataModule(folder, keys, val=None, batch_size=2, limits=Limits(max_tokens=30), tokens=area)
        data.seed = epoch
        with pytest.warns(UserWarning, match="damaged"):
            seen = [key for batch in data.train_dataloader() for key in batch]
        assert len(seen) == 8
        assert {int(key[-4:]) % 5 for key in seen} <= {0, 1}
    assert sum(data.left_out["train"].values()) == 12


def test_what_is_left_out_is_told_before_a_training(folder, capsys):
    data = ShardDataModule(folder, keys, val="train", val_limit=5, limits=Limits(max_tokens=30), tokens=area)
    tell_left_out(data)
    told = capsys.readouterr().out.splitlines()
    assert told == [
        f"note: {count} samples for {role} of {folder} are left out: above data.max_tokens=30"
        for role, count in (("train", 12), ("val", 3))
    ]


def test_shrinking_keeps_the_ratio_and_takes_the_boxes_along():
    sample = make(0, images=[picture(0, (200, 100)), picture(1, (100, 100))], boxes=[[(20, 10, 200, 100)], []])
    for limits in (Limits(max_pixels=7500, above="shrink"), Limits(max_tokens=75, above="shrink")):
        made = limits.shrunk(sample, area)
        (w, h), (w2, h2) = (image.size for image in made.images)
        assert 6500 < w * h + w2 * h2 <= 7500
        assert abs(w / h - 2) < 0.05
        assert abs(w2 - h) <= 1
        assert made.boxes == [[(20 * w / 200, 10 * h / 100, w, h)], []]
        assert limits.shrunk(made, area) is made
        assert sample.images[0].size == (200, 100)
    assert dataclasses.replace(limits, max_tokens=300).shrunk(sample, area) is sample


def test_shrunk_samples_are_measured_as_they_will_be(folder):
    limits = Limits(max_tokens=30, above="shrink")
    data = ShardDataModule(folder, list, val=None, batch_size=2, limits=limits, tokens=area, bucket=8)
    samples = [sample for batch in data.train_dataloader() for sample in batch]
    assert len(samples) == 20
    assert not data.left_out["train"]
    lengths = data.loaders["train"].deal.lengths
    assert max(lengths) <= 30
    for sample in samples:
        assert area(sample.images[0].size) == lengths[int(sample.key[-4:])]


def test_what_no_shrinking_brings_below_is_left_out(folder):
    found = measure(Shards(folder, "train"), lambda size: 576, Limits(max_tokens=500, above="shrink"))
    assert not found.keep.any()
    assert found.left_out == {"above data.max_tokens=500, and no smaller one is below": 20}
    data = ShardDataModule(folder, keys, val=None, limits=Limits(max_tokens=5), tokens=lambda size: 576)
    with pytest.raises(UserError, match="has 0 samples: too few for one step"):
        data.train_dataloader()


def test_visual_tokens_are_those_that_the_prompt_has():
    backbone = Backbone.tiny()
    tokens, collate = tokens_of(backbone), Collator(backbone)
    for size in [(20, 40), (200, 90), (333, 517)]:
        (target,) = collate([make(0, images=[picture(0, size)], boxes=None)]).targets
        assert tokens(size) == len(target)


# -------------------------------------------------------------------------------------------- mixtures, through loaders


@pytest.fixture
def other(tmp_path):
    write(
        (make(n, images=[picture(n, (50, 50))]) for n in range(100, 130)),
        tmp_path / "other",
        split="train",
        shard_size=7,
    )
    return tmp_path / "other"


def mixture(folder, other, **kwargs) -> ShardLoader:
    data = ShardDataModule(
        folder, keys, val=None, batch_size=4, mix={str(other): 3.0}, seed=5, bucket=16, tokens=area, **kwargs
    )
    return data.train_dataloader()


def test_scenes_of_two_folders_are_not_one(folder, tmp_path):
    write([make(0, images=[picture(9, (50, 50))]), make(1, scene="")], tmp_path / "same", split="train")
    reader = Mixture({folder: 1, tmp_path / "same": 1}, "train")
    assert reader.folders[0].read(0).scene == reader.folders[1].read(0).scene == "scene-0"
    assert reader.read(0).scene == reader.read(1).scene != reader.read(20).scene
    assert reader.read(21).scene == ""


def test_a_mixture_reads_each_folder_by_its_weight(folder, other):
    loader = mixture(folder, other)
    seen = [key for batch in loader for key in batch]
    assert len(seen) == 48
    assert abs(sum(key < "made-0100" for key in seen) - 12.5) <= 2
    reader = Mixture({folder: 1, other: 3}, "train")
    assert [reader.read(index).key for index in (0, 19, 20, 49)] == ["made-0000", "made-0019", "made-0100", "made-0129"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limits", [Limits(), Limits(max_tokens=90)])
def test_a_mixture_in_buckets_resumes_exactly(folder, other, workers, limits):
    whole = mixture(folder, other, limits=limits)
    batches = [batch for _ in range(3) for batch in whole]
    per_epoch = len(whole)
    for steps in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        first = mixture(folder, other, limits=limits, workers=workers)
        taken = []
        while len(taken) < steps:
            for batch in first:
                taken.append(batch)
                if len(taken) == steps:
                    state = json.loads(json.dumps(first.state_dict()))
                    break
        second = mixture(folder, other, limits=limits)
        second.load_state_dict(state)
        again = [batch for _ in range(2) for batch in second]
        assert taken + again == batches[: steps + len(again)]


def test_another_order_is_not_resumed(folder, other):
    state = mixture(folder, other).state_dict()
    assert {"mix", "bucket", "lengths", "step"} <= set(state)
    heavier = ShardDataModule(
        folder, keys, val=None, batch_size=4, mix={str(other): 2.0}, seed=5, bucket=16, tokens=area
    )
    with pytest.raises(UserError, match=r"cannot resume: the data of the checkpoint had mix .*3\.0.* now has .*2\.0"):
        heavier.train_dataloader().load_state_dict(state)
    for change in ({"bucket": 8}, {"tokens": lambda size: 1}):
        options = {"bucket": 16, "tokens": area} | change
        loader = ShardDataModule(folder, keys, val=None, batch_size=4, mix={str(other): 3.0}, seed=5, **options)
        with pytest.raises(UserError, match="cannot resume"):
            loader.train_dataloader().load_state_dict(state)
    with pytest.raises(UserError, match=r"cannot resume: .* had mix .* now has None"):
        plain = ShardDataset(folder, "train")
        ShardLoader(plain, keys, 4, shuffle=True, seed=5).load_state_dict({**state, "samples": 20})


def test_a_weight_that_is_none_is_refused(folder, other):
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="data.mix: the weight of"):
            Mixture({folder: 1.0, other: weight}, "train")
    with pytest.raises(UserError, match=r"data.mix: .* gives none of 50 samples"):
        ShardLoader(ShardDataset(folder, "train", mix={str(other): 1e-9}), keys, 4, shuffle=True)


def test_less_is_padded(folder):
    lengths = np.array([area(SIZES[n % 5]) for n in range(20)])

    def columns(bucket):
        data = ShardDataModule(folder, keys, val=None, batch_size=4, bucket=bucket, tokens=area)
        batches = [[int(key[-4:]) for key in batch] for batch in data.train_dataloader()]
        return sum(len(batch) * lengths[batch].max() for batch in batches)

    assert columns(20) < columns(0)
