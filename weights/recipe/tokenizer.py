"""The tokenizer of the embedded model: byte-level BPE, trained until every word of the scenes' world is one token."""

import pathlib

import numpy as np
from lessons import single_questions
from questions import NUMBERS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from world import COLORS, DIGITS, SHAPES, sample_scene, training_seed

VOCABULARY = 640
SPECIAL = ("<s>", "</s>", "<pad>", "<image>")
VISUAL_TOKENS = 64
# The layout of LLaVA-1.5: the image, then the question. Every question of a batch shares what stands before it.
BEFORE_IMAGE, AFTER_IMAGE, BEFORE_ANSWER, END = "USER: ", "\n", " ASSISTANT:", "</s>"
EXAMPLE_SCENES = 2_000


def prompt(question: str) -> str:
    """What a single-turn chat looks like; the answer follows after a space."""
    return f"{BEFORE_IMAGE}<image>{AFTER_IMAGE}{question}{BEFORE_ANSWER}"


def train_tokenizer() -> Tokenizer:
    """Deterministic: trained on the prompts and answers of the first scenes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = (*COLORS, *SHAPES, *DIGITS, *NUMBERS, "yes", "no", "A", "B", "C", "D")
    texts = [f" {word} a {word}" for word in words] * 50
    for index in range(EXAMPLE_SCENES):
        rng = np.random.default_rng([training_seed(index), 5])
        for question in single_questions(sample_scene(training_seed(index)).things, rng):
            texts.append(f"{BEFORE_IMAGE}{AFTER_IMAGE}{question.question}{BEFORE_ANSWER} {question.answer}")
    tokenizer.train_from_iterator(texts, trainer)
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)]
    )
    return tokenizer


def tokenizer_of(runs: pathlib.Path) -> Tokenizer:
    """The tokenizer that the runs of a folder share; trained once, because every change of a lesson would change it."""
    path = runs / "tokenizer.json"
    if not path.exists():
        train_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))


def exported_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer of a folder that export.py wrote."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def tokenizer_config() -> dict:
    """tokenizer_config.json, as transformers reads it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "image_token": "<image>",
        "extra_special_tokens": {"image_token": "<image>"},
        "model_max_length": 4096,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
