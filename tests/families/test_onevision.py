"""LLaVA-OneVision without torch: a recorded LLaVA with the few things more that its successor has."""

import json
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

from minivtw import doctor
from tests.doors import run

from .test_families import GOLDEN

LLAVA = GOLDEN.parent / "llava" / "siglip-llama"
SIDE = 24  # pixels of a tile, 3 x 3 patches


def write_onevision(folder, **settings):
    """A model folder; pictures of up to 3 x 3 tiles. settings: of its image processor."""
    folder.mkdir()
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LLAVA / name, folder)
    tensors = {name: tensor for path in LLAVA.glob("model-*") for name, tensor in load_file(path).items()}
    tensors["image_newline"] = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    pixels = json.loads((LLAVA / "preprocessor_config.json").read_text(encoding="utf-8"))
    pixels |= {"image_grid_pinpoints": [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]}
    config = json.loads((LLAVA / "config.json").read_text(encoding="utf-8")) | {"model_type": "llava_onevision"}
    for name, content in (("config.json", config), ("preprocessor_config.json", pixels | settings)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_doctor_names_the_settings_that_change_nothing_and_no_other(tmp_path):
    folder = write_onevision(tmp_path / "model", do_center_crop=False, brand_new=3)
    ran = run(doctor.main, folder)
    assert ran.code == 0 and "preprocessor_config.json.brand_new is a setting that is not known here" in ran.out
    assert ran.out.count("is a setting that is not known here") == 1
