"""Checkpoints: saved whole or not at all, found only if they verify, continued bit for bit.

    out/step_000500/   params.safetensors     the trained parameters, by name
                       optimizer.safetensors  moments and step counters, by parameter name (optimizer_state.py)
                       rng.safetensors        generators of Python, numpy, torch on CPU and GPU
                       state.json             the recipe's own state, the config, scalars of the above
                       manifest.json          step, validation loss, size and sha256 of each file (atomic.py)

The base weights are not in it: they are read from the model directory again. Nothing is pickled. A kill loses at most
`run.save_every` steps. On several processes the first one writes and reads, tensors are whole in the files, and so a
run may go on with another number of them. Left out: what recipes that train all weights save in parts (parts.py).
"""

import json
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchft.agreement import check_same_options, differences
from torchft.atomic import atomic_directory, write_bytes
from torchft.crash import another_failed
from torchft.distributed import from_all, from_main, tensors_from_main
from torchft.errors import UserError
from torchft.modules.sharding import cut, gathered
from torchft.optimizer_state import flatten_optimizer, get_rng_state, plain_name, set_rng_state, unflatten_optimizer
from torchft.ranks import rank, world_size
from torchft.redact import redact
from torchft.run_dir import FORMAT, checkpoint_path, checkpoints, leftovers, prune, remove_leftovers, verify_checkpoint

# What a continued run may change: how long, how often, where to, how fast. The data, the model and the adapter stay.
MAY_CHANGE = re.compile(
    r"(run|optim)\..+|model\.(compile|activation_checkpointing|offload|shard|kernels.*)|data\.max_bad_rows|dpo\.reference"
)
MUST_STAY = ("optim.name", "run.seed", "run.global_batch_size")
TENSOR_FILES = ("params", "optimizer", "rng")
RNG_FILE, STATE_FILE = "rng.safetensors", "state.json"
NOT_SAID = ("run.resume",)  # differs whenever a run is continued


def save_checkpoint(
    out: str | Path,
    step: int,
    *,
    params: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    config: dict[str, Any],
    keep_last: int,
    valid_loss: float | None = None,
) -> Path:
    """Write out/step_<step>/ after `step` optimizer steps and verify it; then remove all but the last `keep_last`.

    `state`: whatever the recipe needs to continue, JSON values only. `valid_loss`: given, the checkpoint takes part in
    keep-best: the one with the lowest is never removed. Raises UserError if it cannot be written or does not verify;
    older checkpoints are untouched then.
    """
    out = Path(out)
    optimizer_tensors, others = flatten_optimizer(optimizer, params)
    generators, numbers = all_generators()
    files = {
        "params.safetensors": {plain_name(name): gathered(param.detach()) for name, param in params.items()},
        "optimizer.safetensors": optimizer_tensors,
        RNG_FILE: generators,
    }
    values = state_values(state, config, optimizer) | others | {"rng": numbers}
    facts = manifest_facts(FORMAT, step, valid_loss)
    # The other processes wait here, however slow the disk is, and not in a collective of their GPUs, which would time out.
    return from_main(lambda: _write_checkpoint(out, files, values, facts, keep_last))


def all_generators() -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The random states of all processes: tensors named <rank>/<generator>, and by rank what JSON holds."""
    states = from_all(get_rng_state())
    tensors = {f"{n}/{name}": tensor for n, (held, _) in enumerate(states) for name, tensor in held.items()}
    return tensors, [numbers for _, numbers in states]


def restore_generators(tensors: dict[str, Tensor], numbers: list[dict[str, Any]], step: int) -> None:
    """This process's random states; of another number of processes, dropout masks that no step so far has had."""
    if len(numbers) != world_size():
        torch.manual_seed((torch.initial_seed() + 1_000_003 * step) % 2**63)
        return
    mine = f"{rank()}/"
    states = {name.removeprefix(mine): tensor for name, tensor in tensors.items() if name.startswith(mine)}
    set_rng_state(states, numbers[rank()])


