"""What nobody may get wrong without a word: layers, windows, masks and threads that are not as one would think."""

import copy
import gc
import io
import threading
import weakref

import pytest

from minivtw.errors import InputError

from .test_families import LAYERS, TOLERANCE, relative

pytestmark = pytest.mark.live

SHAPE = [[3, 2, 5]]
WINDOW = 9


def around(zoo, text, seed=0, attention="sdpa"):
    """A LLaVA around another language model."""
    torch = zoo.torch
    torch.manual_seed(seed)
    config = zoo.llava(text, zoo.CLIP)
    model = zoo.families()["llava"].model._from_config(config, attn_implementation=attention).eval()
    zoo.enliven(model)
    return model


def assert_as_masks(zoo, masks, plug, answer, model, layer, frozen=()):
    """Prefill, with a cache and without, and greedy tokens."""
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    text = inputs["input_ids"] != zoo.IMAGE
    expected = masks.logits(model, inputs, layer, frozen)[text]
    with plug.freeze(model, frozen, layer) if frozen else plug.withdraw(model, layer), zoo.torch.no_grad():
        for use_cache in (True, False):
            assert relative(model(**inputs, use_cache=use_cache).logits[text], expected) < TOLERANCE
        said, *_ = answer(model, inputs)
    assert said.tolist() == masks.greedy(model, inputs, layer, frozen).tolist()


def test_a_window_that_every_layer_names_and_only_local_ones_have(zoo, masks, plug, answer):
    kinds = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    text = dict(model_type="exaone4", sliding_window=WINDOW, layer_types=kinds, head_dim=8)
    model = around(zoo, text)
    assert all(layer.self_attn.sliding_window == WINDOW for layer in zoo.layers_of(model))
    for layer in (0, 2, 3):
        assert_as_masks(zoo, masks, plug, answer, model, layer)
    assert_as_masks(zoo, masks, plug, answer, model, LAYERS, (1, 3))  # global layers, without rotary positions


def test_a_window_that_only_the_config_names(zoo, masks, plug, answer):
    model = around(zoo, dict(model_type="mistral", sliding_window=WINDOW))
    assert not hasattr(zoo.layers_of(model)[0].self_attn, "sliding_window")
    for layer in (0, 3):
        assert_as_masks(zoo, masks, plug, answer, model, layer)
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    with pytest.raises(InputError, match="sees only the last 9 tokens"), plug.freeze(model, [1], 3):
        pass
    with plug.freeze(model, [1], 3, check=False), pytest.raises(InputError, match="sees only the last 9 tokens"):
        model(**inputs, use_cache=True)
    model = around(zoo, dict(model_type="mistral", sliding_window=64))  # longer than the conversation
    assert_as_masks(zoo, masks, plug, answer, model, 4, (0, 1, 2))


@pytest.mark.parametrize(
    "text",
    [
        dict(model_type="smollm3", no_rope_layer_interval=2),
        dict(model_type="olmo", clip_qkv=0.3),
        dict(model_type="olmoe", num_experts=2, num_experts_per_tok=1),
        dict(model_type="stablelm", partial_rotary_factor=0.5, qk_layernorm=True),
        dict(
            model_type="phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
        ),
        dict(model_type="cohere2", head_dim=8, sliding_window=64),
    ],
    ids=lambda text: text["model_type"],
)
def test_frozen_layers_write_what_the_layer_itself_would(zoo, masks, plug, answer, text):
    """Without rotary positions, with clamps and norms of other widths, with one matrix for all three."""
    model = around(zoo, text)
    for layer, frozen in ((LAYERS, (1, 4)), (4, (0, 3))):
        assert_as_masks(zoo, masks, plug, answer, model, layer, frozen)


