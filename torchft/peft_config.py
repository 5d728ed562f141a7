"""adapter_config.json, PEFT's description of an adapter: written, and read strictly.

What such a file says and we do not honour is refused by name: ignoring it would load another model than the one that
was trained. Source of the fields: peft 0.21, `LoraConfig`.
"""

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchft.errors import UserError
from torchft.modules.lora import LoraSpec
from torchft.modules.vocab import PATHS
from torchft.safetensors_header import unique_keys

CONFIG = "adapter_config.json"

# Fields that change nothing here. Any other is read below, or refused unless it is empty.
INERT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("megatron_core", "qalora_group_size"),  # of features whose own switch is refused
}
MERGE_FIRST = "merge the adapter into its base with peft, then start from the result"
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal")  # the others change the base weights too, or the ranks


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says."""

    spec: LoraSpec
    modules_to_save: tuple[str, ...]  # trained whole: of embed_tokens, lm_head
    base_path: str  # as it was when the adapter was saved; may mean nothing on this machine


def peft_fields(
    spec: LoraSpec, modules_to_save: tuple[str, ...], base_path: str, *, tied: bool, parameters: dict[str, str] | None = None
) -> dict[str, Any]:
    """The content of adapter_config.json.

    tied: the modules are two names of one weight, which PEFT shall keep so. parameters: those of the spec's targets that are
    parameters to PEFT, with its name for them (gpt-oss's experts and router).
    """
    parameters = parameters or {}
    assert spec.target_modules != ("all-linear",), "written out by name: PEFT's own rule for it may change"
    fields = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": [target for target in spec.target_modules if target not in parameters] or None,
        "task_type": "CAUSAL_LM",
        "use_dora": spec.use_dora,
        "use_rslora": spec.use_rslora,
    }
    if parameters:
        fields["target_parameters"] = sorted(parameters.values())
    return fields | {"ensure_weight_tying": True} if tied else fields


def read_adapter(path: str | Path) -> AdapterConfig:
    """Read the adapter_config.json in directory `path`.

    Raises:
        UserError: there is none, it is no LoRA for a causal language model, or a field asks for what is not done here.
    """
    file = Path(path) / CONFIG
    fields = _Fields(file, _read_object(file))
    fields.expect("peft_type", ("LORA",))
    fields.expect("task_type", ("CAUSAL_LM", None))
    fields.expect("bias", ("none", None))
    fields.expect("init_lora_weights", PLAIN_INITS)
    base_path = fields.left.get("base_model_name_or_path")
    modules_to_save = fields.modules_to_save()
    targets = fields.targets()
    numbers = {
        "rank": fields.integer("r"),
        "alpha": fields.number("lora_alpha"),
        "dropout": fields.number("lora_dropout", 0.0),
    }
    flags = {key: fields.flag(key) for key in ("use_rslora", "use_dora")}
    fields.refuse_the_rest()
    try:
        spec = LoraSpec(**numbers, **flags, target_modules=targets)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    return AdapterConfig(spec, modules_to_save, base_path if isinstance(base_path, str) else "")


def other_base(adapter: str | Path, base: str | Path) -> str:
    """A warning if `adapter` names another base model than `base`, else "": shapes do not tell base from instruct.

    Folders are renamed and moved, so that it is the last part of the name that must agree, in any of its forms.
    """
    said = read_adapter(adapter).base_path
    if not said or _names(said) & _names(base):
        return ""
    known = f"WARNING: {Path(adapter) / CONFIG} names {said!r} as the adapter's base, and this is {base}"
    return f"{known}; unless that is the same model under another name, the adapter will not do what it was trained to do"


def _names(model: str | Path) -> set[str]:
    """What a model may be called, by its hub name or directory: as written, behind links, in the hub's cache."""
    path = Path(model)
    names = [path.name, *(part.rpartition("--")[2] for part in path.parts if part.startswith("models--"))]  # /snapshots/<commit>
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # a path of another machine
        names.append(path.resolve().name)
    return {name.lower() for name in names if name}


def _read_object(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_bytes().decode(), object_pairs_hook=unique_keys)
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); a PEFT adapter is a directory with this file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy the adapter again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file}: holds a {type(fields).__name__}, not an object of fields")
    return fields


class _Fields:
    """The fields of one adapter_config.json, each taken once by name and type; errors name the file and the field."""

    def __init__(self, file: Path, fields: dict[str, Any]) -> None:
        self.file, self.left = file, dict(fields)

    def error(self, key: str, value: Any, wanted: str) -> UserError:
        return UserError(f"{self.file}: {key} is {value!r}; {wanted}")

    def expect(self, key: str, accepted: tuple[Any, ...]) -> None:
        value = self.left.pop(key, None)
        if value not in accepted:
            raise self.error(
                key,
                value,
                f"only {accepted[0]!r} is supported; {MERGE_FIRST}",
            )

    def integer(self, key: str) -> int:
        value = self.left.pop(key, None)
        if type(value) is not int:
            raise self.error(key, value, "it must be a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.left.pop(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.error(key, value, "it must be a number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.left.pop(key, None)
        if value is not None and type(value) is not bool:
            raise self.error(key, value, "it must be true or false")
        return bool(value)

    def names(self, key: str) -> list[str]:
        value = self.left.pop(key, None)
        if not isinstance(value, list | type(None)) or not all(isinstance(name, str) for name in value or []):
            raise self.error(key, value, "it must be a list of module names; regular expressions are not read")
        return value or []

    def targets(self) -> tuple[str, ...]:
        if self.left.get("target_modules") == "all-linear":
            return (self.left.pop("target_modules"),)
        parameters = [name.removesuffix(".weight") for name in self.names("target_parameters")]  # of linears
        targets = self.names("target_modules") + parameters
        if not targets:
            raise self.error("target_modules", targets, 'it must name linears, or be "all-linear"')
        return tuple(targets)

    def modules_to_save(self) -> tuple[str, ...]:
        """In our order. With ensure_weight_tying PEFT trains both ends of a tied model, named by other paths."""
        names, tying = self.names("modules_to_save"), self.flag("ensure_weight_tying")
        leaves = {name.rpartition(".")[2] for name in names}
        if not leaves <= PATHS.keys():
            raise self.error("modules_to_save", names, f"only {' and '.join(PATHS)} can be trained whole")
        return tuple(name for name in PATHS if name in leaves or (leaves and tying))

    def refuse_the_rest(self) -> None:
        for key, value in self.left.items():
            if key not in INERT and value not in (None, False, "", [], {}):
                raise self.error(key, value, f"without it the adapter would compute something else; {MERGE_FIRST}")
