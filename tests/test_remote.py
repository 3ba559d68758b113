"""Shards from an address: the same samples as from a disk, through failures of the network, and no more than asked."""

import gzip
import hashlib
import io
import json
import shutil
import sys

import pytest

from glimpseprune.config import UserError
from glimpseprune.data import remote
from glimpseprune.data.cache import DATA
from glimpseprune.data.shards import Damage, Shards, Store, write
from glimpseprune.data.stream import ShardDataset, ShardLoader
from serving import site
from test_shards import make, pixels

pytest.importorskip("aiohttp")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.0)


@pytest.fixture
def folder(tmp_path):
    """Split train: 10 samples in shards of 4, 4 and 2."""
    write(map(make, range(10)), tmp_path / "data", split="train", shard_size=4)
    return tmp_path / "data"


@pytest.fixture
def web(folder):
    with site(folder) as found:
        yield found


@pytest.fixture
def store(tmp_path):
    return Store(cache=str(tmp_path / "cache"), limit=10**6)


@pytest.fixture
def memory(folder):
    """An address with the same files, on fsspec's filesystem in memory."""
    import fsspec

    filesystem = fsspec.filesystem("memory")
    for file in folder.iterdir():
        filesystem.pipe(f"/bucket/data/{file.name}", file.read_bytes())
    yield "memory://bucket/data"
    filesystem.rm("/bucket", recursive=True)


def keys(samples):
    return [sample.key for sample in samples]


def damages(reader) -> dict[int, str]:
    found = {}
    for index in range(len(reader)):
        try:
            reader.read(index)
        except Damage as damage:
            found[index] = str(damage)
    return found


def kept(tmp_path):
    return [file for file in (tmp_path / "cache").iterdir() if file.name.endswith(DATA)]


# ------------------------------------------------------------------------------------------------------------ reading


def test_what_is_far_reads_as_what_is_near(web, folder, store, memory):
    near = Shards(folder, "train")
    for address in (web.url, web.url + "/", memory):
        far = Shards(address, "train", store=store)
        assert far.counts == near.counts
        for index in (9, 0, 4, 3):
            assert pixels(far.read(index)) == pixels(near.read(index))
            assert far.read(index).question == near.read(index).question
    assert web.asked["train-000000.tar"] == 1  # from the cache ever after


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_takes_the_same_batches_from_afar(web, folder, store, workers):
    def batches(place, **kwargs):
        return list(ShardLoader(ShardDataset(place, "train", **kwargs), keys, 3, shuffle=True, workers=workers))

    assert batches(web.url, store=store) == batches(folder)
    assert all(web.asked[f"train-00000{number}.tar"] == 1 for number in range(3))  # one worker brought it for all


@pytest.mark.parametrize("trouble", [503, 500, 429, "cut", "short", b"<html>log in</html>"])
def test_what_fails_twice_comes_the_third_time(web, store, trouble):
    web.troubles |= {name: [trouble, trouble] for name in ("train-000001.tar", "manifest.json")}
    if not isinstance(trouble, int | str) or trouble == "short":
        del web.troubles["manifest.json"]  # whose length and sum nobody knows
    assert Shards(web.url, "train", store=store).read(5).key == make(5).key
    assert web.asked["train-000001.tar"] == 3


@pytest.mark.parametrize(
    ("trouble", "said", "asked"),
    [
        (404, "it is not there", 1),
        (403, "no permission", 1),
        ("short", "where there should be", remote.TRIES),
        (b"x" * 10**6, "more than", 1),
    ],
)
def test_a_shard_that_is_lost_is_damage_by_name_and_not_asked_for_again(web, store, trouble, said, asked):
    web.always["train-000001.tar"] = trouble
    found = damages(Shards(web.url, "train", store=store))
    assert list(found) == [4, 5, 6, 7]
    assert all("train-000001.tar" in reason and said in reason for reason in found.values())
    assert web.asked["train-000001.tar"] == asked


