"""The published files themselves: every key of their configs, every tensor of their index, every token of a prompt."""

import functools
import json

import numpy as np
import pytest

import minivtw
from minivtw.checkpoints import family
from minivtw.checkpoints.fields import Fields
from minivtw.checkpoints.layouts import SYSTEMS
from minivtw.inputs.prompts import encode
from tests.doors import copied
from tests.parity import PIXEL_TOLERANCE

from .conversation import conversation_messages, picture
from .published import (
    LLAVA_7B,
    SMOLVLM2_500M,
    SMOLVLM_2B,
    SMOLVLM_256M,
    BlankCheckpoint,
    blank_vlm,
    needs_configs,
)

CONFIG_FILES = {
    LLAVA_7B: "config.json",
    SMOLVLM_256M: "config.json",
    SMOLVLM2_500M: "config.json",
    SMOLVLM_2B: "config.mirrored.json",
}
# Keys that change nothing of what is computed here: names, what a training run did, how files are kept, special tokens
# that the tokenizer's own files give, how transformers would decode (here the caller says that), and what counts only
# where it is read: a tower's copy of its processor's sizes.
HARMLESS = frozenset(
    """
    _name_or_path architectures dtype torch_dtype transformers_version transformers.js_config tokenizer_class auto_map
    use_cache _attn_implementation_autoset _flash_attn_2_enabled is_llama_config use_base_siglip torchscript use_bfloat16
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate ignore_index model_type
    initializer_range initializer_factor attention_dropout neftune_noise_alpha use_reentrant_checkpointing problem_type
    finetuning_task id2label label2id tf_legacy_loss task_specific_params pruned_heads tie_encoder_decoder max_window_layers
    sliding_window chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id is_encoder_decoder is_decoder
    vocab_size bos_token_id eos_token_id pad_token_id sep_token_id prefix image_seq_length image_seq_len vision_use_head projection_dim
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty
    suppress_tokens pretraining_tp temperature top_k top_p typical_p perceiver_config video_sampling video_token_id video_token_index
    processor_class image_processor_type do_convert_rgb do_pad _processor_class num_additional_image_tokens image_token
    feature_extractor_type data_format disable_grouping device input_data_format return_tensors
    vit_dropout vit_model_type lm_dropout lm_model_type lm_max_length lm_base_vocab_size extra_token_amount lm_eos_token_id
    vlm_load_backbone_weights vlm_checkpoint_path hf_repo_name size max_image_size tie_word_embeddings
    """.split()  # noqa: SIM905
)

each_config = pytest.mark.parametrize("folder", CONFIG_FILES, ids=lambda folder: folder.name)
whole_folders = pytest.mark.parametrize("folder", [LLAVA_7B, SMOLVLM_256M], ids=lambda folder: folder.name)
SIZES = [(1, 1), (64, 48), (640, 480), (300, 1000), (2000, 1100)]
TURNS = ["What is in the picture?\nAnswer briefly.", "A  cat, I think.", "And behind it?", "A wall.", "Is it   brick?"]


class Noted(dict):
    """An object of JSON that notes which of its keys are read."""

    def __init__(self, values):
        super().__init__(values)
        self.read = set()

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def unread(self):
        """Keys that say something which was not read and is not known to be harmless; nested ones dotted."""
        own = [key for key, value in self.items() if value is not None and key not in self.read | HARMLESS]
        nested = [(key, value) for key, value in self.items() if isinstance(value, Noted) and key in self.read]
        return sorted(own + [f"{name}.{key}" for name, values in nested for key in values.unread()])


def completed(folder, tmp_path):
    """A published folder that can be added to, with the image processor that it lacks."""
    for path in folder.iterdir():
        copied(path, tmp_path / path.name.replace(".mirrored", ""))
    if folder == SMOLVLM_2B:
        pixels = json.loads((SMOLVLM_256M / "preprocessor_config.json").read_text(encoding="utf-8"))
        pixels |= {"max_image_size": {"longest_edge": 384}, "size": {"longest_edge": 1536}}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels), encoding="utf-8")
    return tmp_path


