"""No picture becomes more tiles, pixels or tokens than are stated, whatever its shape and whatever a folder asks for."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import minivtw
from minivtw import InputError, generate
from minivtw.checkpoints.parts import MOST_TILES
from minivtw.inputs.images import RAISED
from tests.doors import assert_one_line_error, bounded_memory, copied, examples, run
from tests.small_llava import write_onevision

from .conversation import picture
from .test_families import FOLDERS, GOLDEN

CLIP = GOLDEN.parent / "llava" / "clip-plain"  # 512 positions, of which an image takes 9


def unresized(folder, **settings):
    """An Idefics3 folder whose pictures are cut as they are."""
    copied(GOLDEN / "idefics3-tiles", folder, ignore=shutil.ignore_patterns("expected*", "meta*"))
    path = folder / "preprocessor_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"do_resize": False}
    path.write_text(json.dumps(content | settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("size", [(1_000_000, 1), (1, 1_000_000), (3000, 2000)])
def test_a_picture_that_is_not_resized_has_no_more_tiles_than_are_stated(tmp_path, size):
    folder, path = unresized(tmp_path / "model"), tmp_path / "picture.png"
    Image.new("1", size).save(path)
    assert path.stat().st_size < 20_000
    width, height = (-(-side // 32) for side in size)
    with bounded_memory(2**29):
        ran = run(generate.main, path, "What?", "--model", folder)
        assert_one_line_error(ran, f"the prompt has {width * height + 1:,} tiles; at most {MOST_TILES:,} are cut")
        assert len(minivtw.load(folder, max_tiles=7).prepare(Image.new("RGB", size), "What?").tiles) <= 7


def test_tiles_have_no_more_pixels_than_a_picture_may_have(tmp_path, monkeypatch):
    vlm = minivtw.load(unresized(tmp_path / "model"))
    monkeypatch.setenv(RAISED, str(32 * 32 * 5))
    assert len(vlm.prepare(picture(64, 64), "What?").tiles) == 5
    with pytest.raises(InputError, match="the column of all tiles would be 32 x 320 pixels; at most 5,120 are allowed"):
        vlm.prepare(picture(65, 64), "What?")
    with pytest.raises(InputError, match="would be 32 x 192 pixels"):
        vlm.prepare([picture(64, 64), picture(9, 9)], "What?")


def test_a_grid_of_very_many_tiles_is_refused(tmp_path):
    folder = write_onevision(tmp_path / "model", tiles=([170], [170]))
    with bounded_memory(2**28), pytest.raises(InputError, match=f"has 28,901 tiles; at most {MOST_TILES:,} are cut"):
        minivtw.load(folder).prepare(picture(9, 9), "What?")


def test_tokens_beyond_the_positions_are_refused_before_a_tile_is_made(monkeypatch):
    vlm = minivtw.load(CLIP)
    assert vlm.prepare([picture(9, 9)] * 56, "What?").is_visual.sum() == 504
    monkeypatch.setattr("minivtw.checkpoints.clip.ClipPixels.__call__", None)
    with pytest.raises(InputError, match="the prompt has 513 visual tokens; the model has 512 positions"):
        vlm.prepare([picture(9, 9)] * 57, "What?")


@examples(quick=15, deep=400)
def test_what_is_planned_is_what_is_made(examples, tmp_path_factory):
    """In every family: as many tiles and visual tokens, of the tower's size; all images have their text."""
    folder = tmp_path_factory.mktemp("families")
    models = [minivtw.load(each) for each in (*FOLDERS, CLIP, write_onevision(folder / "onevision"))]
    sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))

    @settings(max_examples=examples)
    @given(st.lists(sizes, min_size=1, max_size=3), st.none() | st.integers(1, 9))
    def check(sizes, most_tiles):
        for vlm in models:
            vlm.max_tiles = most_tiles
            try:
                prompt = vlm.prepare([picture(*size) for size in sizes], "What?")
            except InputError as error:
                assert f"the model has {vlm.config.max_positions} positions" in str(error)
                continue
            side = vlm.parts.vision.encoder.config.image_size
            assert prompt.tiles.shape[1:] == (3, side, side) and prompt.tiles.dtype == np.float32
            assert np.isfinite(prompt.tiles).all() and len(prompt.tiles) <= len(sizes) * (most_tiles or 99)
            assert vlm.embed(prompt).hidden.shape == (len(prompt.token_ids), vlm.config.width)

    check()
