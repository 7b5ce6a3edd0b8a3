"""From patches to what enters the vision tower

`patches` is what the first exercise makes, (patches, 768); `vision` is `vlm.parts.vision.encoder`. Multiply by
`vision.patch_embedding.weight`, put `vision.class_embedding` in front as a row of its own, and add
`vision.position_embedding`. (CLIP norms the result once more, with `layer_norm`, before its first layer; leave that out.)
"""

import numpy as np

from exercises import SCENE, expect, expect_array, model
from minivtw.model.layers import layer_norm
from minivtw.model.vision import patchify


def stub(patches, vision):
    """patches: (patches, 768). Returns (1 + patches, vision width)."""
    return patches @ vision.patch_embedding.weight  # and the class token, and the positions?


def solution(patches, vision):
    """patches: (patches, 768). Returns (1 + patches, vision width)."""
    embedded = patches @ vision.patch_embedding.weight
    return np.concatenate([vision.class_embedding[None], embedded]) + vision.position_embedding


def check(embed_patches):
    seen, vlm = {}, model()
    prompt, vision = vlm.prepare(SCENE, "What color is the star?"), vlm.parts.vision.encoder
    vlm.embed(prompt, observe=lambda name, array: seen.setdefault(name, array))
    found, expected = embed_patches(patchify(prompt.tiles[0], 16), vision), seen["vision.embeddings"]
    rows, wanted = np.shape(found)[:1], len(expected)
    expect(rows != (wanted - 1,), f"there are {wanted - 1} rows for 64 patches; the class token is missing in front")
    expect(np.shape(found) == expected.shape, f"the shape must be {expected.shape}, not {np.shape(found)}")
    is_last = np.allclose(found[-1], vision.class_embedding + vision.position_embedding[-1], atol=1e-4)
    expect(not is_last, "the class token stands at the end; it must come first")
    is_unplaced = np.allclose(found[0], vision.class_embedding, atol=1e-4)
    expect(not is_unplaced, "the position embeddings are missing: without them no patch knows where it is")
    normed = layer_norm(found, vision.pre_norm, vision.config.layer_norm_eps)
    expect_array(normed, expected, "the array, normed,", 1e-3)
    return "65 rows of 192 numbers, the class token first; normed they are the array that `--trace` calls vision.embeddings"