def test_queries_that_are_scaled_by_positions(zoo, masks, plug, answer):
    rope = {
        "rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 8,
    }  # fmt: skip
    model = around(zoo, dict(model_type="ministral3", head_dim=8, rope_parameters=rope))
    assert_as_masks(zoo, masks, plug, answer, model, 2)
    assert_as_masks(zoo, masks, plug, answer, model, 4, (0, 2))
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    curve = plug.calibrate(model, None, [inputs], eta=1e9)["curve"]
    full = masks.logits(model, inputs, LAYERS)[:, -1].double().log_softmax(-1)
    withdrawn = masks.logits(model, inputs, 2)[:, -1].double().log_softmax(-1)
    assert curve[2] == pytest.approx(float((withdrawn.exp() * (withdrawn - full)).sum()), abs=1e-4)


def test_no_mask_may_mean_that_all_tokens_see_each_other(zoo, masks, plug, built):
    """PaliGemma without token types; and two prompts of one length with different numbers of images."""
    model = built("paligemma")
    batch, alone = zoo.prompts("paligemma", model, [[2, 3, 5], [2, 24]])
    assert batch["attention_mask"].all()
    for inputs in (batch, *alone):
        inputs.pop("token_type_ids")
    text = batch["input_ids"] != zoo.IMAGE
    for layer, frozen in ((0, ()), (3, ()), (4, (1, 2))):
        expected = masks.logits(model, batch, layer, frozen)
        with plug.freeze(model, frozen, layer) if frozen else plug.withdraw(model, layer), zoo.torch.no_grad():
            found = model(**batch).logits
            assert relative(found[text], expected[text]) < TOLERANCE
            for row, one in enumerate(alone):
                kept = one["input_ids"][0] != zoo.IMAGE
                assert relative(model(**one).logits[0][kept], found[row][kept]) < TOLERANCE


def test_an_image_that_no_token_stands_for(zoo, plug, built):
    model = built("llava")
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    with (
        plug.withdraw(model, 2, visual_ids=7),
        pytest.raises(InputError, match="no token of the prompt is a visual one"),
    ):
        model(**{**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == zoo.IMAGE, 8)})


def test_hooks_that_never_ran_are_noticed(zoo, plug, built, answer):
    model = built("llava")
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    with pytest.warns(UserWarning, match="nothing was withdrawn"), plug.withdraw(model, 2):
        pass
    with pytest.raises(InputError, match="ran without their hooks"), plug.withdraw(model, 2):
        for layer in zoo.layers_of(model):
            layer._forward_pre_hooks.clear(), layer._forward_hooks.clear()
        answer(model, inputs)


def test_a_decoder_that_the_trial_finds_wrong(zoo, plug, monkeypatch):
    """Whatever the hooks do not know of is found before anything is measured: here, keys that count their rows."""
    model = zoo.build("llava")
    attention = zoo.layers_of(model)[3].self_attn
    handle = attention.k_proj.register_forward_hook(lambda module, args, keys: keys * keys.shape[1] ** 0.5)
    with pytest.raises(InputError, match="differs by .* check=False"), plug.withdraw(model, 2):
        pass
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    with plug.withdraw(model, 2, check=False):
        model(**inputs)
    handle.remove()
    with plug.withdraw(model, 2):
        model(**inputs)


def test_a_generation_keeps_to_the_block_that_it_began_in(zoo, plug, built, answer, lengths):
    """Given to a thread that starts when the block has ended; and with another block around it by then."""
    model = built("llava")
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    options = dict(max_new_tokens=6, do_sample=False)
    plain = model.generate(**inputs, **options).tolist()
    said, expected = {}, {}
    begun = {}
    for layer in (0, 3):
        with plug.withdraw(model, layer):
            expected[layer] = model.generate(**inputs, **options).tolist()
            begun[layer] = model.generate  # as Thread(target=model.generate) has it
    assert "generate" not in vars(model)
    run = lambda layer: said.__setitem__(layer, begun[layer](**inputs, **options).tolist())
    with plug.withdraw(model, 5):
        threads = [threading.Thread(target=run, args=(layer,)) for layer in begun]
        for thread in threads:
            thread.start()
        within = model.generate(**inputs, **options).tolist()
        for thread in threads:
            thread.join()
    assert said == expected and expected[0] != plain
    with plug.withdraw(model, 5):
        assert within == model.generate(**inputs, **options).tolist()
    assert model.generate(**inputs, **options).tolist() == plain