def test_other_bytes_of_the_same_length_are_damage(web, folder, store):
    shard = folder / "train-000001.tar"
    web.always[shard.name] = bytes(reversed(shard.read_bytes()))
    found = damages(Shards(web.url, "train", store=store))
    assert list(found) == [4, 5, 6, 7]
    assert all(reason.endswith(f"its sha256 is another, {remote.TRIES} times") for reason in found.values())
    assert not [file for file in (folder.parent / "cache").iterdir() if "partial" in file.name]


def test_damage_from_afar_is_replaced_and_counted(web, store):
    web.always["train-000001.tar"] = 404
    loader = ShardLoader(ShardDataset(web.url, "train", store=store), keys, 5)
    with pytest.warns(UserWarning, match="damaged sample replaced"):
        batches = list(loader)
    assert [len(batch) for batch in batches] == [5, 5]
    assert len(loader.damaged) == 4


def test_a_network_that_is_gone_is_no_damage(web, store):
    web.always["train-000001.tar"] = 503
    with pytest.raises(UserError, match=r"train-000001.tar did not come in 8 tries: 503.*see to the network"):
        Shards(web.url, "train", store=store).read(5)
    with pytest.raises(UserError, match=r"did not come in 8 tries"):
        Shards("http://127.0.0.1:9", "train", store=store)
    with pytest.raises(UserError, match="see to the network"):
        list(ShardLoader(ShardDataset(web.url, "train", store=store), keys, 5, workers=1))


def test_pauses_double_up_to_a_bound(monkeypatch, web, store):
    paused = []
    monkeypatch.setattr(remote, "PAUSE", 0.5)
    monkeypatch.setattr(remote.time, "sleep", paused.append)
    web.always["manifest.json"] = 503
    with pytest.raises(UserError):
        Shards(web.url, "train", store=store)
    assert len(paused) == remote.TRIES - 1
    assert all(0.7 * 0.5 * 2**n <= pause <= 0.5 * 2**n for n, pause in enumerate(paused[:6]))
    assert max(paused) <= remote.LONGEST_PAUSE


def test_credentials_are_in_no_message_and_a_signature_goes_along(web, store):
    signed = web.url + "?X-Amz-Signature=hush"
    assert Shards(signed, "train", store=store).read(0).key == make(0).key
    web.always["manifest.json"] = 404
    with pytest.raises(UserError) as error:
        Shards(signed, "train", store=store)
    assert "hush" not in str(error.value)
    assert web.url in str(error.value)


def test_what_is_missing_is_named(monkeypatch, store):
    for address, package in {"s3://b/x": "s3fs", "gs://b/x": "gcsfs"}.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"{address}.* needs the package {package}: pip install {package}"):
            Shards(address, "train", store=store)
    with pytest.raises(UserError, match="no protocol nonsense://, give http, https, s3 or gs"):
        Shards("nonsense://b/x", "train", store=store)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match="needs the package fsspec"):
        Shards("s3://b/x", "train", store=store)


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_buckets_are_asked_by_their_protocol_with_the_options_given(monkeypatch, memory, tmp_path, protocol):
    """The filesystem of the protocol is one in memory that looks at how it is made."""
    from fsspec.implementations.memory import MemoryFileSystem

    made = []

    class Bucket(MemoryFileSystem):
        def __init__(self, **options):
            made.append(options)
            super().__init__()

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace(f"{protocol}://", "memory://"))

    Bucket.protocol = protocol
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, protocol, Bucket)
    store = Store(cache=str(tmp_path / "cache"), storage={"anon": True})
    assert Shards(f"{protocol}://bucket/data", "train", store=store).read(9).key == make(9).key
    assert made
    assert all(options == {"anon": True} for options in made)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "x/train-000000.tar", "train-000001.tar"])
