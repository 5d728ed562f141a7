"""Optimizer and random-generator state as named plain tensors and JSON values, and back.

Optimizer tensors are named <parameter>/<state>, such as "model.layers.0.self_attn.q_proj.lora_A.weight/exp_avg",
whatever the order of the parameters; torchao's 8-bit states are taken apart into /codes, /scale and /qmap (torchao
optim/subclass_8bit.py). Of a parameter that is divided over processes, the states are gathered and cut again. Numbers in the
state of an optimizer that someone has put into a recipe go to state.json.

8-bit states at another number of processes: blocks of 256 values run along the flattened tensor, and are whole in each part
(torchft/optim.py, `blocks_fit`), so that codes and scales are cut like the parameter, and nothing is lost. A state that has
no whole blocks in the new parts is decoded into fp32, exactly; one that was fp32 for that reason and now has them is
quantised anew.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchft.errors import UserError
from torchft.modules.sharding import cut, divided_like, gathered, local, rows_held
from torchft.optim import blocks_fit

ADAMW_STATES = {"step", "exp_avg", "exp_avg_sq"}
BLOCK = 256  # values that share a scale
PARTS_8BIT = ("codes", "scale", "qmap")
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def plain_name(name: str) -> str:
    """The parameter's name without what torch.compile and other wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The state as whole tensors by name, and as `flat_states` what is none; on processes but the first, empty tensors."""
    tensors, others = flat_states(optimizer, params)
    return {name: gathered(tensor) for name, tensor in tensors.items()}, others


def flat_states(
    optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The same as it lies: divided as the parameters are. Hyperparameters are the config's, not saved.

    What is no tensor, for state.json: "signed", of 8-bit states, and "numbers", also None.
    """
    tensors: dict[str, Tensor] = {}
    signed: dict[str, bool] = {}
    numbers: dict[str, float | None] = {}
    for name, param in params.items():
        for key, value in optimizer.state.get(param, {}).items():
            full_name = f"{plain_name(name)}/{key}"
            if not isinstance(value, Tensor):
                numbers[full_name] = value
            elif type(local(value)) is Tensor:
                tensors[full_name] = value
            else:
                parts, signed[full_name] = split_8bit(value)
                tensors |= {f"{full_name}/{part}": tensor for part, tensor in parts.items()}
    return tensors, {"signed": signed, "numbers": numbers}


def unflatten_optimizer(
    optimizer: torch.optim.Optimizer,
    params: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
    others: dict[str, Any],
) -> None:
    """Put a flattened state into `optimizer`, whose groups (learning rate, betas, ...) stay as they are.

    Raises UserError naming the first state that belongs to no parameter, is incomplete or has another shape; nothing
    has been changed then.
    """
    by_name = {plain_name(name): param for name, param in params.items()}
    put_states(optimizer, by_name, placed_states(optimizer, by_name, tensors, others))


def placed_states(
    optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], tensors: dict[str, Tensor], others: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Parameter (by plain name) -> state -> tensor laid out as the parameter, from whole tensors. Raises UserError."""
    states = _by_parameter(tensors, others.get("signed", {}), list(params))
    add_numbers(states, others)
    check_states(states, params, optimizer)
    place = _cut_8bit if in_8_bits(optimizer) else _cut
    for name, param in params.items():
        like_it = {key: isinstance(value, Tensor) and value.shape == param.shape for key, value in states[name].items()}
        states[name] = {key: place(key, value, param) if like_it[key] else value for key, value in states[name].items()}
    return states


def add_numbers(states: dict[str, dict[str, Any]], others: dict[str, Any]) -> None:
    """What of a flattened state is no tensor, to its parameter's."""
    for full_name, number in others.get("numbers", {}).items():
        name, _, key = full_name.rpartition("/")
        if name not in states:
            raise _of_no_parameter(full_name)
        states[name][key] = number


def _of_no_parameter(full_name: str) -> UserError:
    return UserError(f"optimizer state {full_name} belongs to no trained parameter of this run")


def in_8_bits(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torchao's."""
    return type(optimizer).__name__ == "AdamW8bit"


def put_states(
    optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], states: dict[str, dict[str, Tensor]]
) -> None:
    """Make these states, by plain name and laid out as the parameters, those of `optimizer`."""
    names = {param: name for name, param in params.items()}
    in_group_order = [param for group in optimizer.param_groups for param in group["params"]]
    by_index = {index: states[names[param]] for index, param in enumerate(in_group_order) if states[names[param]]}
    # load_state_dict moves each tensor to where this optimizer wants it: the step counter too, on CPU for torchao.
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})
    for index, state in by_index.items():
        loaded = optimizer.state[in_group_order[index]]
        for key, value in state.items():
            if isinstance(value, Tensor) and loaded[key].dtype != value.dtype:  # it gives integers the parameter's
                loaded[key] = value.to(loaded[key].device)


