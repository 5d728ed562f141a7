"""Reading a config.json without overlooking anything; what the fields mean together is in shapes.py and rope_fields.py.

A field that nobody reads changes the model's numbers in silence, so every field is either taken here, refused by name,
or in a written set of inert ones. `Fields` counts what was taken; `finish` refuses the rest.
"""

import math
from typing import Any

REQUIRED = object()

# Fields that cannot change what the network computes for given ids and weights: provenance, token ids, generation
# settings, outputs of transformers' classes that we do not have, and splittings of the same sums.
INERT = {
    *("architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash"),
    *("torch_dtype", "dtype", "torchscript", "use_bfloat16", "tf_legacy_loss"),  # the run's own dtype is an option
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
    *("tokenizer_class", "prefix", "task_specific_params", "finetuning_task", "problem_type", "id2label", "label2id"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "is_decoder"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),  # exact kernels of one function
    *("pretraining_tp", "chunk_size_feed_forward"),  # sums taken in slices
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature", "top_k", "top_p"),
    *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "num_return_sequences", "typical_p"),
    *("unsloth_fixed", "unsloth_version"),  # marks on re-uploaded copies
    "transformers.js_config",  # of the browser's runtime
}

# Fields that would change it: each is allowed only at the value that means "not used".
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "per_layer_config": (None,),
}

ADVICE = {
    "quantization_config": "The weights are stored quantised: use the unquantised one, with model.quantize=nf4.",
    "auto_map": "The model brings its own Python code, which is never run: use a checkpoint of the plain architecture.",
    "attention_dropout": "Dropout on attention weights is not implemented: set it to 0.0 in config.json.",
}


class Fields:
    """The fields of one config.json, each taken once by its name and type.

    Every method raises ValueError naming the field, what it holds and what would be right.
    """

    def __init__(self, hf: dict[str, Any], family: str, where: str = "config.json") -> None:
        self.family = family
        self.where = where
        self.left = dict(hf)

    def fail(self, key: str, value: Any, wanted: str) -> ValueError:
        return ValueError(f"{self.where}: {key} is {value!r}; {self.family} models need {wanted}.")

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        if key not in self.left:
            if default is REQUIRED:
                raise ValueError(f"{self.where}: {key} is missing; {self.family} models need it.")
            return default
        return self.left.pop(key)

    def integer(self, key: str, default: Any = REQUIRED) -> int:
        """A positive whole number; null counts as absent where there is a default."""
        value = self.take(key, default)
        if value is None and default is not REQUIRED:
            value = default
        if type(value) is not int or value <= 0:
            raise self.fail(key, value, "a whole number above 0")
        return value

    def derived(self, key: str, absent: int | None, null: int) -> int:
        """A positive whole number: `absent` if the field is not there, `null` if it is null or `absent` is None."""
        return self.integer(key, null) if key in self.left or absent is None else absent

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A positive, finite number."""
        value = self.take(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.fail(key, value, "a number above 0")
        return float(value)

    def optional_number(self, key: str, default: float | None = None) -> float | None:
        """A positive, finite number, or null for none; absent is `default`."""
        if self.left.get(key, default) is None:
            return self.take(key, None)
        return self.number(key, default)

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        value = self.take(key, default)
        if type(value) is not bool:
            raise self.fail(key, value, "true or false")
        return value

    def optional_dict(self, key: str) -> dict[str, Any]:
        """An object of settings; absent and null are empty."""
        value = self.take(key, None)
        if value is not None and not isinstance(value, dict):
            raise self.fail(key, value, "an object of settings, or null")
        return value or {}

    def finish(self, inert: frozenset[str] = frozenset()) -> None:
        """Refuse every field that was not taken, is not inert (here or in the family's own set) and not neutral."""
        for key, value in self.left.items():
            if key in INERT or key in inert:
                continue
            if key not in NEUTRAL:
                raise ValueError(
                    f"{self.where}: {key} ({value!r}) is not a known field of {self.family} models, and could "
                    "change what they compute. If it cannot, delete it there, or add it to INERT in models/fields.py."
                )
            if value not in NEUTRAL[key]:
                advice = ADVICE.get(key, f"Only {NEUTRAL[key][0]!r} is supported.")
                raise ValueError(f"{self.where}: {key} is {value!r}, which cannot be honoured. {advice}")
