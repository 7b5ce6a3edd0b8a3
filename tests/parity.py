"""What it means that minivtw computes the same as the reference; shared by the recorded and the live comparisons."""

from collections import defaultdict

import numpy as np

TOLERANCE = 2e-5  # of the largest value of an array, at every layer
PIXEL_TOLERANCE = 1e-3
GREEDY_TOKENS = 16


def relative_error(ours, expected):
    """Largest difference as a share of the largest expected value. Shapes must be equal."""
    assert ours.shape == expected.shape, f"shape {ours.shape} where {expected.shape} is expected"
    assert np.isfinite(ours).all()
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def observe(vlm, images, question, withdraw=None):
    """Answer greedily. Returns the `Result`, each array of the prefill by its name, and each token's logits."""
    seen = defaultdict(list)
    show = lambda name, array: seen[name].append(array.copy())
    result = vlm.answer(images, question, withdraw=withdraw, max_new_tokens=GREEDY_TOKENS, observe=show)
    arrays = {
        # The tower is seen once a tile; the decoder once for the prompt, then once a token.
        name: np.stack(shown) if name.startswith("vision.") and name != "vision.pixels" else shown[0]
        for name, shown in seen.items()
    }
    return result, arrays, np.stack(seen["decoder.logits"])  # (ids, vocabulary)


def compare_layers(ours, expected):
    """Our arrays, in the order in which they were computed, against the expected ones of the same names.

    Returns the relative errors by name (of pixels, the absolute one); fails at the first that is too large.
    """
    assert ours.keys() == expected.keys()
    errors = {}
    for name, array in ours.items():
        if name == "vision.pixels":
            assert array.shape == expected[name].shape
            errors[name] = float(np.abs(array - expected[name]).max())
            assert errors[name] <= PIXEL_TOLERANCE, f"{name} is off by {errors[name]:.2g}"
        else:
            errors[name] = relative_error(array, expected[name])
            assert errors[name] < TOLERANCE, f"{name} has a relative error of {errors[name]:.2g}"
    return errors


def stage(name):
    """The part of the model that an observed array belongs to: `decoder.layers.3.hidden` -> `decoder hidden`."""
    parts = name.split(".")
    return f"{parts[0]} {parts[-1]}"
