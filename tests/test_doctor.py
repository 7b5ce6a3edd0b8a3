"""`minivtw.doctor`: what it says of a model is what the model is, and does, once it is loaded."""

import json

import numpy as np
import pytest

import minivtw
from minivtw import doctor, generate
from minivtw.counting import cache_bytes, vision_flops
from minivtw.model.vision import encode
from tests.doors import assert_one_line_error, run
from tests.families.conversation import picture
from tests.families.test_families import FOLDERS, NAMES
from tests.small_llava import CONFIG, random_tensors, write_folder
from tests.test_counting import Counted


def said(ran):
    """The lines of a report by their names."""
    assert ran.code == 0, ran.err
    return {line[:8].strip(): line[9:] for line in ran.out.splitlines()}


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_it_says_what_the_loaded_model_does(folder, tmp_path):
    picture(67, 40).save(tmp_path / "one.png")
    report = said(run(doctor.main, folder, tmp_path / "one.png", "--prompt", "How many?"))
    vlm = minivtw.load(folder)
    stats = vlm.answer(tmp_path / "one.png", "How many?", withdraw="off", max_new_tokens=1).stats
    visual = stats["tokens"]["visual"]
    assert f"{len(vlm.prepare(tmp_path / 'one.png', 'How many?').tiles)} tile" in report["image"]
    assert report["image"].endswith(f"{visual} visual tokens")
    assert report["tokens"].startswith(f"{visual + stats['tokens']['text']} of {vlm.config.max_positions:,}")
    assert report["cache"] == f"{cache_bytes(vlm.config, stats['cache']['tokens_per_layer']) / 1e6:.1f} MB"
    sees = len(vlm.prepare(tmp_path / "one.png", "How many?").tiles) * vision_flops(vlm.parts.vision.encoder.config)
    assert report["work"].startswith(f"{sees / 1e9:,.2f} GFLOP to see, {stats['flops']['prefill'] / 1e9:,.2f} to")


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_the_towers_operations_are_the_products_that_happen(folder):
    def counting(part):
        if isinstance(part, np.ndarray):
            return part.view(Counted)
        if isinstance(part, list):
            return [counting(one) for one in part]
        return type(part)(*map(counting, part)) if isinstance(part, tuple) else part

    tower = minivtw.load(folder).parts.vision.encoder
    for name in ("patch_embedding", "layers"):
        object.__setattr__(tower, name, counting(getattr(tower, name)))
    Counted.flops = 0
    encode(tower, np.zeros((3, tower.config.image_size, tower.config.image_size), np.float32))
    assert Counted.flops == vision_flops(tower.config)


@pytest.mark.filterwarnings("default:.*not known here")
def test_what_is_unusual_is_named_and_the_rest_is_not(tmp_path):
    folder = write_folder(tmp_path / "model", config=CONFIG)
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    ran = run(doctor.main, folder)
    assert "not known here; the family's own" in ran.out
    assert ran.out.count("\nunusual ") == 1 and ran.err == ""
    ran = run(generate.main, "How many?", "--model", folder, "--max-new-tokens", 1)
    assert ran.code == 0 and ran.err.count("\n") == 1 and ran.err.startswith("minivtw: ")


def test_it_holds_no_weight(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "model")
    monkeypatch.setattr("minivtw.checkpoints.checkpoint.Shard.read_into", None)
    assert said(run(doctor.main, folder))["weights"].endswith("stored as F32")


@pytest.mark.parametrize("number", [np.nan, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_damaged_weights_are_named(tmp_path, number, dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in random_tensors().items()}
    damaged = ["language_model.model.embed_tokens.weight", "vision_tower.vision_model.post_layernorm.bias"]
    for name in damaged:
        tensors[name].flat[-1] = number
    ran = run(doctor.main, write_folder(tmp_path / "model", tensors))
    assert ran.code == 0 and ran.err == "" and ran.out.count("not finite") == 2
    assert all(f"unusual  {name} holds numbers that are not finite" in ran.out for name in damaged)


@pytest.mark.parametrize("key, value", [("hidden_size", 17), ("num_hidden_layers", 10**9), ("rms_norm_eps", 10**400)])
def test_what_does_not_fit_is_one_line(tmp_path, key, value):
    config = json.loads(json.dumps(CONFIG))
    config["text_config"][key] = value
    ran = run(doctor.main, write_folder(tmp_path / "model", config=config))
    assert_one_line_error(ran, "must be" if value != 17 else "config says")
    assert len(ran.err) < 20_000


@pytest.mark.parametrize("wrong", [1.001, np.nan])
@pytest.mark.parametrize("rows", [1, 97])
def test_a_blas_that_multiplies_wrongly_is_named(tmp_path, monkeypatch, rows, wrong):
    """One number of one product, of a single row or of many."""
    right, folder = np.matmul, write_folder(tmp_path / "model")

    def multiply(x, weight):
        product = right(x, weight)
        product[-1, np.abs(product[-1]).argmax()] *= np.float32(wrong if len(x) == rows else 1)
        return product

    report = run(doctor.main, folder)
    assert "products are right to" in said(report)["products"] and "products are wrong" not in report.out
    monkeypatch.setattr(np, "matmul", multiply)
    report = run(doctor.main, folder)
    assert "products are WRONG by" in said(report)["products"] and doctor.product_line()[1] is False
    assert "unusual  this machine's matrix products are wrong" in report.out
