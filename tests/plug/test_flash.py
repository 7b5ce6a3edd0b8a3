"""Withdrawal where the model attends as flash attention does."""

import pytest

from minivtw.errors import InputError

from .test_families import TOLERANCE, relative

pytestmark = pytest.mark.live


@pytest.fixture
def flash(zoo, monkeypatch):
    """name -> a model whose decoder attends as flash attention does."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from .flash import stand_in

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", stand_in)

    def build(name):
        model = zoo.build(name)
        inner = model.model.language_model if hasattr(model.model, "language_model") else model.model.text_model
        inner.config._attn_implementation = "flash_attention_2"
        return model

    return build


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2.5-vl", "internvl"])
def test_flash_attention_is_called_by_its_rules(zoo, masks, plug, built, flash, answer, name):
    model = flash(name)
    batch, alone = zoo.prompts(name, model, [[3, 5], [2, 4, 5], [7]])
    for layer in (0, 3):
        expected = [masks.greedy(built(name), one, layer) for one in alone]
        with plug.withdraw(model, layer):
            together, *_ = answer(model, batch)
            for row, one in enumerate(alone):
                assert answer(model, one)[0].tolist() == expected[row].tolist()
                assert together[row].tolist() == expected[row][0].tolist()


def test_equal_prompts_with_different_images_and_a_second_turn(zoo, masks, plug, built, flash):
    model, expected = flash("idefics3"), built("idefics3")
    batch, _ = zoo.prompts("idefics3", model, [[2, 3, 5], [2, 12]])
    more = zoo.torch.randint(2, 90, (2, 4))
    longer = masks.grown(batch, more)
    name = zoo.cache_name(model)
    with zoo.torch.no_grad(), plug.withdraw(model, 2):
        first = model(**batch, use_cache=True)
        second = model(input_ids=more, attention_mask=longer["attention_mask"], **{name: first[name]})
    wanted = masks.logits(expected, longer, 2)
    assert relative(first.logits[:, -4:], wanted[:, -8:-4]) < TOLERANCE
    assert relative(second.logits, wanted[:, -4:]) < TOLERANCE


def test_frozen_rows_are_refused(zoo, plug, flash):
    model = flash("llava")
    with pytest.raises(InputError, match="use sdpa or eager"), plug.freeze(model, [1], 3):
        model(**zoo.prompts("llava", model, [[3, 5]])[0])
