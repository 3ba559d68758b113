"""What every data source must keep to. The folder is searched: a new source is tested as soon as it exists."""

import inspect
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from itertools import islice

import pytest

from glimpseprune import lookup
from glimpseprune.config import MISSING
from glimpseprune.data.shards import check
from glimpseprune.prepare import SOURCES

FEW = 12


def needs_files(source) -> bool:
    """Its raw files must be given: a field has no default."""
    return any(
        field.default in (NO_DEFAULT, MISSING) and field.default_factory is NO_DEFAULT
        for field in fields(source.Options)
    )


def splits_of_all_sources() -> list:
    cases = []
    for name in lookup.names(SOURCES):
        source = lookup.find(SOURCES, name)
        for split in source.splits:
            skip = pytest.mark.skip("its raw files are not part of the project")
            cases.append(pytest.param(source, split, id=f"{name}-{split}", marks=[skip] if needs_files(source) else []))
    return cases


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


@pytest.mark.parametrize(("source", "split"), splits_of_all_sources())
def test_samples_are_valid_unique_and_always_the_same(source, split):
    samples = list(islice(source.samples(source.Options(), split), FEW))
    assert samples
    for sample in samples:
        check(sample)
        assert not sample.stands_in
    assert len({sample.key for sample in samples}) == len(samples)
    again = islice(source.samples(source.Options(), split), FEW)
    assert list(map(describe, samples)) == list(map(describe, again))


@pytest.mark.parametrize(("source", "split"), splits_of_all_sources())
def test_a_slice_is_a_slice(source, split):
    if "start" not in inspect.signature(source.samples).parameters:
        pytest.skip("this source is read from its beginning")
    samples = list(map(describe, islice(source.samples(source.Options(), split), FEW)))
    for start, stop in ((0, 5), (5, 11), (3, 4), (7, 7)):
        assert (
            list(map(describe, source.samples(source.Options(), split, start=start, stop=stop))) == samples[start:stop]
        )
    assert not list(source.samples(source.Options(), split, start=10**9, stop=10**9 + 5))


def test_splits_of_one_source_share_no_key():
    for name in lookup.names(SOURCES):
        source = lookup.find(SOURCES, name)
        if needs_files(source):
            continue
        keys = [s.key for split in source.splits for s in islice(source.samples(source.Options(), split), FEW)]
        assert len(keys) == len(set(keys)), name
