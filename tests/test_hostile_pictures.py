"""Pictures from strangers: any bytes and any EXIF, in every format that can be written here; a picture, or one line."""

import io
import logging
import os
import random
import struct
import subprocess
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from minivtw import InputError, generate
from minivtw.inputs import opening
from minivtw.inputs.images import MOST_PIXELS, RAISED
from minivtw.inputs.opening import eight_bits, on_white, open_image
from tests.doors import assert_one_line_error, bounded_memory, examples, make_world, run
from tests.families.conversation import picture

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Pillow's, of damaged notes
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]
ORIENTATION = ExifTags.Base.Orientation


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def as_bytes(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def written():
    """A small picture in every format and mode that can be written here, by format and mode."""
    Image.init()
    found = {}
    for kind in sorted(Image.SAVE.keys() - {"IM"}):  # which Pillow gives up
        for mode in ("RGB", "RGBA", "L", "P", "1", "I;16", "F"):
            try:
                image = picture(24, 16).convert("L" if mode in ("I;16", "F") else mode)
                image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
                found[f"{kind} {mode}"] = as_bytes(image, kind)
            except Exception:  # one that this format does not have
                continue
    found |= {f"TIFF {how}": as_bytes(picture(24, 16), "TIFF", compression=how) for how in TIFFS}
    found["JPEG progressive"] = as_bytes(picture(24, 16), "JPEG", progressive=True)
    found["GIF of two"] = as_bytes(picture(24, 16), "GIF", save_all=True, append_images=[picture(24, 16)])
    return found


TIFFS = ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")
WRITTEN = written()
# Numbers that headers are full of: sizes, counts and offsets, too large or negative, in either byte order.
NUMBERS = [
    number.to_bytes(width, order)
    for number in (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
    for width in (1, 2, 4)
    for order in ("little", "big")
    if number < 256**width
]


def damaged(content, seed):
    """The bytes of a picture with one to six wounds: numbers overwritten, bits flipped, pieces cut, doubled, swapped."""
    chance, content = random.Random(seed), bytearray(content)
    for _ in range(chance.randint(1, 6)):
        size = len(content)
        if not size:
            break
        # headers and what stands at the end matter most
        place = chance.choice(
            [chance.randrange(size), chance.randrange(min(size, 64)), size - 1 - chance.randrange(min(size, 40))]
        )
        kind = chance.randrange(6)
        if kind < 2:
            number = chance.choice(NUMBERS)
            content[place : place + len(number)] = number
        elif kind == 2:
            content[place] ^= 1 << chance.randrange(8)
        elif kind == 3:
            del content[place : place + chance.choice([1, 4, 50, size])]
        elif kind == 4:
            content[place:place] = content[place : place + chance.randint(1, 40)]
        else:
            content[place : place + 20] = bytes([chance.randrange(256)]) * 20
    return bytes(content)


def assert_picture_or_line(content):
    """True if the bytes are a picture. What cannot be read is said in one line that is not empty."""
    try:
        opened = open_image(io.BytesIO(content))
    except InputError as error:
        assert str(error).strip() and "\n" not in str(error).strip(), str(error)
        return False
    assert opened.mode == "RGB" and opened.width * opened.height > 0
    return True


@examples(quick=15, deep=200)
def test_any_bytes(examples, monkeypatch):
    """Of each example, one picture of every format and mode."""
    monkeypatch.setenv(RAISED, "1000000")  # room enough, and quick

    @settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow])
    @given(st.integers(0, 2**32))
    def check(seed):
        for name, content in WRITTEN.items():
            assert_picture_or_line(damaged(content, f"{name} {seed}"))

    with bounded_memory(2**29):
        check()


def test_what_can_be_written_can_be_read():
    """But for what is refused on purpose."""
    refused = {name for name, content in WRITTEN.items() if not assert_picture_or_line(content)}
    kinds = {name.split()[0] for name in refused}
    assert (
        kinds <= {*opening.NOT_READ, "PALM", "PDF", "WMF", "BUFR", "GRIB", "HDF5"} and len(WRITTEN) - len(refused) > 40
    )


