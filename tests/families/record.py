"""Write tests/golden/families: what transformers, and PyTorch for nanoVLM, compute, for tests that run without them.

    python -m tests.families.record [NAME ...]

Needs the extra `reference`. Each model's folder gains `meta.json` (prompts, token ids) and `expected.safetensors`
(arrays, named CASE.NAME with the names that minivtw's `observe` uses).
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import torch
from safetensors.numpy import save_file

from tests.reference import write_json

from . import nanovlm, reference
from .conversation import SIZES, picture

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "families"
GREEDY_TOKENS = 16
SMALLEST_LEAD = 1e-3  # of a greedy token before its rival, in logits: less could change with the order of a sum
ONE = [(67, 40)]
TWO = [(64, 48), (20, 90)]
TURNS = ["What color is the star?", "It is red.", "And the ring?"]


def record(model, name, sizes, question, arrays=True):
    """One prompt: (its entry in meta.json, its arrays)."""
    token_ids, tiles = model.inputs([picture(*size) for size in sizes], question)
    meta = {"name": name, "sizes": sizes, "question": question, "token_ids": token_ids.tolist()}
    found = {key: thin(key, array) for key, array in model.prefill(token_ids, tiles).items()} if arrays else {}
    for layer in (None, 2):
        said, steps = reference.greedy(model, token_ids, tiles, GREEDY_TOKENS, layer)
        first, second = np.sort(steps, axis=-1)[:, -2:].T[::-1]
        assert (first - second).min() > SMALLEST_LEAD, f"{name}: two tokens are nearly equal; choose another seed"
        assert len(said) == GREEDY_TOKENS and len(set(said)) > 3, f"{name} says {said}; choose another seed"
        meta[f"greedy_ids_{layer}"], found[f"steps_{layer}"] = said, steps
    return meta, {f"{name}.{key}": np.ascontiguousarray(array) for key, array in found.items()}


def thin(key, array):
    """Of long prompts, the last query's attention: the rest would be most of the recording."""
    return array[..., -1:, :] if key.endswith("attention") and array.size > 20_000 else array


def main(names):
    """Record the folders of these names, or all of them."""
    folders = [(variant.name, reference.build, reference.Reference, variant) for variant in reference.RECORDED]
    folders += [(variant.name, nanovlm.build, nanovlm.Reference, variant) for variant in nanovlm.RECORDED]
    for name, build, open_model, variant in folders:
        if names and name not in names:
            continue
        folder = GOLDEN / name
        shutil.rmtree(folder, ignore_errors=True)
        build(variant, folder)
        model = open_model(folder)
        recordings = [record(model, "one", ONE, "What color is the star?")]
        recordings.append(record(model, "two", TWO, "Is the ring left of it?", arrays=False))
        conversation = None
        if variant is not nanovlm.FIRST:
            token_ids, _ = model.inputs([picture(*size) for size in TWO], *TURNS)
            conversation = {"sizes": TWO, "turns": TURNS, "token_ids": token_ids.tolist()}
        prompts, pixels = [], {}
        for size in SIZES:
            token_ids, tiles = model.inputs([picture(*size)], "How many?")
            prompts.append({"size": size, "token_ids": token_ids.tolist()})
            pixels["x".join(map(str, size))] = model.levels(tiles)
        cases = [meta for meta, _ in recordings]
        write_json(folder / "meta.json", {"cases": cases, "prompts": prompts, "conversation": conversation})
        save_file(
            {key: array for _, arrays in recordings for key, array in arrays.items()}, folder / "expected.safetensors"
        )
        np.savez_compressed(folder / "pixels.npz", **pixels)
        for path in folder.iterdir():
            path.chmod(0o644)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{name}: {size / 1000:.0f} kB")
    pairs = [(count, count) for count in (1, 2, 3, 4, 8, 14, 16, 24, 26, 27, 32)]
    pairs += [(6, 4), (3, 7), (26, 27), (32, 14), (27, 32), (16, 32)]
    positions = [
        {"patches": patches, "places": places, "rows": reference.fractional_places(patches, places)}
        for patches, places in pairs
    ]
    (GOLDEN / "positions.json").write_text(json.dumps(positions) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
