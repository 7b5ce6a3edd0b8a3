"""What real use brings: batches, beams, sampling, streaming, conversations, half precision, training, threads."""

import copy
import threading

import pytest

from .test_families import LAYERS, TOLERANCE, relative

pytestmark = pytest.mark.live

SHAPES = [[3, 5], [2, 4, 5], [7], [12, 4]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prompts_of_one_length_with_different_numbers_of_images(zoo, plug, built, answer, attention):
    """No padding, so no mask is given; and yet the rows that are left have different lengths."""
    model = built("idefics3", attention)
    batch, alone = zoo.prompts("idefics3", model, [[2, 3, 5], [2, 12]])
    assert batch["attention_mask"].all()
    for context in (plug.withdraw(model, 2), plug.freeze(model, [0, 1], 3)):
        with context:
            said, logits, _ = answer(model, batch)
            for row, one in enumerate(alone):
                expected, steps, _ = answer(model, one)
                assert said[row].tolist() == expected[0].tolist()
                assert relative(logits[:, row], steps[:, 0]) < TOLERANCE


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_beams(zoo, masks, plug, built, name):
    model = built(name)
    batch, alone = zoo.prompts(name, model, SHAPES[:2])
    options = dict(num_beams=3, max_new_tokens=5, do_sample=False)
    for layer in (0, 3):
        with plug.withdraw(model, layer):
            together = model.generate(**batch, **options)
        for row, one in enumerate(alone):
            with masks.forbidden(model, layer):
                expected = model.generate(**one, **options, use_cache=False)
            assert together[row, -5:].tolist() == expected[0, -5:].tolist()


def test_sampling(zoo, masks, plug, built):
    model = built("qwen2-vl")
    inputs, _ = zoo.prompts("qwen2-vl", model, [[3, 2, 5]])
    options = dict(max_new_tokens=12, do_sample=True, temperature=1.5)
    zoo.torch.manual_seed(3)
    with masks.forbidden(model, 2):
        expected = model.generate(**inputs, **options, use_cache=False)
    zoo.torch.manual_seed(3)
    with plug.withdraw(model, 2):
        assert model.generate(**inputs, **options).tolist() == expected.tolist()


def test_streaming_from_another_thread(zoo, plug, built, answer):
    class Collected:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    model, stream = built("smolvlm"), Collected()
    inputs, _ = zoo.prompts("smolvlm", model, [[3, 5]])
    with plug.withdraw(model, 3):
        said, *_ = answer(model, inputs)
        thread = threading.Thread(target=answer, args=(model, inputs), kwargs={"streamer": stream})
        thread.start(), thread.join()
    assert stream.tokens == [*inputs["input_ids"][0].tolist(), *said[0].tolist(), "end"]


def test_two_threads_at_once(zoo, plug, built, answer):
    model, said = built("llava"), {}
    batch, alone = zoo.prompts("llava", model, SHAPES[:2])
    with plug.withdraw(model, 3):
        expected = [answer(model, one, 24)[0].tolist() for one in alone]
        run = lambda row: said.__setitem__(row, answer(model, alone[row], 24)[0].tolist())
        threads = [threading.Thread(target=run, args=(row,)) for row in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [said[0], said[1]] == expected


def test_assisted_generation_takes_guesses_back(zoo, masks, plug, built, answer):
    """The tokens that were guessed wrong leave every layer's cache again."""
    model = built("llava")
    inputs, _ = zoo.prompts("llava", model, [[3, 2, 9]])
    for context, layer, frozen in (
        (plug.withdraw(model, 0), 0, ()),
        (plug.withdraw(model, 3), 3, ()),
        (plug.freeze(model, [0, 2], 4), 4, (0, 2)),
    ):
        with context:
            said, *_ = answer(model, inputs, 12, prompt_lookup_num_tokens=3, output_logits=False)
        assert said.tolist() == masks.greedy(model, inputs, layer, frozen, 12).tolist()


@pytest.mark.parametrize("layer, frozen", [(0, ()), (3, ()), (4, (0, 2))])
@pytest.mark.parametrize(
    "name, second", [("llava", [4, 6]), ("idefics3", [4, 6]), ("qwen2.5-vl", [6]), ("gemma3", [6])]
)
def test_a_conversation_goes_on_with_its_cache(zoo, masks, plug, built, answer, name, second, layer, frozen):
    model, torch = built(name), zoo.torch
    frozen = [2] if frozen and name == "gemma3" else frozen
    first, _ = zoo.prompts(name, model, [[3, 5]])
    after, _ = zoo.prompts(name, model, [second], seed=1)
    with plug.freeze(model, frozen, layer) if frozen else plug.withdraw(model, layer):
        said, _, cache = answer(model, first)
    whole = masks.grown(first, said)
    longer = masks.grown(whole, after["input_ids"])  # the second turn behind what was said
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in longer:
            longer[key] = torch.cat([whole[key], after[key]], 1)
    turn = {key: value for key, value in longer.items() if key not in ("pixel_values", "image_sizes")}
    if "pixel_values" in after:
        turn["pixel_values"] = after["pixel_values"]
        longer["pixel_values"] = torch.cat([first["pixel_values"], after["pixel_values"]], int(name == "idefics3"))
    with plug.freeze(model, frozen, layer) if frozen else plug.withdraw(model, layer):
        more, _, cache = answer(model, {**turn, zoo.cache_name(model): cache})
    assert more.tolist() == masks.greedy(model, longer, layer, frozen).tolist()


def test_a_prefix_made_without_withdrawal_is_kept(zoo, plug, built):
    """A cache from before the context: its layers are whole, and what comes new is withdrawn."""
    model, torch = built("llava"), zoo.torch
    inputs, _ = zoo.prompts("llava", model, [[6, 5]])
    ids = inputs["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :4], use_cache=True)[zoo.cache_name(model)]
        with plug.withdraw(model, 2):
            rest = model(
                input_ids=ids[:, 4:], pixel_values=inputs["pixel_values"], **{zoo.cache_name(model): cache}
            ).logits
            once = model(**inputs).logits
    assert relative(rest[:, -5:], once[:, -5:]) < TOLERANCE


def test_a_prefix_serves_several_prompts(zoo, plug, built):
    """A cache that was copied and repeated, as prefix caching does, takes its withdrawn tokens' places along."""
    model, torch = built("llava"), zoo.torch
    inputs, _ = zoo.prompts("llava", model, [[3, 5]])
    questions = torch.randint(2, 90, (3, 4))
    with torch.no_grad(), plug.withdraw(model, 2):
        cache = model(**inputs, use_cache=True)[zoo.cache_name(model)]
        several = copy.deepcopy(cache)
        several.batch_repeat_interleave(3)
        together = model(input_ids=questions, **{zoo.cache_name(model): several}).logits
        for row in range(3):
            alone = model(input_ids=questions[row : row + 1], **{zoo.cache_name(model): copy.deepcopy(cache)}).logits
            assert relative(together[row], alone[0]) < TOLERANCE


@pytest.mark.parametrize("layer, frozen", [(0, ()), (3, ()), (4, (0, 2))])
@pytest.mark.parametrize("name", ["llava", "llava-onevision", "idefics3", "qwen2-vl", "internvl", "gemma3"])
def test_one_image_and_many_questions(zoo, plug, built, answer, lengths, name, layer, frozen):
    """Prefilled once up to the first text after the image: each question goes on with a copy, as if it had come alone."""
    model, torch, frozen = built(name), zoo.torch, [2] if frozen and name == "gemma3" else frozen
    seen, _ = zoo.prompts(name, model, [[3, 2]])
    with plug.freeze(model, frozen, layer) if frozen else plug.withdraw(model, layer):
        with torch.no_grad():
            cache = model(**seen, use_cache=True)[zoo.cache_name(model)]
        deltas = getattr(model.model, "rope_deltas", None)  # of the image's positions; Qwen's model remembers its last
        before = [layer.keys.clone() for layer in cache.layers]
        for seed, words in enumerate((6, 1, 9)):
            question, _ = zoo.prompts(name, model, [[words]], seed=seed)
            whole = {key: torch.cat([seen[key], question[key]], 1) if key in question else seen[key] for key in seen}
            rest = {key: value for key, value in whole.items() if key not in ("pixel_values", "image_sizes")}
            expected, expected_logits, expected_cache = answer(model, whole)
            answer(model, zoo.prompts(name, model, [[1, 2, 3]], seed)[0])  # about other images, in between
            if name == "qwen2-vl":
                model.model.rope_deltas = deltas
            said, logits, own = answer(model, {**rest, zoo.cache_name(model): copy.deepcopy(cache)})
            assert said.tolist() == expected.tolist() and relative(logits, expected_logits) < TOLERANCE
            assert lengths(own) == lengths(expected_cache)
    assert all(torch.equal(old, layer.keys) for old, layer in zip(before, cache.layers, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [("float16", 4e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision(zoo, masks, plug, attention, dtype, tolerance):
    model = zoo.build("llava", attention=attention).to(getattr(zoo.torch, dtype))
    inputs, _ = zoo.prompts("llava", model, [[3, 5], [2, 4, 5]])
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    text = (inputs["input_ids"] != zoo.IMAGE) & inputs["attention_mask"].bool()
    for layer, frozen in ((3, ()), (5, (1, 2))):
        expected = masks.logits(model, inputs, layer, frozen)[text].float()
        with zoo.torch.no_grad(), plug.freeze(model, frozen, layer) if frozen else plug.withdraw(model, layer):
            made = model(**inputs, use_cache=True)
        assert made.logits.dtype == model.dtype and made[zoo.cache_name(model)].layers[5].keys.dtype == model.dtype
        assert relative(made.logits[text].float(), expected) < tolerance


def test_outputs_keep_their_shapes(zoo, plug, built):
    model = built("llava", "eager")
    inputs, _ = zoo.prompts("llava", model, SHAPES)
    visual = inputs["input_ids"] == zoo.IMAGE
    with zoo.torch.no_grad():
        plain = model(**inputs)
        with plug.withdraw(model, 2):
            made = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert made.logits.shape == plain.logits.shape
    assert not made.logits[visual].any() and not made.hidden_states[-1][visual].any()
    assert [len(states[0]) for states in made.attentions] == [4] * LAYERS


@pytest.mark.parametrize("layer, frozen", [(2, ()), (4, (1, 2))])
def test_training_through_a_withdrawal(zoo, masks, plug, built, layer, frozen):
    """The loss and every gradient, for a left-padded batch."""
    model = built("llava")
    inputs, _ = zoo.prompts("llava", model, SHAPES[:2])
    ignored = (inputs["input_ids"] == zoo.IMAGE) | (inputs["attention_mask"] == 0)
    ignored |= ignored.roll(1, 1)  # predicted from such a row
    labels = inputs["input_ids"].masked_fill(ignored, -100)
    grads = []
    for context in (
        masks.forbidden(model, layer, frozen),
        plug.freeze(model, frozen, layer) if frozen else plug.withdraw(model, layer),
    ):
        with context:
            model.zero_grad()
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        grads.append(
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        )
    model.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    largest = max(float(grad.abs().max()) for grad in grads[0].values())
    for name, grad in grads[0].items():
        assert float((grads[1][name] - grad).abs().max()) < TOLERANCE * largest, name
