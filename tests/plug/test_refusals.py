"""What is not understood is refused in one sentence, and leaving the context restores the model exactly."""

import pytest

from minivtw.errors import InputError

pytestmark = pytest.mark.live


def refused(words):
    return pytest.raises(InputError, match=words)


def hooks_of(model):
    """Everything that a hook could hang on, of every module."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return [(name, dict(getattr(module, name)), sorted(vars(module))) for module in model.modules() for name in names]


def test_leaving_restores_the_model(zoo, plug, answer):
    model = zoo.build("llava")
    inputs, _ = zoo.prompts("llava", model, [[3, 5]])
    before, hooks = model(**inputs).logits, hooks_of(model)
    for enter in (lambda: plug.withdraw(model, 2), lambda: plug.freeze(model, [0, 1], 3)):
        with enter():
            assert not zoo.torch.equal(model(**inputs).logits, before)
        assert hooks_of(model) == hooks and zoo.torch.equal(model(**inputs).logits, before)
        with pytest.raises(KeyError), enter():
            raise KeyError
        with pytest.raises(ValueError, match="do not match"), enter():  # transformers' own, in the middle of a pass
            model(input_ids=inputs["input_ids"][:, 1:9], pixel_values=inputs["pixel_values"])
        assert hooks_of(model) == hooks and zoo.torch.equal(model(**inputs).logits, before)
    with plug.withdraw(model, 2), pytest.raises(ValueError, match="do not match"):
        model(input_ids=inputs["input_ids"][:, 1:9], pixel_values=inputs["pixel_values"])
    with plug.withdraw(model, 2):  # and a pass that failed leaves nothing to the next
        expected, *_ = answer(model, inputs)
        with pytest.raises(ValueError, match="do not match"):
            model(input_ids=inputs["input_ids"][:, 1:9], pixel_values=inputs["pixel_values"])
        assert answer(model, inputs)[0].tolist() == expected.tolist()


def test_nested_contexts_of_one_model_are_refused_and_of_two_are_not(zoo, plug, built):
    model, other = built("llava"), built("smolvlm")
    hooks = hooks_of(model)
    with pytest.warns(UserWarning, match="nothing was withdrawn"), plug.withdraw(model, 2), plug.withdraw(other, 3):
        with refused("already"), plug.withdraw(model, 3):
            pass
        with refused("already"), plug.freeze(model, [0], 3):
            pass
        with refused("already"):
            plug.calibrate(model, None, [zoo.prompts("llava", model, [[3, 5]])[0]])
    assert hooks_of(model) == hooks


@pytest.mark.parametrize(
    "layer, words",
    [
        (7, "from 0 to 6, not 7"),
        (-1, "must be 0 or more, not -1"),
        (2.0, "whole number"),
        (True, "whole number"),
        (None, "whole number"),
    ],
)
def test_layers_that_make_no_sense(plug, built, layer, words):
    with refused(words), plug.withdraw(built("llava"), layer):
        pass


@pytest.mark.parametrize(
    "layers, until, words",
    [
        ([6], None, "from 0 to 5"), ([3], 3, "leave before layer 3"), (["1"], None, "whole number"),
        (3, None, "a list"), ("12", None, "a list"), ([], None, "whole number"), ([0], 9, "from 0 to 6"),
    ],
)  # fmt: skip
def test_frozen_layers_that_make_no_sense(plug, built, layers, until, words):
    with refused(words), plug.freeze(built("llava"), layers, until):
        pass


def test_a_stored_layer(plug, built, tmp_path, answer, zoo):
    model = built("llava")
    inputs, _ = zoo.prompts("llava", model, [[3, 5]])
    with plug.withdraw(model, 2):
        expected, *_ = answer(model, inputs)
    (tmp_path / "withdrawal.json").write_text('{"withdraw_layer": 2}', encoding="utf-8")
    for path in (tmp_path, tmp_path / "withdrawal.json", str(tmp_path)):
        with plug.withdraw(model, path):
            assert answer(model, inputs)[0].tolist() == expected.tolist()
    with refused("lacks nothing.json"), plug.withdraw(model, tmp_path / "nothing.json"):
        pass
    (tmp_path / "withdrawal.json").write_text("[]", encoding="utf-8")
    with refused("must hold a JSON object"), plug.withdraw(model, tmp_path):
        pass


def test_models_that_are_not_understood(zoo, plug, built):
    import transformers as hf

    torch, mixed = zoo.torch, zoo.build("llava")
    layer = zoo.layers_of(mixed)[2]
    layer.linear_attn = layer.self_attn
    del layer.self_attn
    for model, words in (
        ("LLaVA", "not str"),
        (torch.nn.Linear(1, 1), "not Linear"),
        (hf.LlamaForCausalLM(hf.LlamaConfig(**zoo.TEXT)), "no visual tokens"),
        (hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)), "0 decoders"),
        (mixed, r"some of its layers \(LlamaDecoderLayer\) have no self_attn, but linear_attn"),
        (torch.compile(built("llava")), "compiled"),
    ):
        with refused(words), plug.withdraw(model, 2):
            pass
    compiled = zoo.build("llava")
    compiled.compile()
    with refused("compiled"), plug.withdraw(compiled, 2):
        pass
    unknown = zoo.build("llava")
    unknown.model.language_model.config._attn_implementation = "flex_attention_of_another_kind"
    with refused("flex_attention_of_another_kind is not understood"), plug.withdraw(unknown, 2):
        unknown(input_ids=torch.tensor([[3, 4]]))


def test_arguments_of_layers_that_are_not_understood(zoo, plug):
    model = zoo.build("llava")
    inputs, _ = zoo.prompts("llava", model, [[3, 5]])
    packed = {"cu_seq_lens_q": zoo.torch.tensor([0, 24])}
    with plug.withdraw(model, 2), refused("get cu_seq_lens_q, which is not understood"):
        model.model(**{key: value for key, value in inputs.items() if key != "pixel_values"}, **packed)
    model.train()
    later = hasattr(model, "activation_checkpointing_enable")  # the name from transformers 6 on
    (model.activation_checkpointing_enable if later else model.gradient_checkpointing_enable)()
    with plug.withdraw(model, 2), refused("gradient checkpointing"):
        model(**inputs)


def test_caches_that_cannot_shrink(zoo, plug, built):
    import transformers as hf

    model = built("llava")
    inputs, _ = zoo.prompts("llava", model, [[3, 5]])
    static = hf.StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    offloaded = hf.DynamicCache(offloading=True) if zoo.torch.cuda.is_available() else offloading(hf)
    with plug.withdraw(model, 2):
        for cache, words in ((static, "StaticLayer"), (offloaded, "offloading")):
            with refused(f"needs a DynamicCache.*{words}"):
                model(**inputs, **{zoo.cache_name(model): cache})
        with refused("needs a DynamicCache.*StaticLayer"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


def offloading(hf):
    """What an offloading cache says of itself; one cannot be made without a GPU."""
    cache = hf.DynamicCache()
    cache.offloading = True
    return cache


def test_prompts_that_cannot_be_answered(zoo, plug, built):
    model = built("llava")
    inputs, _ = zoo.prompts("llava", model, [[3, 0]])
    embedded = model.get_input_embeddings()(zoo.torch.tensor([[3, 4, 5]]))
    with plug.withdraw(model, 2):
        with refused("must end with text"):
            model(**inputs)
        with refused("inputs_embeds alone"):
            model(inputs_embeds=embedded)


def test_a_cache_goes_on_as_it_was_made(zoo, plug, built):
    model, torch = built("llava"), zoo.torch
    inputs, _ = zoo.prompts("llava", model, [[3, 5]])
    name, more = zoo.cache_name(model), torch.tensor([[4, 5, 6]])
    batch, _ = zoo.prompts("llava", model, [[3, 5], [4, 4]])
    with plug.withdraw(model, 2):
        cache = model(**batch, use_cache=True)[name]
        with refused("holds 2 prompts with withdrawn tokens, but 3 go on"):
            model(input_ids=more.repeat(3, 1), **{name: cache})
        cache = model(**inputs, use_cache=True)[name]
    with refused("other layers"), plug.withdraw(model, 3):
        model(input_ids=more, **{name: cache})
    with plug.withdraw(model, 2), refused("cropped into an image"):
        cache.crop(-8)
        model(input_ids=more, **{name: cache})


def test_importing_the_package_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, minivtw, minivtw.generate; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    attempt = "try:\n    from minivtw.plug import withdraw\nexcept ValueError as error:\n    print(error)"
    missing = "import sys; sys.modules['torch'] = None\n" + attempt
    ran = subprocess.run([sys.executable, "-c", missing], capture_output=True, encoding="utf-8")
    assert ran.stdout == "minivtw.plug needs two packages: pip install 'minivtw[transformers]'\n"