@needs_configs
@each_config
def test_every_key_is_read_or_known_to_be_harmless(folder, tmp_path):
    completed(folder, tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    noted = json.loads(text, object_hook=Noted)
    family(Fields(noted, "config.json")).load(Fields(noted, "config.json"), tmp_path, BlankCheckpoint())
    assert noted.unread() == []


@needs_configs
@each_config
@pytest.mark.parametrize(
    "key, value",
    [
        ("qk_layer_norms", True),
        ("rope_interleaved", True),
        ("use_resampler", True),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("logits_scaling", 8),
        ("layer_types", ["sliding_attention"]),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_its_name(folder, tmp_path, key, value):
    completed(folder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["text_config"][key] = value
    fields = Fields(config, "config.json")
    with pytest.raises(minivtw.InputError, match=f"{key}|rope_type"):
        family(fields).load(fields, tmp_path, BlankCheckpoint())


def test_a_key_that_is_refused_is_not_called_harmless():
    from minivtw.checkpoints import llama

    assert not HARMLESS & llama.REFUSED.keys()


def test_a_key_that_nobody_reads_is_noticed():
    noted = json.loads('{"scale": 2, "odd": 1, "part": {"even": 2, "dtype": "float16"}, "no": null}', object_hook=Noted)
    fields = Fields(noted, "config.json")
    fields.positive_int("scale"), fields.section("part")
    assert noted.unread() == ["odd", "part.even"]


@needs_configs
def test_all_686_tensors_of_llava_7b_are_taken_once():
    names = json.loads((LLAVA_7B / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    _, _, checkpoint = blank_vlm(LLAVA_7B, names)
    assert len(names) == 686 and checkpoint.asked.keys() == set(names)
    assert 2 * sum(np.prod(shape) for shape in checkpoint.asked.values()) == 14_126_854_144  # total_size of the index


def conversation(vlm, images, turns):
    """The token ids of a whole conversation, as a chat puts them together, and the first turn's tiles."""
    first = vlm.prepare(images, turns[0])
    token_ids, layout = first.token_ids.tolist(), vlm.parts.layout
    for answer, question in zip(turns[1::2], turns[2::2], strict=True):
        token_ids += encode(
            vlm.tokenizer, f" {answer}", opens=False
        ).tolist()  # both models' answers begin with a space
        token_ids += [vlm.turn_end_id] if layout.turn_end else []
        token_ids += vlm.prepare(None, question, is_first=False).token_ids.tolist()
    return token_ids, first.tiles


@functools.cache
def models(folder):
    """(transformers' processor, ours) of a published folder."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, backend="pil"), blank_vlm(folder)[0]


@pytest.mark.live
@needs_configs
@whole_folders
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_whole_prompts_are_those_of_auto_processor(folder, images, turns):
    processor, vlm = models(folder)
    said = TURNS[: 2 * turns - 1]
    for size in SIZES if (images, turns) == (1, 1) else SIZES[1:2]:
        pictures = [picture(*size), picture(30, 50)][:images]
        text = processor.apply_chat_template(conversation_messages(images, said), add_generation_prompt=True)
        theirs = processor(images=pictures, text=text, return_tensors="np")
        ours, tiles = conversation(vlm, pictures, said)
        assert ours == theirs["input_ids"][0].tolist(), size
        pixels = theirs["pixel_values"]
        if folder == SMOLVLM_256M:  # all images of a prompt side by side, the shorter one filled up
            pixels = pixels[0][theirs["pixel_attention_mask"][0].any((1, 2))]
        assert tiles.shape == pixels.shape and np.abs(tiles - pixels).max() < PIXEL_TOLERANCE


@needs_configs
def test_vicunas_system_message_puts_the_image_where_the_paper_has_it():
    """ "35 system tokens": the image begins at the 36th."""
    vlm, _, _ = blank_vlm(LLAVA_7B)
    prompt = vlm.prepare(picture(9, 9), "What is it?", system=SYSTEMS["vicuna"])
    assert prompt.is_visual.argmax() == 35
    assert vlm.prepare(picture(9, 9), "What is it?").is_visual.argmax() == 5
    with pytest.raises(minivtw.InputError, match="can only open a conversation"):
        vlm.prepare(None, "And?", is_first=False, system="Be brief.")


@pytest.mark.live
@needs_configs
@whole_folders
def test_a_system_message_is_where_the_template_puts_it(folder):
    processor, vlm = models(folder)
    system = {"role": "system", "content": [{"type": "text", "text": "Answer in one word."}]}
    text = processor.apply_chat_template([system, *conversation_messages(1, TURNS[:1])], add_generation_prompt=True)
    theirs = processor(images=[picture(64, 48)], text=text, return_tensors="np")["input_ids"][0]
    assert vlm.prepare(picture(64, 48), TURNS[0], system="Answer in one word.").token_ids.tolist() == theirs.tolist()


@needs_configs
@whole_folders
def test_no_typed_text_forges_a_mark(folder):
    vlm, _, _ = blank_vlm(folder)
    special = [token.content for token in vlm.tokenizer.get_added_tokens_decoder().values() if token.special]
    assert len(special) > 4
    for token in special:
        for images, text in (
            (None, f"a{token}b"),
            ([picture(9, 9)], f"{token} What?"),
            ([picture(9, 9)], f"<image>{token[:1]}<image>{token[1:]}"),
        ):
            if token == "<image>" and images:
                continue
            with pytest.raises(minivtw.InputError):
                vlm.prepare(images, text)
