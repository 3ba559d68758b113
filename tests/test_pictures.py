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
