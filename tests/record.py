"""Write tests/golden/llava, tiny and shelf.json: what others than minivtw compute, for tests that run without them.

    python tests/record.py            record all
    python tests/record.py llava      small random LLaVA models, built here, and their recordings
    python tests/record.py tiny       the embedded model; to be done whenever its weights or its tokenizer change
    python tests/record.py shelf      who is kept by the methods of the shelf, by `shelf_reference.py`

Needs the extra `reference`. Each folder holds `meta.json` (prompts, token ids) and `expected.safetensors` (arrays named
CASE.NAME, with the names that minivtw's `observe` uses).
"""

import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from PIL import Image
from reference import RECORDED, Reference, build, write_json
from safetensors.numpy import save_file
from shelf_reference import RULES, carry

TESTS = pathlib.Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))

from tests import shelf_models  # noqa: E402

GOLDEN = TESTS / "golden"
EMBEDDED = TESTS.parent / "weights" / "minivtw-tiny"
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}
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


def record_shelf():
    """Who is kept in every layer, and some of the next token's logits, by method, tower and seed."""
    recorded = {"recorded_with": VERSIONS}
    for tower in shelf_models.TOWERS:
        with tempfile.TemporaryDirectory() as folder:
            reference = Reference.__new__(Reference)  # without a processor: the pixels are random numbers
            load = transformers.LlavaForConditionalGeneration.from_pretrained
            path = shelf_models.write(tower, pathlib.Path(folder))
            reference.model = load(path, dtype=torch.float32, attn_implementation="eager").eval()
        recorded[tower] = {
            text: [kept_by(reference, text, tower, seed) for seed in shelf_models.SEEDS]
            for text in shelf_models.METHODS
        }
    text = json.dumps(recorded, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: json.dumps(json.loads(numbers[0])), text)  # a line a layer
    (GOLDEN / "shelf.json").write_text(text + "\n", encoding="utf-8")


def kept_by(reference, text, tower, seed):
    token_ids, pixels = shelf_models.question(seed)
    arrays = reference.prefill({"input_ids": torch.tensor(token_ids)[None], "pixel_values": torch.tensor(pixels)})
    is_visual, random = token_ids == shelf_models.IMAGE_TOKEN, np.random.default_rng(0)
    runs = []
    for noise in (0, 1e-5):  # ten times what an other order of sums makes, or more: it must change nobody's place
        arrays = {name: array * (1 + noise * random.standard_normal(array.shape)) for name, array in arrays.items()}
        arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
        known = dict(
            visual=shelf_models.VISUAL, used=2, class_token=tower == "clip", tower=reference.model.model.vision_tower
        )
        rule = RULES[text.split(":")[0]](SimpleNamespace(arrays=arrays, **known))
        runs.append(carry(reference, arrays["decoder.embeddings"], is_visual, *rule))
    assert runs[0][0] == runs[1][0], f"{text}, {tower}, seed {seed}: two scores are nearly equal; choose another seed"
    kept, logits = runs[0]
    return {"kept": kept, "logits": [round(float(one), 5) for one in logits[:8]]}


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
    write_json(folder / "meta.json", {"cases": [meta for meta, _ in recordings], "recorded_with": VERSIONS, **more})
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
    for what in sys.argv[1:] or ("llava", "tiny", "shelf"):
        {"llava": record_llava, "tiny": record_tiny, "shelf": record_shelf}[what]()