def _by_parameter(tensors: dict[str, Tensor], signed: dict[str, bool], names: list[str]) -> dict[str, dict[str, Any]]:
    """Parameter -> state -> tensor, 8-bit states put together."""
    states: dict[str, dict[str, Any]] = {name: {} for name in names}
    for full_name, tensor in tensors.items():
        name, key, *part = full_name.split("/")
        if name not in states:
            raise _of_no_parameter(full_name)
        if part:
            states[name].setdefault(key, {})[part[0]] = tensor
        else:
            states[name][key] = tensor
    for full_name, is_signed in signed.items():
        name, key = full_name.split("/")
        states[name][key] = join_8bit(states[name][key], is_signed)
    return states


def check_states(
    states: dict[str, dict[str, Any]], params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Raises UserError unless every parameter has all of AdamW's states, if it is one of ours, (or, never stepped, none), and
    moments have its shape.
    """
    expected = ADAMW_STATES if type(optimizer).__name__ in ("AdamW", "AdamWBf16", "AdamW8bit") else set()
    for name, state in states.items():
        if state and not expected <= set(state):
            raise UserError(f"optimizer state of {name} has {sorted(state)}, not step, exp_avg and exp_avg_sq")
        for key in ADAMW_STATES & set(state) - {"step"}:
            if state[key].shape != params[name].shape:
                raise UserError(
                    f"optimizer state {name}/{key} has shape {tuple(state[key].shape)}, "
                    f"the parameter {tuple(params[name].shape)}"
                )


def split_8bit(state: Tensor) -> tuple[dict[str, Tensor], bool]:
    """A torchao 8-bit state (same shape as its parameter) as its inner tensors, and whether its codes are signed.

    Of a divided one, codes and scale are divided likewise; gathered, the scale has one number per block in any shape.
    """
    from torchao.optim.subclass_8bit import OptimState8bit  # here: only who uses 8-bit AdamW pays for the import

    part = local(state)
    assert isinstance(part, OptimState8bit), f"unknown optimizer state {type(part)}"
    codes, scale = part.codes, part.scale
    if isinstance(state, DTensor):
        assert blocks_fit(state), f"an 8-bit state of shape {tuple(state.shape)} whose parts are not whole blocks"
        width = state.numel() // state.shape[0]
        codes = divided_like(codes, state)
        if width % BLOCK == 0:
            scale = divided_like(scale.view(-1, width // BLOCK), state)
        else:  # equal parts
            scale = DTensor.from_local(scale, state.device_mesh, state.placements, run_check=False)
    return {"codes": codes, "scale": scale, "qmap": part.qmap}, part.signed


def join_8bit(parts: dict[str, Tensor], signed: bool) -> Tensor:
    """What `split_8bit` took apart, as it was."""
    from torchao.optim.subclass_8bit import OptimState8bit

    if set(parts) != set(PARTS_8BIT):
        raise UserError(f"an 8-bit optimizer state has the parts {sorted(parts)}, not {sorted(PARTS_8BIT)}")
    return OptimState8bit(parts["codes"], parts["scale"].flatten(), parts["qmap"], signed, dtype=torch.float32)


def _cut(key: str, value: Tensor, param: Tensor) -> Tensor:
    """A whole state in the layout of its parameter."""
    return cut(value, param)


def _cut_8bit(key: str, value: Tensor, param: Tensor) -> Tensor:
    """The same for torchao's AdamW: in 8 bits where that has them for this parameter, else in fp32."""
    from torchao.optim.subclass_8bit import OptimState8bit

    in_8bit = isinstance(value, OptimState8bit)
    if not blocks_fit(param):
        return cut(value.dequantize() if in_8bit else value, param)
    if in_8bit:
        rows, width = rows_held(param), param.numel() // param.shape[0]
        blocks = slice(rows.start * width // BLOCK, rows.stop * width // BLOCK)
        part = OptimState8bit(value.codes[rows].clone(), value.scale[blocks].clone(), value.qmap, value.signed, value.dtype)
    else:
        held = local(cut(value, param))
        part = OptimState8bit.zeros(held.shape, key == "exp_avg", BLOCK, held.device, held.dtype).copy_(held)
    return divided_like(part, param)


def get_rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All generators that a run draws from: Python's, numpy's, torch's on CPU and, where in use, on the current GPU."""
    version, python_keys, python_gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    tensors = {
        "python": torch.tensor(python_keys, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    values = {
        "python": [version, python_gauss],
        "numpy": [numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]],
    }
    return tensors, values


def set_rng_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Undo whatever was drawn since `get_rng_state`."""
    version, python_gauss = values["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), python_gauss))
    position, has_gauss, gauss = values["numpy"]
    inner = {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": position}
    np.random.set_state({"bit_generator": "MT19937", "state": inner, "has_gauss": has_gauss, "gauss": gauss})
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
