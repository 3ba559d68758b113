"""One file per raw dataset; or a file of a user's own, by its path (``source=./mine.py``). A source defines

- ``Options``: a dataclass; a source that needs raw files declares where they are as a field without a default;
- ``splits``: the names of its splits;
- ``present(options)``, where that depends on its files: those of them that have samples;
- ``samples(options, split) -> Iterator[Sample]``: always the same samples, in the same order, for the same options. In
  place of one that cannot be read it may give the exception: ``prepare`` counts it, names it and goes on. Images may
  be of any mode, and unread; boxes are in pixels of the image as it is shown (:mod:`glimpseprune.images`).

A sample that is only a part of what it should be says so in ``left_out``, and is kept.

A source that can draw any slice alone may say so by two more parameters, ``start=0, stop=None`` (positions in the
split, past the end is empty): ``prepare`` with several workers then draws nothing twice, and ``sample`` only what it
takes. It may also define

- ``count(options, split)``: how many samples a split has, unfit ones included, where that is known without drawing
  them: for the time that is left, and for ``sample``, which else goes through the split first;
- ``inputs(options)``: the files that it reads rows from: ``prepare`` goes on only where they have not changed;
- ``license(options)``: in words what the data may be used for, as their authors say; None where they do not;
- ``notes(options)``: sentences on what it passes over, for the report and the manifest.
"""

DEFINES = ("Options", "splits", "samples")
"""Names that every file has."""
