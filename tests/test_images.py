"""Images: whatever mode, depth, orientation and transparency they come in, what is kept is what people see."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from glimpseprune.config import UserError
from glimpseprune.images import shown, shown_size

RAMP = np.tile(np.linspace(0, 1, 256), (4, 1))


def file(image: Image.Image, form: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    buffer.seek(0)
    return Image.open(buffer)


def levels(image: Image.Image) -> list[int]:
    return np.asarray(shown(image))[0].tolist()


@pytest.mark.parametrize(
    ("array", "form"),
    [
        ((RAMP * 65535).round().astype(np.uint16), "PNG"),
        ((RAMP * 65535).round().astype(np.uint16), "TIFF"),
        ((RAMP * 65535).round().astype(">u2"), "TIFF"),
        ((RAMP * 65535).round().astype(np.int32), "TIFF"),
        ((RAMP * 255).round().astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 255).astype(np.float32), "TIFF"),
        ((RAMP * 65535).astype(np.float32), "TIFF"),
        ((RAMP * 255).round().astype(np.uint8), "PNG"),
    ],
)
def test_grey_levels_of_any_depth(array, form):
    image = Image.fromarray(array)
    for each in (image, file(image, form)):
        assert shown(each).mode == "L"
        assert levels(each) == list(range(256))


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (RAMP.astype(np.float32) - 0.5, "mode F with values from -0.5 to 0.5: give 0 to 1 or 0 to 255 or 0 to 65535"),
        (np.full((2, 2), np.nan, np.float32), "from nan to nan"),
        (np.full((2, 2), np.inf, np.float32), "to inf"),
        (np.full((2, 2), 70000, np.int32), "mode I with values from 70000 to 70000: give 0 to 255 or 0 to 65535"),
    ],
)
def test_values_that_have_no_white_are_refused(array, said):
    with pytest.raises(UserError, match=said):
        shown(Image.fromarray(array))


def clear(mode: str) -> Image.Image:
    """Left half transparent black, right half opaque blue (or grey)."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((0, 0, 255, 255), (4, 0, 8, 4))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_what_is_transparent_is_white(mode):
    image = shown(clear(mode))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)
    blue = (0, 0, 255) if mode not in ("LA",) else (29, 29, 29)
    assert image.getpixel((7, 3)) == blue


@pytest.mark.parametrize(
    ("image", "form", "options"),
    [
        (Image.new("L", (8, 4), 7), "PNG", {"transparency": 7}),
        (Image.new("RGB", (8, 4), (1, 2, 3)), "PNG", {"transparency": (1, 2, 3)}),
        (Image.new("1", (8, 4), 0), "PNG", {"transparency": 0}),
        (Image.new("RGB", (8, 4), "red").quantize(4), "PNG", {"transparency": 0}),
        (Image.new("RGB", (8, 4), "red").quantize(4), "GIF", {"transparency": 0}),
        (Image.fromarray(np.full((4, 8), 1234, np.uint16)), "PNG", {"transparency": 1234}),
        (Image.new("RGBA", (8, 4), (0, 0, 0, 0)), "WEBP", {"lossless": True}),
    ],
)
def test_a_colour_that_means_transparent_is_white(image, form, options):
    image = shown(file(image, form, **options))
    assert np.asarray(image.convert("RGB")).min() == 255
    half = shown(Image.new("RGBA", (1, 1), (0, 0, 0, 127)))
    assert half.getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright(form, orientation):
    array = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = file(Image.fromarray(array), form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    upright = ImageOps.exif_transpose(photo).convert("RGB")
    assert shown_size(photo) == upright.size == ((16, 24) if orientation > 4 else (24, 16))
    image = shown(photo)
    assert image.tobytes() == upright.tobytes()
    again = file(image, "PNG")  # and no tag is left that would turn it once more
    assert shown(again).tobytes() == upright.tobytes()
    assert (image is photo) == (orientation == 1) or form == "TIFF"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_costs_nothing():
    photo = file(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    assert shown_size(photo) == (8, 4)
    assert shown(photo).size == (8, 4)


def test_other_modes_are_converted():
    for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"):
        white = Image.new("RGB", (8, 4), "white").convert(mode)
        image = shown(white)
        assert image.mode == ("L" if mode in "1L" else "RGB")
        assert np.asarray(image).min() >= 254
    cmyk = file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert shown(cmyk).getpixel((4, 4))[0] > 250 > 10 > shown(cmyk).getpixel((4, 4))[1]


def test_what_pillow_cannot_convert_is_refused_by_name():
    class Odd(Image.Image):  # as LAB is in older ones
        def convert(self, *_):
            raise ValueError("conversion not supported")

    odd = Odd()
    odd.im, odd._mode, odd._size = Image.core.new("LAB", (8, 4)), "LAB", (8, 4)
    with pytest.raises(UserError, match="an image of mode LAB, which cannot be converted: give it as RGB"):
        shown(odd)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_its_first_frame(form):
    frames = [Image.new("RGB", (8, 4), colour) for colour in ("red", "blue")]
    moving = file(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    assert moving.n_frames == 2
    assert shown(moving).convert("RGB").getpixel((4, 2)) == pytest.approx((255, 0, 0), abs=1)


def test_what_is_cut_off_is_refused():
    for form in ("JPEG", "PNG", "GIF", "TIFF"):
        buffer = io.BytesIO()
        Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, form)
        with pytest.raises(UserError, match="an image cannot be read"):
            shown(Image.open(io.BytesIO(buffer.getvalue()[: len(buffer.getvalue()) * 2 // 3])))