def test_a_block_left_while_another_thread_generates(zoo, plug, built):
    """The block ends after the first token; the generation does not."""
    model = built("llava")
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    first, left, said = threading.Event(), threading.Event(), []

    class Slow:
        def put(self, value):
            first.set()
            assert left.wait(60)

        def end(self):
            pass

    with plug.withdraw(model, 3):
        expected = model.generate(**inputs, **options)
        run = lambda: said.append(model.generate(**inputs, **options, streamer=Slow()))
        thread = threading.Thread(target=run)
        thread.start()
        assert first.wait(60)
    left.set()
    thread.join()
    assert said[0].sequences.tolist() == expected.sequences.tolist()
    name = zoo.cache_name(model)
    lengths = [[layer.keys.shape[-2] for layer in made[name].layers] for made in (said[0], expected)]
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_that_goes_on_outside_its_block(zoo, plug, built, attention):
    model = built("llava", attention)
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    text, _ = zoo.prompts("llava", model, [[6]])
    name, more = zoo.cache_name(model), zoo.torch.tensor([[4]])
    with plug.withdraw(model, 2), zoo.torch.no_grad():
        cache, plain = model(**inputs, use_cache=True)[name], model(**text, use_cache=True)[name]
    with pytest.raises(InputError, match="in a block of minivtw's withdraw or freeze, which has ended"):
        model(input_ids=more, **{name: copy.deepcopy(cache)})
    model(input_ids=more, **{name: plain})  # nothing had left


def test_withdrawal_by_default_until_it_is_undone(zoo, plug, built, answer):
    model = built("llava")
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    plain = answer(model, inputs)[0].tolist()
    with plug.withdraw(model, 0):
        expected = answer(model, inputs)[0].tolist()
    undo = plug.withdraw_by_default(model, 0)
    said = []
    thread = threading.Thread(target=lambda: said.append(answer(model, inputs)[0].tolist()))
    thread.start(), thread.join()
    assert said == [expected] == [answer(model, inputs)[0].tolist()]
    with pytest.raises(InputError, match="already"), plug.withdraw(model, 2):
        pass
    undo(), undo()
    assert answer(model, inputs)[0].tolist() == plain != expected and "generate" not in vars(model)


def test_withdrawal_by_default_needs_no_one_to_hold_what_undoes_it(zoo, plug, answer, lengths):
    """As in an adapter that drops it; and the model is freed with what it holds."""
    model = zoo.build("llava")
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    plug.withdraw_by_default(model, 2)
    gc.collect()
    assert set(lengths(answer(model, inputs)[2])[2:]) != set(lengths(answer(model, inputs)[2])[:2])
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None


def test_copies_and_files_of_a_model_within_a_block(zoo, plug, built, tmp_path):
    model = built("llava")
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    with plug.withdraw(model, 2):
        for attempt in (lambda: copy.deepcopy(model), lambda: zoo.torch.save(model, io.BytesIO())):
            with pytest.raises(InputError, match="copy or pickle it outside the block"):
                attempt()
        model.save_pretrained(tmp_path)
        model(**inputs)
    copy.deepcopy(model)
    assert (tmp_path / "model.safetensors").exists()


def test_continuous_batching_is_refused_and_a_generate_of_ones_own_comes_back(zoo, plug):
    model = zoo.build("llava")
    model.generate = own = lambda **inputs: model(**inputs)
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    with plug.withdraw(model, 2):
        assert model.generate(**inputs).logits.shape[1] == 42
        with pytest.raises(InputError, match="continuous batching"):
            model.generate_batch([[3, 4]])
    assert model.generate is own and "generate_batch" not in vars(model)


def test_numbers_that_a_trainer_hands_down(zoo, plug, built):
    model = built("llava")
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    with plug.withdraw(model, 3):
        made = model(**inputs, labels=inputs["input_ids"], num_items_in_batch=zoo.torch.tensor(4))
    assert made.loss > 0


