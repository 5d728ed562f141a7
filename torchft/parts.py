"""Checkpoints of models trained whole, and of dpo_distributed: every process writes its part while the next steps already run.

    out/step_000500/   shard-00002-model-00001-of-00007.safetensors   of process 1 (counted from 0): its rows of parameters,
                                                                      params/<name>, and moments, optimizer/<name>/<state>
                       rng.safetensors, state.json, manifest.json     as in checkpoint.py, by process 0

The tensors go through torch.distributed.checkpoint with its safetensors storage, which fits them together again for any
number of processes. Only its plain tensors are used; everything else is JSON. A step is copied to the host's memory first,
which is what the run waits for, and written by a thread with a process group of its own. It gets its name when all
parts are on the disk, so a kill loses at most the steps since the last finished save. Left out: several directories
instead of one that all nodes see.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from torchft.atomic import atomic_directory, not_written, write_bytes
from torchft.checkpoint import (
    RNG_FILE,
    STATE_FILE,
    all_generators,
    check_params,
    check_same_run,
    manifest_facts,
    read_state,
    restore_generators,
    state_text,
    state_values,
)
from torchft.distributed import HOST_TIMEOUT, from_all, from_main, highest
from torchft.errors import UserError
from torchft.model_dir import available_memory
from torchft.modules.sharding import local
from torchft.optimizer_state import add_numbers, check_states, flat_states, in_8_bits, placed_states, plain_name, put_states
from torchft.ranks import rank
from torchft.run_dir import FORMAT_OF_PARTS, checkpoint_path, prune, remove_leftovers, verify_checkpoint

FILE_BYTES = 2**30  # of one process's tensors in one file, which is held in memory twice while it is written
PARAMS, OPTIMIZER = "params/", "optimizer/"


class PartsWriter:
    """Saves one step at a time in the background. Every process has one, and calls its methods at the same steps."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        _require_shared(self.out)
        self._group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)  # the thread's own: it talks beside the others
        self._thread = ThreadPoolExecutor(1, "save")
        self._saving: Future | None = None

    def save(
        self,
        step: int,
        *,
        params: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        config: dict[str, Any],
        keep_last: int,
        valid_loss: float | None = None,
    ) -> None:
        """Begin out/step_<step>/, as checkpoint.save_checkpoint makes it; waits for the one before, and for the copy.

        Where the host's memory cannot hold the copy, the step is written from where it is, and the run waits for that.
        Raises UserError if the save before could not be written.
        """
        self.wait()
        states, others = flat_states(optimizer, params)
        tensors = {PARAMS + plain_name(name): param.detach() for name, param in params.items()}
        tensors |= {OPTIMIZER + name: tensor for name, tensor in states.items()}
        generators, numbers = all_generators()
        values = state_values(state, config, optimizer) | others | {"rng": numbers}
        facts = manifest_facts(FORMAT_OF_PARTS, step, valid_loss)
        copied = not highest(int(_bytes_held(tensors) * 1.2 > available_memory() / _processes_here()))
        staged = _copied(tensors) if copied else tensors
        self._saving = self._thread.submit(self._write, staged, generators, state_text(values), facts, keep_last)
        if not copied:
            self.wait()

    def check(self) -> None:
        """Raises what made a save in the background fail; UserError for a full or failing disk."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Return once the last save is whole and has its name; raises as `check`."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _write(
        self, tensors: dict[str, Tensor], generators: dict[str, Tensor], text: bytes, facts: dict[str, Any], keep_last: int
    ) -> None:
        final = checkpoint_path(self.out, facts["step"])
        if rank() > 0:
            try:
                self._write_part(tensors, final)
            except OSError as error:  # the same words as process 0's: whichever leaves first is heard
                raise not_written(final, error) from None
            return
        remove_leftovers(self.out)
        needed = len(text) + sum(tensor.numel() * tensor.element_size() for tensor in (tensors | generators).values())
        with atomic_directory(final, facts, needed) as folder:
            self._write_part(tensors, final)
            save_file(generators, folder / RNG_FILE)
            write_bytes(folder / STATE_FILE, text)
        prune(self.out, keep_last)

    def _write_part(self, tensors: dict[str, Tensor], final: Path) -> None:
        """This process's files, in the directory that the first process has made by now."""
        dist.barrier(self._group)
        temporary = final.with_name(final.name + ".tmp")
        files = _plan_files(tensors)
        with _plain_errors():
            writer = dcp.HuggingFaceStorageWriter(str(temporary), fqn_to_index_mapping=files, save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self._group)


