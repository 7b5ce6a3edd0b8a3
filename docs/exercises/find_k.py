"""Find K by the criterion

For one question about one image: the first layer K for which the next token's divergence, `divergence(withdrawn, full)`,
is at most `eta`. `full` are the logits of the whole model, `withdrawn` those with `withdraw(K)`. The prompt is embedded
once; every candidate gets an empty cache of its own.
"""

from exercises import expect, model
from minivtw.inputs.questions import read_questions
from minivtw.methods import withdraw
from minivtw.model.cache import KVCache
from minivtw.search import divergence, kl_curve
from minivtw.search.layer import first_at_most


def stub(vlm, image, question, eta=0.003):
    """Returns the first layer K from 0 on whose divergence is at most eta, or None if there is none."""
    prompt = vlm.embed(vlm.prepare(image, question))
    full, _ = vlm.advance(prompt, KVCache(vlm.config), None)
    for layer in range(vlm.config.layers):
        withdrawn = full  # the logits with the image withdrawn before this layer
        if divergence(withdrawn, full) <= eta:
            return layer


def solution(vlm, image, question, eta=0.003):
    """Returns the first layer K from 0 on whose divergence is at most eta, or None if there is none."""
    prompt = vlm.embed(vlm.prepare(image, question))
    full, _ = vlm.advance(prompt, KVCache(vlm.config), None)
    for layer in range(vlm.config.layers):
        withdrawn, _ = vlm.advance(prompt, KVCache(vlm.config), withdraw(layer))
        if divergence(withdrawn, full) <= eta:
            return layer


def check(find_k):
    vlm, found = model(), []
    for sample in read_questions(vlm.folder / "samples", ("image", "question"))[:2]:
        curve = kl_curve(vlm.decoder, vlm.embed(vlm.prepare(sample.image, sample.question)))
        for eta in (0.003,) if found else (0.003, 1e-12):
            wanted, layer = first_at_most(curve, eta), find_k(vlm, sample.image, sample.question, eta)
            said = f"{sample.question!r} meets eta = {eta:g} first with K = {wanted}, not {layer}"
            expect(layer == wanted, f"{said}; the divergences are {' '.join(f'{value:.1g}' for value in curve)}")
        found.append(first_at_most(curve, 0.003))
    return f"two questions find K = {', '.join(map(str, found))}; the mean over all twenty samples is what `calibrate` goes by"
