"""Decoding: the native decoder, whole and cropped, beside simplejpeg; other formats by Pillow."""

import io

import numpy as np
import pytest
import simplejpeg
from pictures import exif_rotated, jpeg, waves
from PIL import Image, ImageOps

from bagssl_fast import _C
from bagssl_fast.data import MAX_PIXELS, open_source
from bagssl_fast.data.decoding import decode_image

NO_LIMIT = 10**9
needs_native = pytest.mark.skipif(not _C.HAS_JPEG, reason="built without libjpeg-turbo")


def pillow_rgb(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@needs_native
def test_native_decode_equals_simplejpeg_bitwise(imagenet_tar):
    source = open_source(imagenet_tar)
    for i in range(0, len(source), 8):
        file = source.read(i)
        expected = simplejpeg.decode_jpeg(file, colorspace="RGB")
        np.testing.assert_array_equal(_C.decode(file, None, NO_LIMIT), expected, source.name(i))


@needs_native
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
def test_cropped_decode_equals_the_crop_of_a_full_one(subsampling):
    rng = np.random.default_rng(0)
    for trial in range(8):
        height, width = rng.integers(1, 260, 2)
        pixels = waves(height, width, trial)
        if subsampling == "Gray":
            file = jpeg(pixels[..., 0])
        else:
            file = simplejpeg.encode_jpeg(pixels, 90, colorsubsampling=subsampling)
        check_crops(file, height, width, rng)


@needs_native
@pytest.mark.parametrize(
    "options",
    [{"progressive": True}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}],
    ids=str,
)
def test_cropped_decode_of_other_codings(options):
    rng = np.random.default_rng(1)
    for subsampling in (0, 1, 2):
        height, width = rng.integers(60, 260, 2)
        file = jpeg(waves(height, width), subsampling=subsampling, **options)
        check_crops(file, height, width, rng)


def check_crops(file, height, width, rng, count=24):
    whole = simplejpeg.decode_jpeg(file, colorspace="RGB")
    for _ in range(count):
        h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        part = _C.decode(file, None, NO_LIMIT, (top, left, h, w))
        np.testing.assert_array_equal(part, whole[top : top + h, left : left + w])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured_whole_and_cropped(orientation):
    file = exif_rotated(waves(90, 130), orientation)
    upright = pillow_rgb(file)
    np.testing.assert_array_equal(_C.decode(file, decode_image, NO_LIMIT), upright)
    box = (11, 37, 40, 29)
    np.testing.assert_array_equal(
        _C.decode(file, decode_image, NO_LIMIT, box), upright[11:51, 37:66]
    )


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "LA"])
def test_colors_are_those_of_pillow(mode):
    image = Image.fromarray(waves(50, 70)).convert(mode)
    for kind in ["JPEG"] if mode in ("L", "CMYK") else ["PNG"]:
        out = io.BytesIO()
        image.save(out, kind)
        decoded = _C.decode(out.getvalue(), decode_image, NO_LIMIT)
        np.testing.assert_array_equal(decoded, pillow_rgb(out.getvalue()))


def test_sixteen_bit_gray_is_scaled_not_clipped():
    out = io.BytesIO()
    Image.fromarray(np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)).save(out, "PNG")
    decoded = _C.decode(out.getvalue(), decode_image, NO_LIMIT)
    np.testing.assert_array_equal(decoded[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_twelve_bits_in_a_sixteen_bit_file_are_named(kind):
    """Such images train nearly black; the scale of one must not depend on its own pixels."""
    out = io.BytesIO()
    Image.fromarray(np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)).save(out, kind)
    with pytest.warns(UserWarning, match="12 bits or less"):
        decoded = decode_image(out.getvalue())
    np.testing.assert_array_equal(decoded[..., 0].ravel(), np.arange(0, 4096, 16) // 256)


@needs_native
def test_scaled_decode_is_pillows_draft_mode():
    file = jpeg(waves(120, 160))
    draft = Image.open(io.BytesIO(file))
    draft.draft("RGB", (80, 60))
    half = _C.decode(file, None, NO_LIMIT, None, 2)
    np.testing.assert_array_equal(half, np.asarray(draft))


@needs_native
def test_missing_end_marker_alone_is_no_truncation():
    file = jpeg(waves(64, 64))
    np.testing.assert_array_equal(_C.decode(file[:-2], None, NO_LIMIT), pillow_rgb(file))


@needs_native
@pytest.mark.parametrize("progressive", [False, True])
def test_truncation_is_seen_even_below_the_crop(progressive):
    file = jpeg(waves(200, 200), progressive=progressive)[:-900]
    with pytest.raises(RuntimeError, match="truncated"):
        _C.decode(file, None, NO_LIMIT, (0, 0, 20, 20))


@needs_native
def test_fuzzed_jpegs_raise_or_decode():
    rng = np.random.default_rng(0)
    clean = {p: jpeg(waves(60, 80), progressive=p, subsampling=2) for p in (False, True)}
    for trial in range(300):
        data = bytearray(clean[trial % 2 == 1])
        for place in rng.integers(2, len(data), 3):
            data[place] = rng.integers(0, 256)
        try:
            size = _C.decode(bytes(data), None, 10**6).shape
            box = (size[0] // 3, size[1] // 3, max(1, size[0] // 2), max(1, size[1] // 2))
            _C.decode(bytes(data), None, 10**6, box)
        except RuntimeError:
            pass


def test_threads_decode_what_one_decodes():
    files = [jpeg(waves(30 + i, 40)) for i in range(20)]
    pixels = sum((30 + i) * 40 for i in range(20))
    for threads in (1, 3):
        assert _C.decode_many(files, threads, decode_image, MAX_PIXELS) == pixels
    with pytest.raises(RuntimeError, match="truncated"):
        _C.decode_many([*files, files[0][:-200]], 3, decode_image, MAX_PIXELS)
