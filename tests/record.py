"""Write tests/golden/llava and tests/golden/tiny: what transformers computes, for tests that run without it.

    python tests/record.py            record both
    python tests/record.py llava      small random LLaVA models, built here, and their recordings
    python tests/record.py tiny       the embedded model; to be done whenever its weights or its tokenizer change

Needs the extra `reference`. Each folder holds `meta.json` (prompts, token ids) and `expected.safetensors` (arrays named
CASE.NAME, with the names that minivtw's `observe` uses).
"""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import torch
import transformers
from PIL import Image
from reference import RECORDED, Reference, build, write_json
from safetensors.numpy import save_file

TESTS = pathlib.Path(__file__).parent
GOLDEN = TESTS / "golden"
EMBEDDED = TESTS.parent / "weights" / "minivtw-tiny"
GREEDY_TOKENS = 16
# A greedy token whose rival is closer than this (in logits) could change with the order of a sum.
SMALLEST_LEAD = 1e-3
ASKED = {  # of these random models; of the others, one question about the wide picture
    "clip-qwen2": (["wide.png", "palette.png"], "Is the ring left of it?"),
    "siglip-llama": (["palette.png"], "How many?"),
}
SCENES = (7, 31, 2025)  # seeds of evaluation scenes
QUESTIONS = ("How many objects are there?", "What color is the star?", "Which object is the largest?")


def record_llava():
    pictures = GOLDEN / "llava" / "pictures"
    shutil.rmtree(GOLDEN / "llava", ignore_errors=True)
    pictures.mkdir(parents=True)
    draw_pictures(pictures)
    for variant in RECORDED:
        folder = GOLDEN / "llava" / variant.name
        build(variant, folder)
        reference = Reference(folder)
        images, question = ASKED.get(variant.name, (["wide.png"], "What color is the star?"))
        meta, arrays = record(reference, "question", [pictures / image for image in images], question)
        says_much = len(meta["greedy_ids"]) == GREEDY_TOKENS and len(set(meta["greedy_ids"])) > 3
        assert says_much, f"{variant.name} says {meta['text']!r}: choose another seed"
        write(folder, [(meta, arrays)])


def record_tiny():
    folder = GOLDEN / "tiny"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reference = Reference(EMBEDDED)
    recordings = []
    for seed, question in zip(SCENES, QUESTIONS, strict=True):
        picture = folder / f"scene-{seed}.png"
        recipe = EMBEDDED.parent / "recipe" / "scenes.py"
        subprocess.run([sys.executable, recipe, "--seed", str(seed), picture], check=True, stdout=subprocess.DEVNULL)
        meta, arrays = record(reference, f"scene-{seed}", [picture], question)
        if seed != SCENES[0]:  # every layer of one picture; of the others the ends of both stacks
            layers = len(reference.model.model.language_model.layers)
            kept = ("vision.features", f"decoder.layers.{layers - 1}.hidden", "decoder.logits", "steps")
            arrays = {name: array for name, array in arrays.items() if name.partition(".")[2] in kept}
        recordings.append((meta, arrays))
    write(folder, recordings, model_sha256=fingerprint(EMBEDDED))


def record(reference, name, images, question):
    """One prompt: (its entry in meta.json, its arrays)."""
    inputs = reference.inputs(images, question)
    arrays = reference.prefill(inputs)
    greedy_ids, step_logits, text = reference.greedy(inputs, GREEDY_TOKENS)
    first, second = np.sort(step_logits, axis=-1)[:, -2:].T[::-1]
    assert (first - second).min() > SMALLEST_LEAD, f"{name}: two tokens are nearly equal; ask something else"
    meta = {
        "name": name,
        "images": [image.name for image in images],
        "question": question,
        "token_ids": inputs["input_ids"][0].tolist(),
        "greedy_ids": greedy_ids,
        "text": text,
    }
    arrays = {f"{name}.{key}": np.ascontiguousarray(thin(key, array)) for key, array in arrays.items()}
    return meta, {**arrays, f"{name}.steps": step_logits}


def thin(key, array):
    """Of long prompts, only the last query's attention is kept: the rest would be most of the recording."""
    return array[..., -1:, :] if key.endswith("attention") and array.size > 20_000 else array


def fingerprint(folder):
    """SHA-256 of everything that decides what a model computes."""
    names = ("model.safetensors", "tokenizer.json", "config.json", "preprocessor_config.json")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def write(folder, recordings, **more):
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(folder / "meta.json", {"cases": [meta for meta, _ in recordings], "recorded_with": versions, **more})
    expected = {key: array for _, arrays in recordings for key, array in arrays.items()}
    save_file(expected, folder / "expected.safetensors")
    for path in folder.iterdir():
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder.relative_to(TESTS)}: {size / 1000:.0f} kB", json.dumps([meta["text"] for meta, _ in recordings]))


def draw_pictures(folder):
    """Small pictures with edges, gradients and noise."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:40, :67]
    wide = np.stack([rows * 6, columns * 3, 255 * ((rows - 20) ** 2 + (columns - 40) ** 2 < 150)], -1)
    wide = np.clip(wide + random.integers(-20, 20, wide.shape), 0, 255).astype(np.uint8)  # (height, width, 3)
    Image.fromarray(wide).save(folder / "wide.png")
    Image.fromarray(wide[:, :21]).quantize(12).save(folder / "palette.png")


if __name__ == "__main__":
    for what in sys.argv[1:] or ("llava", "tiny"):
        {"llava": record_llava, "tiny": record_tiny}[what]()