TAGS = st.sampled_from(
    [0x0112, 0x010E, 0x011A, 0x011B, 0x0128, 0x0132, 0x8769, 0x8825, 0x927C, 0xA005, 0x014A, 0x02BC]
) | st.integers(0, 65535)
ENTRIES = st.tuples(
    TAGS,
    st.integers(0, 16),  # the type; those above 13 do not exist
    st.sampled_from([0, 1, 2, 3, 4, 8, 1000, 2**31, 2**32 - 1]),
    st.sampled_from([b"\0\0\0\0", b"\1\0\0\0", b"\6\0\0\0", b"\0\6\0\0", b"\x08\0\0\0", b"\xff\xff\xff\xff"])
    | st.binary(min_size=4, max_size=4),
)


@st.composite
def exif_blocks(draw):
    """An EXIF block: one directory of any entries, among them often an orientation, perhaps cut short."""
    order = draw(st.sampled_from("<>"))
    entries = draw(st.lists(ENTRIES, max_size=6))
    turn = draw(st.none() | st.integers(1, 8))
    if turn:
        entries.insert(0, (0x0112, 3, 1, struct.pack(f"{order}HH", turn, 0)))
    block = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    block += struct.pack(f"{order}H", draw(st.sampled_from([len(entries)] * 5 + [0, 1, 65535])))
    block += b"".join(struct.pack(f"{order}HHI", *head) + value for *head, value in entries)
    block += draw(st.binary(max_size=60))
    return b"Exif\0\0" + block[: draw(st.sampled_from([len(block)] * 6 + [3, 8, 12, len(block) // 2]))]


ODD_TAG = (
    b"Exif\0\0II*\0\x08\0\0\0\x02\0"
    + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    + struct.pack("<HHIf", 0x010E, 11, 1, 1.5)
)
# A resolution of a single byte, for which Pillow 11 to 13 give a whole JPEG up (an IndexError while they open it).
SHORT_RESOLUTION = (
    b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x011A, 1, 1, 0) + struct.pack("<HHII", 0x0128, 1, 1, 0)
)


@examples(quick=40, deep=1200)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO"])
def test_any_exif(examples, kind):
    """No note about a picture makes the picture worse, but for a JPEG that Pillow does not open: it is shown, turned if Pillow can read how."""
    image = picture(6, 4)
    plain = open_image(io.BytesIO(as_bytes(image, kind)))

    @settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow])
    @given(exif_blocks())
    @example(ODD_TAG)
    @example(SHORT_RESOLUTION)
    def check(block):
        content = as_bytes(image, kind, exif=block)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                turn = Image.open(io.BytesIO(content)).getexif().get(ORIENTATION)
            except UnidentifiedImageError:
                assert kind in ("JPEG", "MPO") and not assert_picture_or_line(content)
                return
            except Exception:
                turn = None
            opened = open_image(io.BytesIO(content))
        assert np.array_equal(opened, turned_by_pillow(plain, turn if isinstance(turn, int) else None))

    check()


def turned_by_pillow(image, turn):
    image = image.copy()
    if turn is not None and turn in range(1, 9):
        image.getexif()[ORIENTATION] = turn
    return ImageOps.exif_transpose(image)


def test_a_picture_whose_exif_pillow_cannot_write_again_is_turned(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(as_bytes(picture(6, 4), "JPEG", exif=ODD_TAG))
    with pytest.raises(Exception, match="encode"):  # so it is with Pillow's own
        ImageOps.exif_transpose(Image.open(tmp_path / "photo.jpg"))
    assert open_image(tmp_path / "photo.jpg").size == (4, 6)


@pytest.mark.parametrize(
    "error", [RuntimeError, NotImplementedError, AttributeError, TypeError, OverflowError, struct.error, RecursionError, MemoryError, KeyError, AssertionError, ZeroDivisionError, EOFError, UnicodeDecodeError("utf-8", b"", 0, 1, "x")]
)  # fmt: skip
def test_whatever_a_plugin_raises_is_one_line(world, monkeypatch, error):
    def plugin(*_):
        raise error

    monkeypatch.setattr(Image.Image, "load", plugin)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", plugin)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", plugin, raising=False)
    ran = run(generate.main, world.picture, "Hm?", "--model", world.model)
    assert_one_line_error(ran, f"cannot read the image {world.picture}: ")


def test_a_pipe_a_device_and_a_folder_are_not_opened(world, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # nobody writes into it
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        ran = run(generate.main, path, "Hm?", "--model", world.model)
        assert_one_line_error(ran, f"cannot read the image {path}: a folder, a pipe or a device is no image")


def test_what_would_run_a_program_or_hide_another_picture_is_refused(tmp_path):
    for kind in ("EPS", "ICO", "ICNS"):
        picture(32, 32).save(tmp_path / "picture", kind)
        with pytest.raises(InputError, match=f"of the kind {kind}, which is not read; save it as PNG"):
            open_image(tmp_path / "picture")


NOISE = """
import sys
from minivtw.cli import terminal
from minivtw.inputs.opening import open_image
def main(paths):
    for path in paths:
        try:
            open_image(path)
        except ValueError:
            pass
terminal.command(main)
"""


def test_nothing_of_pillow_and_libtiff_reaches_standard_error(tmp_path):
    """A photo with notes cut short, a TIFF whose pixels are damaged, one with more samples than can be."""
    picture(64, 48).save(tmp_path / "photo.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    for how in ("tiff_deflate", "tiff_lzw"):
        content = bytearray(as_bytes(picture(64, 48), "TIFF", compression=how))
        content[200:260] = b"\xff" * 60
        (tmp_path / f"{how}.tif").write_bytes(content)
    (tmp_path / "log.tif").write_bytes(
        as_bytes(picture(9, 9), "TIFF").replace(
            struct.pack("<HHIH", 277, 3, 1, 3), struct.pack("<HHIH", 277, 3, 1, 300)
        )
    )
    paths = sorted(map(str, tmp_path.iterdir()))
    loud = "import sys; from minivtw.inputs.opening import open_image\nfor path in sys.argv[1:]:\n try: open_image(path)\n except ValueError: pass"
    noise = subprocess.run([sys.executable, "-c", loud, *paths], capture_output=True, encoding="utf-8").stderr
    assert "EXIF" in noise and "Decode" in noise and "samples" in noise  # so it is without
    ran = subprocess.run([sys.executable, "-c", NOISE, *paths], capture_output=True, encoding="utf-8")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert logging.getLogger("PIL").getEffectiveLevel() <= logging.CRITICAL


# `most`: bytes a pixel while it is opened.
@pytest.mark.parametrize(
    "mode, most, options",
    [
        ("RGB", 13, {"format": "PNG", "compress_level": 1}),
        ("RGBA", 13, {"format": "PNG", "compress_level": 1}),
        ("RGBA", 22, {"format": "WEBP", "lossless": True, "quality": 0, "method": 0}),
    ],
)
def test_memory_is_in_proportion_to_the_pixels(tmp_path, mode, most, options):
    side = 3000
    Image.new(mode, (side, side)).save(tmp_path / "large", **options)
    with bounded_memory(most * side**2 + 2**26):
        assert open_image(tmp_path / "large").size == (side, side)


def header(side):
    """A PNG that says it is so large, and ends where its pixels begin."""
    size = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size))
    return start + struct.pack(">I", 10) + b"IDAT"


def test_a_small_file_cannot_pass_the_limit(monkeypatch):
    for side in (int(MOST_PIXELS**0.5) + 1, 9459, 9460, 20_000, 2**31 - 1):
        with (
            bounded_memory(2**26),
            pytest.raises(InputError, match=f"at most {MOST_PIXELS:,} are allowed|exceeds limit"),
        ):
            open_image(io.BytesIO(header(side)))
    monkeypatch.setenv(RAISED, "1000")
    Image.init()
    files = {
        kind: as_bytes(Image.new("RGB", (101, 10)), kind)
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF")
        if kind in Image.SAVE  # AVIF: from Pillow 11.3 on
    }
    for content in files.values():
        with pytest.raises(InputError, match="would be 101 x 10 pixels; at most 1,000 are allowed"):
            open_image(io.BytesIO(content))
    monkeypatch.setenv(RAISED, "1010")
    assert all(open_image(io.BytesIO(content)).size == (101, 10) for content in files.values())
    for odd in ("-1", "", "many", "1e9", "9" * 5000):
        monkeypatch.setenv(RAISED, odd)
        with pytest.raises(InputError, match=f"{RAISED} must be a number of pixels"):
            open_image(io.BytesIO(files["PNG"]))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(tmp_path, kind):
    levels = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)
    Image.fromarray(levels).save(tmp_path / "grey", kind)
    seen = np.asarray(open_image(tmp_path / "grey"))
    assert np.abs(seen - levels[..., None] / 257).max() <= 0.51


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_16_bits_in_every_order_and_eight_in_32(mode):
    wide = eight_bits(Image.fromarray(np.array([[0, 128, 257, 65535]], np.int32)).convert(mode))
    assert np.asarray(wide.convert("L")).tolist() == [[0, 0, 1, 255]]
    narrow = Image.fromarray(np.array([[0, 128, 255]], np.uint8)).convert("I")
    assert np.asarray(open_image(narrow))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_a_picture_on_white_is_what_pillow_composes(mode):
    image = picture(31, 23)
    image.putalpha(Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 31), np.uint8)))
    image = image.convert("LA").convert("PA") if mode == "PA" else image.convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    assert np.array_equal(on_white(image), whole)


