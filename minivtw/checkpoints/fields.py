"""The fields of a config file, each read with its type and its range checked, and which of them nobody has read."""

from ..errors import InputError

REQUIRED = object()
MOST = 10_000_000  # of a whole number, where a config gives no reason for less

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


class Fields:
    """One JSON object of a config; `where` names it in errors. A default stands in for an absent or null key."""

    def __init__(self, values, where):
        self._values = values
        self.where = where
        self._read = set()
        self._parts = {}

    def _get(self, key, default, fits, kind):
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            if default is REQUIRED:
                raise InputError(f"{self.where} lacks {key}")
            return default
        if not fits(value):
            raise InputError(f"{key} in {self.where} must be {kind}, not {repr(value)[:80]}")
        return value

    def has(self, key):
        return self._values.get(key) is not None

    def whole(self, key, default=REQUIRED, most=MOST):
        """A whole number from 1 to `most`."""
        return self._get(key, default, lambda v: type(v) is int and 0 < v <= most, f"a whole number from 1 to {most:,}")

    def index(self, key, default=REQUIRED):
        """A whole number of either sign: a layer counted from the front or the back, a token id."""
        return self._get(key, default, lambda v: type(v) is int and abs(v) <= MOST, "a whole number")

    def number(self, key, default=REQUIRED):
        """A number above 0, within reason."""
        fits = lambda v: type(v) in (int, float) and 1e-12 <= v <= 1e12
        return float(self._get(key, default, fits, "a number above 0"))

    def numbers(self, key, count, default=REQUIRED, least=-1e6):
        """A list of `count` numbers, none below `least`."""
        fits = lambda v: isinstance(v, list) and len(v) == count and all(
            type(n) in (int, float) and least <= n <= 1e6 for n in v
        )  # fmt: skip
        return tuple(self._get(key, default, fits, f"a list of {count} numbers from {least:g} to 1e6"))

    def pairs(self, key, count, most):
        """A list of at most `count` pairs of whole numbers from 1 to `most`, as tuples."""
        is_pair = lambda pair: isinstance(pair, list) and len(pair) == 2 and all(
            type(n) is int and 0 < n <= most for n in pair
        )  # fmt: skip
        fits = lambda v: isinstance(v, list) and 0 < len(v) <= count and all(map(is_pair, v))
        kind = f"a list of at most {count:,} pairs of whole numbers from 1 to {most:,}"
        return tuple(map(tuple, self._get(key, REQUIRED, fits, kind)))

    def ids(self, key):
        """A token id or a list of them, as a set; empty where the key is absent."""
        listed = lambda v: v if isinstance(v, list) else [v]
        fits = lambda v: all(type(n) is int and abs(n) <= MOST for n in listed(v))
        return frozenset(listed(self._get(key, [], fits, "a token id or a list of them")))

    def flag(self, key, default=REQUIRED):
        """true or false."""
        return self._get(key, default, lambda v: type(v) is bool, "true or false")

    def choice(self, key, choices, default=REQUIRED):
        """One of a few values that are supported."""
        fits = lambda v: any(v == choice and type(v) is type(choice) for choice in choices)
        return self._get(key, default, fits, "one of " + ", ".join(map(repr, choices)))

    def refuse_unless(self, **expected):
        """Refuse by its name every key whose value asks for something that is not computed here."""
        for key, expects in expected.items():
            value = self.raw(key)
            if value is not None and value != expects:
                computed = "nothing like it" if expects is None else f"only {repr(expects)[:80]}"
                raise InputError(f"{key} in {self.where} is {repr(value)[:80]}, and {computed} is computed here")

    def text(self, key, default=REQUIRED):
        return self._get(key, default, lambda v: isinstance(v, str), "text")

    def texts(self):
        """All of the object, when every value of it is text."""
        self._read.update(self._values)
        if not all(isinstance(value, str) for value in self._values.values()):
            raise InputError(f"{self.where} must map names to text")
        return dict(self._values)

    def part(self, key, default=REQUIRED):
        """A nested object, as `Fields`: the same one at every call."""
        if key not in self._parts:
            values = self._get(key, default, lambda v: isinstance(v, dict), "an object")
            self._parts[key] = Fields(values, f"{key} of {self.where}")
        return self._parts[key]

    def beside(self, name, values, folder):
        """The object of another file of the folder, as `Fields` that belong to these: the same ones at every call."""
        return self._parts.setdefault(name, Fields(values, f"{folder}/{name}"))

    def raw(self, key, default=None):
        """The value as it stands."""
        self._read.add(key)
        return self._values.get(key, default)

    def unread(self):
        """Keys that say something which nobody has read and which is not known to be harmless; nested ones dotted."""
        own = [key for key, value in self._values.items() if value is not None and key not in self._read | HARMLESS]
        return sorted(own + [f"{name}.{key}" for name, part in self._parts.items() for key in part.unread()])

    def error(self, message):
        return InputError(f"{self.where} {message}")