def test_a_compiled_tower_is_no_matter(zoo, plug):
    model = zoo.build("llava")
    model.model.vision_tower.compile(backend="eager")
    inputs, _ = zoo.prompts("llava", model, [[3, 5]])
    with plug.withdraw(model, 3):
        model.model.vision_tower._compiled_call_impl = None  # compiling itself is not what is tested
        model(**inputs)


def test_prompt_lookup_in_windows_and_without_any_visual_token_left(zoo, masks, plug, built, answer):
    for name in ("gemma3-short-window", "gemma3", "llava-next"):
        model = built(name)
        inputs, _ = zoo.prompts(name, model, [[3, 2, 9]])
        for layer in (0, 3):
            with plug.withdraw(model, layer):
                said, *_ = answer(model, inputs, 8, prompt_lookup_num_tokens=3, output_logits=False)
            assert said.tolist() == masks.greedy(model, inputs, layer, tokens=8).tolist(), (name, layer)


def test_visual_tokens_that_the_caller_names(zoo, plug, answer):
    model, named = zoo.build("llava"), zoo.build("llava")
    named.config.image_token_id = named.model.config.image_token_id = None
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    inputs.pop("pixel_values")
    with plug.withdraw(model, 2):
        expected, *_ = answer(model, inputs)
    with pytest.raises(InputError, match="visual_ids="), plug.withdraw(named, 2):
        pass
    for visual_ids in (zoo.IMAGE, [zoo.IMAGE, 91], lambda ids: ids == zoo.IMAGE):
        with plug.withdraw(named, 2, visual_ids):
            assert answer(named, inputs)[0].tolist() == expected.tolist()


def test_what_each_generation_took(zoo, plug, built, answer):
    model = built("llava")
    inputs, _ = zoo.prompts("llava", model, SHAPE)
    with plug.withdraw(model, 2) as told:
        *_, cache = answer(model, inputs, 3)
        answer(model, zoo.prompts("llava", model, [[6]])[0], 2)
    first, text = told
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    assert (first.visual, first.text) == (32, 10 + 2) and (text.visual, text.text) == (0, 6 + 1)
    assert first.cache_bytes == held == (2 * 44 + 4 * 12) * 2 * 16 * 4
    assert first.cache_bytes_without == 6 * 44 * 2 * 16 * 4
    width, matrices = 32, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    pass_of = lambda rows, keys: 2 * rows * matrices + 4 * rows * keys * width
    assert first.flops == 2 * (pass_of(42, 42) + pass_of(1, 43) + pass_of(1, 44)) + 4 * (
        pass_of(10, 10) + pass_of(1, 11) + pass_of(1, 12)
    )
    assert first.flops_without == 6 * (pass_of(42, 42) + pass_of(1, 43) + pass_of(1, 44))
    assert text.flops == text.flops_without and text.cache_bytes == text.cache_bytes_without


def test_calibration_opens_an_image_as_the_processor_does(plug):
    """Turned as EXIF says, and on white where it is transparent."""
    from PIL import Image

    import minivtw

    from .test_calibration import loaded

    folder = minivtw.load().folder
    model, processor = loaded(folder)
    image = Image.open(folder.parent.parent / "docs" / "pictures" / "scene.png").convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    image.paste(Image.new("RGBA", (image.width // 2, image.height), (200, 20, 20, 255)))
    question = "USER: <image>\nWhat color is the star? ASSISTANT:"
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    by_hand = processor(images=white.convert("RGB"), text=question, return_tensors="pt")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    expected = plug.calibrate(model, processor, [by_hand], eta=1e9)["curve"]
    for opened in (image, Image.open(stream)):
        assert plug.calibrate(model, processor, [(opened, question)], eta=1e9)["curve"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["gemma3", "exaone4_5"])
def test_a_sample_of_the_sweep(name):
    """`python -m tests.sweep_families` has them all."""
    import warnings

    from tests import sweep_families

    found = {known: (kind, config) for known, kind, config in sweep_families.families(False)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict = sweep_families.verdict(*found[name])
    assert verdict["withdraw"] == "right" and verdict["freeze"].startswith("right"), verdict
