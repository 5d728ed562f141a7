"""Reading a config.json without overlooking anything.

A field that nobody reads changes the model's numbers in silence, so every field is either taken here, refused by name,
or in a written set of inert ones. `Fields` counts what was taken; `finish` refuses the rest.
"""

import math
from collections.abc import Callable
from typing import Any

from torchft.modules.rope import RopeConfig

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

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A positive, finite number."""
        value = self.take(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.fail(key, value, "a number above 0")
        return float(value)

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


def read_shape(
    fields: Fields, default_kv_heads: int | None = None, default_head_dim: int | None = None
) -> dict[str, Any]:
    """The TransformerConfig fields that all families share, with transformers' defaults for what is absent."""
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    # An absent field has the family's default in transformers; null means what follows from the other shapes.
    absent_kv_heads = None if "num_key_value_heads" in fields.left else default_kv_heads
    absent_head_dim = None if "head_dim" in fields.left else default_head_dim
    num_kv_heads = fields.integer("num_key_value_heads", absent_kv_heads or num_heads)
    if num_heads % num_kv_heads != 0:
        raise fields.fail("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads = {num_heads}")
    if absent_head_dim is None and fields.left.get("head_dim") is None and hidden_size % num_heads != 0:
        raise fields.fail("hidden_size", hidden_size, f"a multiple of num_attention_heads = {num_heads}, or head_dim")
    head_dim = fields.integer("head_dim", absent_head_dim or hidden_size // num_heads)
    if head_dim % 2 != 0:
        raise fields.fail("head_dim", head_dim, "an even number, for RoPE")
    max_positions = fields.integer("max_position_embeddings")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope": read_rope(fields, head_dim, max_positions),
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "initializer_range": fields.number("initializer_range", 0.02),
    }


def read_rope(fields: Fields, head_dim: int, max_positions: int) -> RopeConfig:
    """RoPE settings from `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling` (before)."""
    new, old = fields.optional_dict("rope_parameters"), fields.optional_dict("rope_scaling")
    if new and old and new != old:
        raise fields.fail("rope_scaling", old, f"the same as rope_parameters, {new!r}, or only one of the two")
    settings = Fields(new or old, fields.family, f"config.json, {'rope_parameters' if new else 'rope_scaling'}")
    kind = _rope_kind(settings)
    theta = settings.number("rope_theta", fields.number("rope_theta", 10000.0))
    stretch = ROPE_READERS[kind](settings, max_positions)
    settings.finish()
    return RopeConfig(head_dim=head_dim, theta=theta, kind=kind, **stretch)


def _rope_kind(settings: Fields) -> str:
    """`rope_type`, which older files call `type` and some hold under both names."""
    kind, legacy_kind = settings.take("rope_type", None), settings.take("type", None)
    if kind and legacy_kind and kind != legacy_kind:
        raise settings.fail("type", legacy_kind, f"the same as rope_type, {kind!r}")
    kind = kind or legacy_kind or "default"
    if kind not in list(ROPE_READERS):  # a list, since what stands there may not be hashable
        raise settings.fail("rope_type", kind, "one of " + ", ".join(ROPE_READERS))
    return kind


def _read_llama3(settings: Fields, max_positions: int) -> dict[str, Any]:
    factor, low, high = (settings.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if not low < high:
        raise settings.fail("high_freq_factor", high, f"a number above low_freq_factor, which is {low}")
    return {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_positions": settings.integer("original_max_position_embeddings", max_positions),
    }


def _read_yarn(settings: Fields, max_positions: int) -> dict[str, Any]:
    return {
        "factor": settings.number("factor"),
        "original_max_positions": settings.integer("original_max_position_embeddings", max_positions),
        "beta_fast": settings.number("beta_fast", 32.0),
        "beta_slow": settings.number("beta_slow", 1.0),
        "truncate": settings.flag("truncate", True),
        "attention_factor": settings.number("attention_factor") if "attention_factor" in settings.left else None,
    }


ROPE_READERS: dict[str, Callable[[Fields, int], dict[str, Any]]] = {
    "default": lambda settings, max_positions: {},
    "linear": lambda settings, max_positions: {"factor": settings.number("factor")},
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}


def read_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Qwen's sliding windows, per layer: `layer_types` where given, else the layers from `max_window_layers` on.

    None of them has one unless `use_sliding_window` is true.
    """
    used = fields.flag("use_sliding_window", False)
    window = read_window(fields)
    first = fields.take("max_window_layers", 28)
    if type(first) is not int or first < 0:
        raise fields.fail("max_window_layers", first, "a whole number, 0 or more")
    window = window if used else None
    kinds = fields.take("layer_types", None)
    if kinds is None:
        kinds = ["full_attention"] * min(first, num_layers) + ["sliding_attention"] * (num_layers - first)
    else:
        _check_kinds(fields, kinds, num_layers, window)
    return () if window is None else tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_window(fields: Fields) -> int | None:
    """`sliding_window`: tokens, null for none, 4,096 if absent (as in transformers)."""
    window = fields.take("sliding_window", 4096)
    if window is not None and (type(window) is not int or window <= 0):
        raise fields.fail("sliding_window", window, "a whole number above 0, or null for none")
    return window


def _check_kinds(fields: Fields, kinds: Any, num_layers: int, window: int | None) -> None:
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise fields.fail("layer_types", kinds, f"{num_layers} times full_attention or sliding_attention")
    if "sliding_attention" in kinds and window is None:
        raise fields.fail("layer_types", kinds, "use_sliding_window true and a sliding_window for that")