def state_values(state: dict[str, Any], config: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What state.json holds in every kind of checkpoint."""
    return {"state": state, "config": redact(config), "optimizer": type(optimizer).__name__}


def manifest_facts(form: str, step: int, valid_loss: float | None) -> dict[str, Any]:
    """What manifest.json says beside its files."""
    finite = valid_loss is not None and math.isfinite(valid_loss)
    return {"format": form, "step": step, "valid_loss": valid_loss if finite else None}


def state_text(values: dict[str, Any]) -> bytes:
    """state.json as it is written."""
    return json.dumps(values, indent=1, allow_nan=False).encode()


def _write_checkpoint(
    out: Path, files: dict[str, dict[str, Tensor]], values: dict[str, Any], facts: dict[str, Any], keep_last: int
) -> Path:
    text = state_text(values)
    needed_bytes = len(text) + sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    remove_leftovers(out)
    final = checkpoint_path(out, facts["step"])
    with atomic_directory(final, facts, needed_bytes) as folder:
        for name, tensors in files.items():
            save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, folder / name)
        write_bytes(folder / STATE_FILE, text)
    verify_checkpoint(final)
    prune(out, keep_last)
    return final


def load_checkpoint(
    path: str | Path,
    *,
    params: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    unchanged: dict[str, Any],
) -> dict[str, Any]:
    """Put a checkpoint back into parameters, optimizer and all random generators; returns its `state` and its `step`.

    `unchanged`: entries of `state` that must be equal now, such as the training data's fingerprint. Draw no random
    number between this call and the next step. Raises UserError naming the tensor or entry that does not fit; nothing
    has been changed then.
    """
    path = Path(path)
    step, values = from_main(lambda: (verify_checkpoint(path, form=FORMAT)["step"], read_state(path)))
    tensors = {name: tensors_from_main(lambda: _read_tensors(path / f"{name}.safetensors")) for name in TENSOR_FILES}  # noqa: B023
    check_same_run(path, values, optimizer, unchanged)
    check_params(path, tensors["params"], {plain_name(name): param for name, param in params.items()})
    unflatten_optimizer(optimizer, params, tensors["optimizer"], values)
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(cut(tensors["params"][plain_name(name)], param))
    restore_generators(tensors["rng"], values["rng"], step)
    return values["state"] | {"step": step}


def check_same_run(
    path: Path, values: dict[str, Any], optimizer: torch.optim.Optimizer, unchanged: dict[str, Any]
) -> None:
    """Raises UserError where state.json (`values`) is that of another run: other data, another optimizer."""
    for name, now in unchanged.items():
        then = values["state"].get(name)
        if then != now:
            raise UserError(
                f"{path} was saved with another {name} ({then!r} then, {now!r} now): it would not be the same run; "
                "put it back, or start anew with run.resume=never"
            )
    if values["optimizer"] != type(optimizer).__name__:
        raise UserError(f"{path} was saved with the optimizer {values['optimizer']}: optim.name must stay what it was")


def read_state(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / STATE_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path / STATE_FILE} cannot be read: {error}") from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        # Copies: on CPU, what is read are the file's own pages, and AdamW writes into its state.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def check_params(path: Path, saved: dict[str, Tensor], params: dict[str, nn.Parameter]) -> None:
    """Raises UserError unless both sides have the same names, shapes and dtypes; `saved` may be on meta."""
    for name in sorted(saved.keys() ^ params.keys()):
        where = "trained now but not in the checkpoint" if name in params else "in the checkpoint but not trained now"
        raise UserError(f"{path}: parameter {name} is {where}")
    for name, param in params.items():
        then, now = (f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (saved[name], param))
        if then != now:
            raise UserError(f"{path}: parameter {name} is {then} in the checkpoint, {now} in this run")


def find_checkpoint(
    out: str | Path, resume: str, config: dict[str, Any], say: Callable[[str], None] = print
) -> Path | None:
    """The checkpoint to continue from, None for a fresh start; what was chosen, skipped and changed is said.

    `resume`: never; auto (the newest in `out` that verifies, else a fresh start); or a checkpoint directory, which must
    verify. Raises UserError where that one does not, or where `config` differs in what a continued run must keep, or from
    another process's.
    """
    check_same_options(config)
    return from_main(lambda: _find_checkpoint(Path(out), resume, config, say))


def _find_checkpoint(out: Path, resume: str, config: dict[str, Any], say: Callable[[str], None]) -> Path | None:
    if resume == "never":
        return None
    if resume != "auto":
        path = Path(resume)
        if checkpoints(path):
            raise UserError(f"run.resume={resume} is a run's directory: use run.out={resume} run.resume=auto")
        manifest = verify_checkpoint(path)
        if path.resolve().parent != out.resolve() and checkpoints(out):
            raise UserError(f"run.out={out} has checkpoints of its own: use run.resume=auto, or another run.out")
        return _continue_from(path, manifest, config, say)
    for leftover in leftovers(out):
        say(f"resume: ignored {leftover}, which a crash cut short")
    for path in reversed(checkpoints(out).values()):
        try:
            manifest = verify_checkpoint(path)
        except UserError as error:
            say(f"resume: skipped {path}: {error}")
            continue
        return _continue_from(path, manifest, config, say)
    say(f"resume: no usable checkpoint in {out}, starting from the beginning")
    return None


def _continue_from(path: Path, manifest: dict[str, Any], config: dict[str, Any], say: Callable[[str], None]) -> Path:
    """Say what changed since `path` was saved, or refuse it."""
    changed = differences(read_state(path)["config"], redact(config))
    refused = {key: pair for key, pair in changed.items() if key in MUST_STAY or not MAY_CHANGE.fullmatch(key)}
    if refused:
        lines = "".join(f"\n  {key}: {then!r} then, {now!r} now" for key, (then, now) in refused.items())
        raise UserError(
            f"{path} cannot be continued with another value of{lines}\n"
            "put it back, or start anew (run.resume=never and another run.out)"
        )
    say(f"resume: continuing {path} after step {manifest['step']}")
    for key, (then, now) in changed.items():
        if key not in NOT_SAID:
            say(f"resume: changed {key}: {then!r} -> {now!r}")
    return path


class StopSignal:
    """Turns SIGTERM (a preempted machine) and Ctrl-C into a number that the recipe reads between steps.

    `exit_code` is 0 until then, and after it the shell's for that signal: 128 + its number. A second Ctrl-C quits at
    once; a second SIGTERM changes nothing, since launchers send it to the process and to its group. Of several processes,
    which all get the signal from the launcher, the first says so, unless the signal comes because another has failed.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.exit_code = 128 + number
        if rank() > 0 or another_failed():
            return
        more = "; Ctrl-C to quit at once"
        if world_size() > 1:  # a process that the kernel killed has left no error file
            more = ", unless a process has failed" if number == signal.SIGTERM else ""
        # os.write: print could be interrupted inside itself by this very handler
        os.write(2, f"\n{signal.Signals(number).name}: saving after this step{more}\n".encode())

    def close(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
