"""Layouts: which tokens are cells, and where in the picture each of them lies; what several pruners ask for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import TINY
from glimpseprune.types import Layout, Needs, Part, Rollout

TILES = Layout(  # a thumbnail, two tiles side by side with other resolutions, and a frame that shows a corner
    (
        Part(2, 2),
        Part(3, 2, (0.0, 0.0, 0.5, 1.0)),
        Part(6, 4, (0.5, 0.0, 1.0, 1.0), newline=True),
        Part(1, 1, (0.75, 0.75, 1.0, 1.0), newline=True, newline_stays=True),
    ),
    ((2, 2), (3, 2), (6, 4), (1, 1)),
)
PADDED = Layout((Part(5, 5), Part(3, 10, (0.0, -0.1, 1.0, 1.1), newline=True)), ((5, 5),) * 3)


def lies(layout: Layout, keep: Tensor, x: float, y: float) -> bool:
    """Whether a cell that is kept shows this point of the picture: cell by cell, by the boxes."""
    tokens = iter(keep.tolist())
    found = False
    for part in layout.parts:
        left, top, right, bottom = part.box
        for row in range(part.rows):
            for col in range(part.cols + (part.newline and not part.newline_stays)):
                kept = next(tokens)
                begin, end = (left + edge / part.cols * (right - left) if part.cols else 0 for edge in (col, col + 1))
                upper, lower = (top + edge / part.rows * (bottom - top) for edge in (row, row + 1))
                found |= kept and col < part.cols and begin <= x < end and upper <= y < lower
    assert next(tokens, None) is None
    return found


@pytest.mark.parametrize("layout", [Layout.of((3, 5)), TILES, PADDED], ids=["grid", "tiles", "padded"])
def test_a_cell_that_is_kept_is_shown_where_it_lies(layout) -> None:
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.1, 0.5, 1.0):
        keep = torch.rand(layout.count, generator=generator) < share
        shown = layout.map(keep)
        rows, cols = shown.shape
        expected = [[lies(layout, keep, (c + 0.5) / cols, (r + 0.5) / rows) for c in range(cols)] for r in range(rows)]
        assert shown.tolist() == expected
        assert bool(shown.any()) == (share > 0)


def test_a_map_is_as_fine_as_the_finest_part() -> None:
    for layout, size in ((TILES, (6, 8)), (PADDED, (5, 10)), (Layout.of((4, 2), (3, 5)), (4, 5))):
        assert layout.map(torch.ones(layout.count, dtype=torch.bool)).shape == size


def test_maps_of_a_rollout_are_those_of_its_images() -> None:
    keep = torch.rand(2, TILES.count + 6, generator=torch.Generator().manual_seed(0)) < 0.5
    layouts = [[TILES, Layout.of((2, 3))], [Layout.of((3, 2)), TILES]]
    maps = Rollout(torch.zeros(2, 1), list(keep), layouts, None).keep_maps()
    parts = [keep[0].split([TILES.count, 6]), keep[1].split([6, TILES.count])]
    for row, images in enumerate(layouts):
        for ours, layout, part in zip(maps[row], images, parts[row], strict=True):
            assert torch.equal(ours, layout.map(part))


def test_needs_of_several_are_all_of_them_once() -> None:
    one = Needs(states=(3, 1), keys=(0,), attention=(2,), probes=(5,))
    two = Needs(states=(1, 2), keys=(0, 4), probes=(6, 5))
    assert one | two == Needs(states=(3, 1, 2), keys=(0, 4), attention=(2,), probes=(5, 6))
    assert one | Needs() == one == Needs() | one


@pytest.mark.parametrize("size", [(112, 168), (400, 60), (60, 400)], ids=str)
def test_either_part_of_an_image_in_two_is_shown(size) -> None:
    """LLaVA-NeXT: the whole image, and in finer cells with newlines."""
    backbone = TINY["llava_next"]()
    layout = backbone.layout_of(backbone.model.config, size)
    base, fine = layout.parts
    assert layout.map(torch.ones(layout.count, dtype=torch.bool)).all()
    for number in range(0, layout.count, 4):
        keep = torch.arange(layout.count) == number
        shown = layout.map(keep)
        rows, cols = shown.shape
        points = [((c + 0.5) / cols, (r + 0.5) / rows) for r in range(rows) for c in range(cols)]
        assert shown.flatten().tolist() == [lies(layout, keep, x, y) for x, y in points]
        if number < len(base.cells):
            assert shown.any()
    newline = torch.tensor(base.cells + fine.cells).logical_not()
    assert int(newline.sum()) == fine.rows and not layout.map(newline).any()


def test_tokens_of_a_part() -> None:
    plain, goes, stays = Part(2, 3), Part(2, 3, newline=True), Part(2, 3, newline=True, newline_stays=True)
    assert [part.grid for part in (plain, goes, stays)] == [(2, 3), (2, 4), (2, 3)]
    assert plain.cells == stays.cells == [True] * 6 and goes.cells == [True, True, True, False] * 2
    assert plain.free == [True] * 6 and goes.free == [True] * 8 and stays.free == [True, True, True, False] * 2
    layout = Layout((plain, goes, stays), ((2, 3),) * 3)
    assert layout.count == 6 + 8 + 6 and layout.places == 6 + 8 + 8
    assert layout.grids == [(2, 3), (2, 4), (2, 3)]