def test_every_level_on_white_is_what_pillow_composes():
    level, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    image = Image.fromarray(np.stack([level, level, level, alpha], axis=-1))
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.array_equal(on_white(image), whole)


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_that_is_given_stays_as_it_is(turn):
    image = picture(6, 4)
    image.getexif()[ORIENTATION] = turn
    before = np.array(image)
    assert np.array_equal(open_image(image), ImageOps.exif_transpose(image))
    assert image.getexif()[ORIENTATION] == turn and np.array_equal(image, before)


def closed():
    image = Image.open(io.BytesIO(WRITTEN["PNG RGB"]))
    image.close()
    return image


@pytest.mark.parametrize(
    "source",
    [
        closed(), Image.open(io.BytesIO(WRITTEN["PNG RGB"][:100])), Image.new("La", (4, 4)), Image.new("RGB", (0, 4)),
        io.BytesIO(b"junk"), io.BytesIO(), io.StringIO("text"), np.zeros((4, 4, 3), np.uint8), None, 5, b"a.png", {},
        object(), "a\0b", "", "\udcff", "x" * 5000, lambda: 0, type("Read", (), {"read": None})(),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_one_error(source):
    with pytest.raises(InputError, match="."):
        open_image(source)


def test_streams_and_paths_of_any_kind(tmp_path):
    (tmp_path / "a.png").write_bytes(WRITTEN["PNG RGB"])
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), io.BytesIO(WRITTEN["PNG RGB"]), picture(24, 16)):
        assert np.array_equal(open_image(source), picture(24, 16))


def test_pictures_opened_by_threads_leave_the_filters_of_warnings(tmp_path):
    picture(64, 48).save(tmp_path / "a.png")
    before, opened = list(warnings.filters), []
    work = lambda: opened.extend(open_image(tmp_path / "a.png").size for _ in range(100))
    threads = [threading.Thread(target=work) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters == before and len(opened) == 400
