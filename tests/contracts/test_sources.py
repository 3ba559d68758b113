"""What every data source must keep to. The folder is searched: a new source is tested as soon as it exists."""

import inspect
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from itertools import islice
from pathlib import Path

import pytest

from contracts._sources import RAW
from glimpseprune import lookup
from glimpseprune.config import MISSING, UserError, merge_options
from glimpseprune.data.shards import check
from glimpseprune.prepare import SOURCES

FEW = 12


def splits_of_all_sources() -> list:
    names = lookup.names(SOURCES)
    return [
        pytest.param(name, split, id=f"{name}-{split}") for name in names for split in lookup.find(SOURCES, name).splits
    ]


@pytest.fixture
def options(name, tmp_path):
    """Those of a source: its defaults, or raw files that are made for it; skips where nobody makes any."""
    source = lookup.find(SOURCES, name)
    if not any(
        item.default in (NO_DEFAULT, MISSING) and item.default_factory is NO_DEFAULT for item in fields(source.Options)
    ):
        return source.Options()
    if name not in RAW:
        pytest.skip("its raw files are not part of the project, and none are made in _sources.py")
    return merge_options(source.Options, RAW[name](tmp_path), "options")


def few(source, options, split) -> list:
    """The first samples; skips where the source needs a package that is not there."""
    try:
        return list(islice(source.samples(options, split), FEW))
    except UserError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        pytest.skip(str(error))


def describe(sample):
    return sample.key, sample.question, sample.answers, sample.boxes, sample.kind, [i.tobytes() for i in sample.images]


@pytest.mark.parametrize("name", lookup.names(SOURCES))
def test_a_source_defines_what_prepare_needs(name):
    source = lookup.find(SOURCES, name)
    assert source.__doc__
    assert is_dataclass(source.Options)
    assert isinstance(source.splits, tuple)
    assert source.splits
    assert all(split.isidentifier() for split in source.splits)
    parameters = list(inspect.signature(source.samples).parameters)
    assert parameters in (["options", "split"], ["options", "split", "start", "stop"])


@pytest.mark.parametrize(("name", "split"), splits_of_all_sources())
def test_samples_are_valid_unique_and_always_the_same(name, split, options):
    source = lookup.find(SOURCES, name)
    samples = few(source, options, split)
    assert samples or split not in getattr(source, "present", lambda _: source.splits)(options)
    for sample in samples:
        check(sample)
        assert not sample.stands_in
    assert len({sample.key for sample in samples}) == len(samples)
    assert list(map(describe, samples)) == list(map(describe, few(source, options, split)))


@pytest.mark.parametrize(("name", "split"), splits_of_all_sources())
def test_a_slice_is_a_slice(name, split, options):
    source = lookup.find(SOURCES, name)
    if "start" not in inspect.signature(source.samples).parameters:
        pytest.skip("this source is read from its beginning")
    samples = list(map(describe, few(source, options, split)))
    for start, stop in ((0, 5), (5, 11), (3, 4), (7, 7)):
        assert list(map(describe, source.samples(options, split, start=start, stop=stop))) == samples[start:stop]
    assert not list(source.samples(options, split, start=10**9, stop=10**9 + 5))


@pytest.mark.parametrize(("name", "split"), splits_of_all_sources())
def test_a_count_is_that_of_the_samples(name, split, options):
    source = lookup.find(SOURCES, name)
    if not hasattr(source, "count"):
        pytest.skip("this source does not know it")
    few(source, options, split)
    total = source.count(options, split)
    if "start" not in inspect.signature(source.samples).parameters:
        assert total == len(list(source.samples(options, split)))
        return
    assert not list(source.samples(options, split, start=total))
    assert len(list(source.samples(options, split, start=max(total - 2, 0)))) == min(total, 2)


@pytest.mark.parametrize("name", lookup.names(SOURCES))
def test_what_a_source_says_of_itself(name, options):
    source = lookup.find(SOURCES, name)
    said = source.license(options) if hasattr(source, "license") else None
    assert said is None or said.strip()
    assert all(note.strip() for note in getattr(source, "notes", lambda _: [])(options))
    files = getattr(source, "inputs", lambda _: [])(options)
    assert all(Path(file).is_file() for file in files)
    assert files or name not in RAW, "what it reads may change meanwhile: see data/sources"


@pytest.mark.parametrize("name", lookup.names(SOURCES))
def test_splits_of_one_source_share_no_key(name, options):
    source = lookup.find(SOURCES, name)
    if name == "mined":
        pytest.skip("its keys are those of the folder that it is given")
    keys = [sample.key for split in source.splits for sample in few(source, options, split)]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", lookup.names(SOURCES))
def test_splits_that_are_present_are_splits_with_samples(name, options):
    source = lookup.find(SOURCES, name)
    if not hasattr(source, "present"):
        pytest.skip("all of its splits always are")
    there = source.present(options)
    assert set(there) <= set(source.splits)
    assert [bool(few(source, options, split)) for split in source.splits] == [split in there for split in source.splits]
