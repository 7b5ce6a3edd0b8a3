"""Opening pictures safely. That their pixel values equal those of transformers is shown in test_parity.py."""

import pathlib

import numpy as np
import PIL
import pytest
from PIL import Image

import minivtw
from minivtw import InputError
from minivtw.checkpoints.clip import ClipPixels
from minivtw.inputs.images import Levels, resized
from minivtw.inputs.opening import open_image

CLIP = ClipPixels(16, None, 3, (16, 16), Levels(1 / 255, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "F", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.new(mode, (5, 3))
    opened = open_image(image)
    assert opened.mode == "RGB" and opened.size == (5, 3)


def test_exif_turns_the_picture_upright(tmp_path):
    image = Image.new("RGB", (6, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = open_image(tmp_path / "turned.png")
    assert upright.size == (2, 6)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


def test_of_an_animation_the_first_frame_is_seen(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "two.gif").getpixel((0, 0))[0] > 200


def test_a_path_and_an_open_image_are_the_same(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8))
    image.save(tmp_path / "some.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "some.png")), np.asarray(open_image(image)))


@pytest.mark.parametrize(
    "content, words",
    [(b"", "is empty"), (b"hello", "not an image"), (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "not an image|cannot read")],
)
def test_what_is_no_picture_is_an_input_error(tmp_path, content, words):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        open_image(path)


def test_a_cut_off_picture_is_an_input_error(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    for keep in (200, 5000):
        (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:keep])
        with pytest.raises(InputError, match="cut.png"):
            open_image(tmp_path / "cut.png")


def test_missing_files_and_folders_are_input_errors(tmp_path):
    for path in (tmp_path / "nowhere.png", tmp_path):
        with pytest.raises(InputError, match="cannot read the image"):
            open_image(path)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_read(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "enormous.png")
    with pytest.raises(InputError, match="exceeds limit|at most"):
        open_image(tmp_path / "enormous.png")


def test_a_thread_of_a_picture_cannot_be_blown_up(tmp_path):
    sliver = Image.new("RGB", (1, 60_000))
    with pytest.raises(InputError, match="resized image would be"):
        ClipPixels(2000, None, 3, None, Levels(None))(sliver)


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (3, 200), (200, 3), (17, 16), (640, 480)])
def test_any_size_becomes_the_size_of_the_tower(size):
    pixels = CLIP(Image.new("RGB", size, (255, 0, 127)))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == np.float32
    assert np.allclose(pixels[:, 8, 8], (np.array([255, 0, 127]) / 255 - 0.5) / 0.25, atol=1e-6)


def test_the_crop_is_the_middle_and_black_beyond_the_edge():
    image = Image.fromarray(np.arange(5 * 3, dtype=np.uint8).reshape(3, 5)).convert("RGB")
    crop = lambda *size: ClipPixels(None, None, 3, size, Levels(None))(image)[0].tolist()
    assert crop(1, 3) == [[6, 7, 8]]
    assert crop(5, 5)[0] == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("width, height", [(30, 300), (300, 30), (64, 61), (5, 9)])
def test_an_image_is_resized_the_width_first_whatever_pillow_does(width, height, resample):
    """Pillow before 13 always did, later ones only where the height does not shrink by much more than the width."""
    image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))
    ours, pillows = (np.asarray(it) for it in (resized(image, (16, 20), resample), image.resize((16, 20), resample)))
    height_first = np.asarray(image.resize((width, 20), resample).resize((16, 20), resample))
    assert np.array_equal(pillows, ours) or np.array_equal(pillows, height_first)
    by_hand = np.asarray(image.resize((16, height), resample).resize((16, 20), resample))
    assert np.array_equal(ours, by_hand)
    if int(PIL.__version__.split(".")[0]) < 13:
        assert np.array_equal(pillows, ours)


def test_an_image_and_a_question_in_the_wrong_order_are_told_apart():
    vlm, image, question = minivtw.load(), "docs/pictures/scene.png", "What color is the star?"
    for ask in (lambda: vlm.answer(question, image), lambda: minivtw.Chat(vlm).ask(image, question)):
        with pytest.raises(InputError, match=r"is a file where the question belongs: answer\(image, prompt\), but ask"):
            ask()
    with pytest.raises(InputError, match="is a file where the question belongs"):
        vlm.answer(question, pathlib.Path(image))
