"""RoPE settings of a config.json -> RopeConfig, in both spellings.

transformers 5 writes `rope_parameters`; before it there were `rope_theta` and `rope_scaling`, whose kind is its `rope_type`, or
in older files `type`. A kind or a setting that is not known is refused by name.
Source: transformers, modeling_rope_utils.py.
"""

import math
from collections.abc import Callable
from typing import Any

from torchft.models.fields import Fields
from torchft.modules.rope import RopeConfig


def read_rope(fields: Fields, head_dim: int, max_positions: int, theta: float = 10000.0, **others: Any) -> RopeConfig:
    """The settings of all layers. theta: where the file has none; others: as in `read_settings`."""
    new, old = fields.optional_dict("rope_parameters"), fields.optional_dict("rope_scaling")
    if new and old and new != old:
        raise fields.fail("rope_scaling", old, f"the same as rope_parameters, {new!r}, or only one of the two")
    settings = Fields(new or old, fields.family, f"config.json, {'rope_parameters' if new else 'rope_scaling'}")
    return read_settings(settings, head_dim, max_positions, fields.number("rope_theta", theta), **others)


def read_partial(fields: Fields, absent: float) -> float:
    """`partial_rotary_factor`, the share of a head that is rotated; for families that have it."""
    value = fields.number("partial_rotary_factor", absent)
    if value > 1:
        raise fields.fail("partial_rotary_factor", value, "a number above 0, and 1 at most")
    return value


def read_settings(
    settings: Fields,
    head_dim: int,
    max_positions: int,
    theta: float,
    partial: float | None = None,
    original: int | None = None,
    interleaved: bool = False,
) -> RopeConfig:
    """One object of settings, all of which must be known.

    theta, partial: where the settings hold none; None = this family does not rotate heads in part.
    original: `original_max_position_embeddings` where the file has it beside the settings (Phi-3).
    """
    kind = _rope_kind(settings)
    theta = settings.number("rope_theta", theta)
    share = 1.0 if partial is None else read_partial(settings, partial)
    width = int(head_dim * share)
    if width % 2 or width == 0:
        raise settings.fail("partial_rotary_factor", share, f"an even number of the {head_dim} dimensions of a head to be rotated")
    if original is not None and settings.left.setdefault("original_max_position_embeddings", original) != original:
        given = settings.left["original_max_position_embeddings"]
        raise settings.fail("original_max_position_embeddings", given, f"the same there and beside it, where it is {original}")
    if original is not None and kind in ("default", "linear", "dynamic"):  # which have no use for it
        settings.take("original_max_position_embeddings")
    stretch = ROPE_READERS[kind](settings, max_positions, width)
    settings.finish()
    return RopeConfig(head_dim, theta, kind, partial_rotary_factor=share, interleaved=interleaved, **stretch)


def _rope_kind(settings: Fields) -> str:
    """`rope_type`, which older files call `type` and some hold under both names."""
    kind, legacy_kind = settings.take("rope_type", None), settings.take("type", None)
    if kind and legacy_kind and kind != legacy_kind:
        raise settings.fail("type", legacy_kind, f"the same as rope_type, {kind!r}")
    kind = kind or legacy_kind or "default"
    kind = "longrope" if kind == "su" else kind  # Phi-3's first name for it
    if kind not in list(ROPE_READERS):  # a list, since what stands there may not be hashable
        raise settings.fail("rope_type", kind, "one of " + ", ".join(ROPE_READERS))
    return kind


def _read_dynamic(settings: Fields, max_positions: int, width: int) -> dict[str, Any]:
    if width == 2:
        raise settings.fail("rope_type", "dynamic", "more than 2 rotated dimensions for it")
    return {"factor": settings.number("factor"), "original_max_positions": max_positions}


def _read_llama3(settings: Fields, max_positions: int, width: int) -> dict[str, Any]:
    factor, low, high = (settings.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if not low < high:
        raise settings.fail("high_freq_factor", high, f"a number above low_freq_factor, which is {low}")
    return {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_positions": settings.integer("original_max_position_embeddings", max_positions),
    }


def _read_yarn(settings: Fields, max_positions: int, width: int) -> dict[str, Any]:
    return {
        "factor": settings.number("factor"),
        "original_max_positions": settings.integer("original_max_position_embeddings", max_positions),
        "beta_fast": settings.number("beta_fast", 32.0),
        "beta_slow": settings.number("beta_slow", 1.0),
        "truncate": settings.flag("truncate", True),
        "attention_factor": settings.number("attention_factor") if "attention_factor" in settings.left else None,
    }


def _read_longrope(settings: Fields, max_positions: int, width: int) -> dict[str, Any]:
    """`factor` alone sets the tables' scale; without it, it is the ratio of the longest to the original context."""
    original = settings.integer("original_max_position_embeddings", max_positions)
    return {
        "factor": settings.optional_number("factor") or max_positions / original,
        "original_max_positions": original,
        "attention_factor": settings.optional_number("attention_factor"),
        "short_factors": _read_factors(settings, "short_factor", width // 2),
        "long_factors": _read_factors(settings, "long_factor", width // 2),
    }


def _read_factors(settings: Fields, key: str, count: int) -> tuple[float, ...]:
    values = settings.take(key)
    numbers = isinstance(values, list) and all(type(v) in (int, float) and 0 < v < math.inf for v in values)
    if not numbers or len(values) != count:
        raise settings.fail(key, values, f"a list of {count} numbers above 0, one for each pair of rotated dimensions")
    return tuple(float(value) for value in values)


ROPE_READERS: dict[str, Callable[[Fields, int, int], dict[str, Any]]] = {
    "default": lambda settings, max_positions, width: {},
    "linear": lambda settings, max_positions, width: {"factor": settings.number("factor")},
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
}
