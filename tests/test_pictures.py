"""Pictures show what was kept bright, what was dropped dark, and the boxes."""

import numpy as np
import torch
from PIL import Image

from glimpseprune.pictures import DIM, SIDE, grid, overlay, panel
from glimpseprune.types import Sample

WHITE = Image.new("RGB", (56, 28), "white")


def test_overlay_dims_what_was_dropped():
    pixels = np.asarray(overlay(WHITE, torch.tensor([[True, False]])))
    assert pixels.shape == (SIDE // 2, SIDE, 3)
    assert (pixels[:, : SIDE // 2] == 255).all()
    assert np.allclose(pixels[:, SIDE // 2 :], 255 * DIM, atol=2)


def test_panel_and_grid_hold_every_image():
    sample = Sample("k", "q?", ("a",), [WHITE, WHITE], boxes=[[(0, 0, 28, 28)], []])
    picture = panel(sample, [torch.zeros(1, 2, dtype=torch.bool)] * 2, ["question", "answer"])
    assert picture.width == 2 * SIDE
    assert tuple(picture.getpixel((0, 0))) == (255, 255, 255)  # the box outline, on a dropped token
    assert max(picture.getpixel((SIDE + 5, 5))) < 80
    page = grid([picture] * 5, columns=4)
    assert page.width >= 4 * picture.width and page.height >= 2 * picture.height


def drawn(image: Image.Image, box: tuple[float, ...]) -> np.ndarray:
    sample = Sample("k", "q?", ("a",), [image], boxes=[[box]])
    picture = np.asarray(panel(sample, [torch.zeros(1, 1, dtype=torch.bool)], []))[:-6]  # what lies below
    rows, cols = (picture.min(-1) == 255).nonzero()
    return np.array([cols.min(), rows.min(), cols.max(), rows.max()])


def test_boxes_thinner_than_a_pixel_are_drawn_where_they_lie():
    black = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    for box, pixels in {
        (100, 101, 300, 102): (50, 50, 149, 50),
        (100, 101, 300, 101): (50, 50, 149, 50),
        (8, 8, 8, 8): (4, 4, 4, 4),
        (2 * SIDE,) * 4: (SIDE - 1,) * 4,
    }.items():
        off = drawn(black, box) - pixels
        assert off[:3].tolist() == [0, 0, 0]
        assert off[3] in (0, 1)  # Pillow's thinnest outline may have two rows
    assert drawn(black, (100, 100, 300, 200)).tolist() == [50, 50, 149, 99]


def test_boxes_are_those_of_the_picture_as_it_is_shown():
    photo = Image.new("RGB", (SIDE // 2, SIDE))
    photo.getexif()[0x0112] = 6
    assert drawn(photo, (0, 0, SIDE, 10)).tolist() == [0, 0, SIDE - 1, 9]


def test_any_text_can_be_written():
    sample = Sample("k", "q?", ("a",), [WHITE])
    keep = [torch.zeros(1, 2, dtype=torch.bool)]
    lines = ["\ud800 \x1b[31m \0 \n\r\n \u202e 几个 👩\u200d👧 " * 1000, "x" * 10**6]
    assert panel(sample, keep, lines).size == panel(sample, keep, ["a", "b"]).size