def test_names_in_a_manifest_lead_nowhere(web, folder, store, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not one of ours"):
        Shards(web.url, "train", store=store)


# ------------------------------------------------------------------------------------------------------------ packed


def pack(folder, change=lambda data: data):
    """Every shard of a folder as .tar.gz, and its manifest accordingly."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["splits"]["train"]["shards"]:
        tar = folder / entry["name"]
        packed = folder / (entry["name"] + ".gz")
        packed.write_bytes(change(gzip.compress(tar.read_bytes(), mtime=0)))
        tar.unlink()
        data = packed.read_bytes()
        entry |= {"name": packed.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("far", [False, True])
def test_packed_shards_read_like_others(web, folder, store, tmp_path, far):
    expected = [pixels(Shards(folder, "train").read(index)) for index in range(10)]
    pack(folder)
    reader = Shards(web.url if far else folder, "train", store=store)
    assert [pixels(reader.read(index)) for index in range(10)] == expected
    assert not [file for file in (tmp_path / "cache").iterdir() if ".gz" in file.name]


def test_a_bomb_is_damage_and_leaves_nothing(folder, store, tmp_path):
    pack(folder)
    bomb = io.BytesIO()
    with gzip.GzipFile(fileobj=bomb, mode="wb") as stream:
        for _ in range(300):
            stream.write(bytes(1 << 20))
    assert len(bomb.getvalue()) < 400_000
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["bytes"] = len(bomb.getvalue())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "train-000000.tar.gz").write_bytes(bomb.getvalue())
    found = damages(Shards(folder, "train", store=Store(cache=str(tmp_path / "cache"), limit=10**9)))
    assert list(found) == [0, 1, 2, 3]
    assert "unpacks to more than" in found[0]
    assert all(file.stat().st_size < 10**5 for file in (tmp_path / "cache").iterdir())


def test_a_packed_shard_that_is_cut_off_is_read_as_far_as_it_goes(folder, store):
    pack(folder, lambda data: data[: len(data) * 4 // 5])
    with pytest.warns(UserWarning, match=r"unpacked up to byte \d+ only"):
        found = damages(Shards(folder, "train", store=store))
    assert 0 < len(found) < 10
    assert not any(index in found for index in (0, 4))


# ------------------------------------------------------------------------------------------------------- the cache


def test_the_cache_stays_within_its_limit_and_what_was_used_last_stays(web, folder, tmp_path):
    sizes = [file.stat().st_size for file in sorted(folder.glob("*.tar"))]
    store = Store(cache=str(tmp_path / "cache"), limit=sizes[0] + sizes[1])
    reader = Shards(web.url, "train", store=store)
    for index in (0, 4, 0, 9):  # the third shard takes the second's place
        assert reader.read(index).key == make(index).key
    assert sum(file.stat().st_size for file in kept(tmp_path)) <= store.limit
    assert Shards(web.url, "train", store=store).read(0).key == make(0).key
    assert web.asked["train-000000.tar"] == 1
    assert reader.read(5).key == make(5).key  # open still, though it has left


def test_what_has_left_is_closed_when_another_is_opened(web, folder, tmp_path):
    store = Store(cache=str(tmp_path / "cache"), limit=(folder / "train-000000.tar").stat().st_size)
    reader = Shards(web.url, "train", store=store)
    for index in (0, 4, 9, 0):
        assert reader.read(index).key == make(index).key
        assert len(reader._open) <= 2
    assert len(kept(tmp_path)) == 1


def test_a_cache_too_small_is_refused_before_the_training(web, folder, tmp_path):
    size = (folder / "train-000000.tar").stat().st_size
    small = ShardDataset(web.url, "train", store=Store(cache=str(tmp_path / "cache"), limit=size + 1))
    with pytest.raises(UserError, match=r"data.cache_gb=.*a training reads 16 shards of a folder in turns"):
        ShardLoader(small, keys, 2, shuffle=True)
    with pytest.raises(UserError, match=r"data.cache_gb=.*give more, or smaller shards"):
        Shards(web.url, "train", store=Store(cache=str(tmp_path / "other"), limit=100)).read(0)


def test_another_file_under_the_same_name_is_not_taken_from_the_cache(web, folder, store):
    assert Shards(web.url, "train", store=store).read(0).key == make(0).key
    shutil.rmtree(folder)
    write(map(make, range(50, 60)), folder, split="train", shard_size=4)
    assert Shards(web.url, "train", store=store).read(0).key == make(50).key