def load_parts(
    path: str | Path, *, params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, unchanged: dict[str, Any]
) -> dict[str, Any]:
    """Put a checkpoint of PartsWriter back, on any number of processes; arguments and result as checkpoint.load_checkpoint.

    Raises UserError naming the tensor or entry that does not fit; nothing has been changed then.
    """
    path = Path(path)
    step, values = from_main(lambda: (verify_checkpoint(path, form=FORMAT_OF_PARTS)["step"], read_state(path)))
    check_same_run(path, values, optimizer, unchanged)
    reader = dcp.HuggingFaceStorageReader(str(path))
    saved = {
        name: torch.empty(info.size, dtype=info.properties.dtype, device="meta")
        for name, info in reader.read_metadata().state_dict_metadata.items()
    }
    by_name = {plain_name(name): param for name, param in params.items()}
    in_params, in_optimizer = (
        {name.removeprefix(group): like for name, like in saved.items() if name.startswith(group)} for group in (PARAMS, OPTIMIZER)
    )
    check_params(path, in_params, by_name)
    targets = {PARAMS + name: param.detach() for name, param in by_name.items()}
    if in_8_bits(optimizer):
        states = _read_8bit(reader, in_optimizer, values["signed"], by_name, optimizer)
    else:
        states = _empty_states(in_optimizer, by_name)
        targets |= {f"{OPTIMIZER}{name}/{key}": tensor for name, held in states.items() for key, tensor in held.items()}
        add_numbers(states, values)
        check_states(states, by_name, optimizer)
    dcp.load(targets, storage_reader=reader)
    put_states(optimizer, by_name, states)
    restore_generators(load_file(path / RNG_FILE), values["rng"], step)
    return values["state"] | {"step": step}


def _require_shared(out: Path) -> None:
    """Raises UserError unless all processes see the same directory: each will write its part into it."""

    def change(there: bool) -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            mark.touch() if there else mark.unlink()
        except OSError as error:
            raise UserError(f"run.out={out} cannot be written: {error}") from None

    mark = out / ".seen_by_all"
    from_main(lambda: change(there=True))
    blind = [number for number, seen in enumerate(from_all(mark.exists())) if not seen]
    from_main(lambda: change(there=False))
    if blind:
        raise UserError(
            f"run.out={out} of process 0 is not there for process(es) {', '.join(map(str, blind))}: each writes its part of "
            "a checkpoint, so name a directory on a file system that all nodes share"
        )


def _bytes_held(tensors: dict[str, Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors.values())


def _processes_here() -> int:
    """How many processes share this machine's memory."""
    return max(1, torch.cuda.device_count()) if torch.cuda.is_available() else dist.get_world_size()


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in the host's memory, which the next step does not change."""
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    return DefaultStager(options).stage(tensors)


def _plan_files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Tensor -> number of the file, counted from 1, so that no process has more than FILE_BYTES of them in one."""
    files, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        parts = tensor.device_mesh.size(tensor.device_mesh.ndim - 1) if isinstance(tensor, DTensor) else 1
        rows = tensor.shape[0] if tensor.ndim else 1
        size = tensor.numel() // max(1, rows) * -(-rows // parts) * tensor.element_size()
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        files[name], filled = number, filled + size
    return files


@contextmanager
def _plain_errors() -> Iterator[None]:
    """torch.distributed.checkpoint tells all processes of a failure in one of them; here it is the disk's, if it is that."""
    try:
        yield
    except CheckpointException as error:
        number, (cause, _) = sorted(error.failures.items())[0]
        if isinstance(cause, OSError):
            raise OSError(f"process {number}: {cause}") from None
        raise


def _empty_states(saved: dict[str, Tensor], params: dict[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Parameter -> state -> a tensor to read it into, divided as the parameter where it has its shape."""
    states: dict[str, dict[str, Tensor]] = {name: {} for name in params}
    for full_name, like in saved.items():
        name, _, key = full_name.rpartition("/")
        if name not in params:
            raise UserError(f"optimizer state {full_name} belongs to no trained parameter of this run")
        divided = like.shape == params[name].shape
        shape = params[name].detach() if divided else torch.empty(like.shape)
        states[name][key] = torch.empty_like(shape, dtype=like.dtype)
    return states


def _read_8bit(
    reader: dcp.HuggingFaceStorageReader,
    saved: dict[str, Tensor],
    signed: dict[str, bool],
    params: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> dict[str, dict[str, Tensor]]:
    """The same, filled: parameter by parameter whole, because blocks of 8 bits are cut in a way of their own."""
    states = {}
    for name, param in params.items():
        own = f"{name}/"
        tensors = {full: torch.empty(like.shape, dtype=like.dtype) for full, like in saved.items() if full.startswith(own)}
        dcp.load({OPTIMIZER + full: tensor for full, tensor in tensors.items()}, storage_reader=reader)
        kinds = {full: is_signed for full, is_signed in signed.items() if full.startswith(own)}
        states |= placed_states(optimizer, {name: param}, tensors, {"signed": kinds})
    return states
