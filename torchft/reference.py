"""The reference of preference losses where all weights are trained, so that no adapter can be switched off.

A frozen copy of the model takes its bytes in model.dtype, divided over the processes, and a forward for every batch. Computed
once before the first step it takes no memory, and no time after that first pass, which is as long as the copy's forwards in
one epoch; so that is the default. Of every pair that the run uses the numbers are kept on disk:

    out/reference.safetensors   train, valid: the log-probability of each supervised token, fp32, in nats, sample after sample

Batches of both datasets then bring them along (Batch.reference), token by token, so that losses and figures, the KL divergence
too, are those of the copy. They are computed in the very batches that training and validation make: in bf16, too, the
first step compares equal numbers. The file is used again where model, dtype and tokens are the same (the tokens tell of the
tokenizer, the chat template and the rows), whatever the loss and the number of processes. It appears whole or not at
all; a pass that is cut short starts over.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from torchft.atomic import replace_bytes
from torchft.checks import counted
from torchft.config import ModelConfig, PreferenceOptions, resolve_path
from torchft.data.cache import hash_arrays
from torchft.data.dataset import Dataset
from torchft.data.loader import Batch, Loader, eval_batches
from torchft.device import compile_blocks
from torchft.distributed import divide, from_main, highest_each, tensors_from_main
from torchft.errors import UserError
from torchft.export import safetensors_bytes
from torchft.fuse import fuse
from torchft.models import build_model, read_config
from torchft.modules.eval_mode import eval_mode
from torchft.modules.transformer import CausalLM
from torchft.ranks import rank, world_size
from torchft.weights import load_weights, random_weights

FILE = "reference.safetensors"


def label_logprobs(model: CausalLM, batch: Batch) -> Tensor:
    """The log-probability of each label in its branch, (B, T) fp32 in nats; 0 where nothing is supervised."""
    where = {"positions": batch.positions, "documents": batch.documents, "branches": batch.branches}
    return model(batch.input_ids, **where, labels=batch.labels, per_token=True)


def frozen_copy(cfg: ModelConfig, device: torch.device, seed: int, say: Callable[[str], None]) -> CausalLM:
    """The model at the start a second time, divided over the processes as one that is trained."""
    from torch.distributed.fsdp import FSDPModule  # here: its import takes half a second

    path, dtype = resolve_path(cfg.path), getattr(torch, cfg.dtype)
    with torch.device("meta"):
        copy = build_model(read_config(path))
    fuse(copy, cfg.kernels, device)  # the same products as the policy's, or they round otherwise
    compile_blocks(copy, cfg.compile, device, lambda text: None)
    say(f"reference: a frozen copy in {cfg.dtype}; {divide(copy, cfg, device, dtype, dtype)}")
    if cfg.weights == "random":
        random_weights(copy, seed=seed, device=device, dtype=dtype)
    else:
        load_weights(copy, path, device=device, dtype=dtype)
    if isinstance(copy, FSDPModule):  # no backward follows, for which the tables would stay gathered
        copy.set_reshard_after_forward(True, recurse=False)
    return copy.requires_grad_(False).eval()


def prepare_reference(
    options: PreferenceOptions,
    cfg: ModelConfig,
    model: CausalLM,
    stored: "StoredReference",
    device: torch.device,
    seed: int,
    say: Callable[[str], None],
) -> CausalLM | None:
    """With dpo.reference=copy a frozen copy; else None, and the batches of `stored` bring along what `model` says now.

    `seed`: of a copy with random weights.
    """
    if options.reference == "copy":
        return frozen_copy(cfg, device, seed, say)
    precompute(model, stored, device, say)
    return None


@torch.no_grad()
def precompute(model: CausalLM, stored: "StoredReference", device: torch.device, say: Callable[[str], None]) -> None:
    """Give all pairs of the run their reference: from the file of an earlier start, or by the model as it is now."""
    if stored.read(say):
        return
    say(f"reference: computing the log-probabilities of {counted(stored.num_pairs, 'pair')}, once, before the first step")
    with eval_mode(model):
        for name, batch in stored.batches():
            stored.put(name, batch, label_logprobs(model, batch.to(device)))
    stored.write()


class StoredReference:
    """The log-probabilities of a run's pairs. Every process has one, and calls its methods alike.

    Args:
        out: the run's directory.
        loader: of the training pairs; only those of its steps are computed.
        valid: validation pairs or None; `cells`: the other arguments of eval_batches.
        facts: what decides the numbers, names to texts: fingerprints of model and data, the dtype. An entry None stands for
            what is not there.
    """

    def __init__(
        self, out: Path, loader: Loader, valid: Dataset | None, cells: dict[str, Any], facts: dict[str, str | None]
    ) -> None:
        self._file, self._loader, self._cells = out / FILE, loader, cells
        self._datasets = {"train": loader.dataset} | ({"valid": valid} if valid else {})
        steps = [loader.step_samples(index) for index in range(loader.total_steps)]
        used = {"train": np.unique(np.concatenate(steps))} | ({"valid": np.arange(len(valid))} if valid else {})
        self._places = {name: supervised_places(self._datasets[name], samples) for name, samples in used.items()}
        self._facts = facts | {"choice of pairs": hashlib.sha256(used["train"].tobytes()).hexdigest()}
        self.num_pairs = sum(map(len, used.values()))
        self._found: dict[str, np.ndarray] = {}

    def read(self, say: Callable[[str], None]) -> bool:
        """Whether the file is there and fits, on all processes; the batches have it from now on. What does not fit is said."""
        values = tensors_from_main(lambda: self._read_file(say))
        if values:
            say(f"reference: log-probabilities of {counted(self.num_pairs, 'pair')} from {self._file}")
            self._attach(values)
        return bool(values)

    def batches(self) -> Iterator[tuple[str, Batch]]:
        """(dataset, batch) until every pair was in one, equally many on every process, with a progress bar on a terminal."""
        self._found = self._columns(-np.inf)
        known = np.zeros(len(self._loader.dataset), bool)
        bar = {"desc": "reference", "unit": " pairs", "leave": False, "disable": rank() > 0 or None}
        progress = tqdm(total=self.num_pairs, **bar)
        for index in range(self._loader.total_steps):
            samples = np.unique(self._loader.step_samples(index))
            new = int((~known[samples]).sum())
            if new:  # else it is a later epoch's
                yield from (("train", batch) for batch in self._loader.step(index))
            known[samples] = True
            progress.update(new)
        for batch in eval_batches(self._datasets["valid"], **self._cells) if "valid" in self._datasets else ():
            yield "valid", batch
            progress.update(min(batch.num_sequences // 2 * world_size(), self.num_pairs - progress.n))
        progress.close()

    def put(self, name: str, batch: Batch, logprobs: Tensor) -> None:
        """Take the log-probabilities of a batch's labels, (B, T) fp32, of which those count that are supervised."""
        places = supervised_places(self._datasets[name], batch.samples)
        found = logprobs.cpu()[batch.labels.cpu() >= 0]
        self._found[name][places] = found.masked_fill(~found.isfinite(), torch.inf).numpy()  # -inf: not computed here

    def write(self) -> None:
        """Bring the processes' shares together, and write the file; the batches have them from now on.

        Raises UserError where a number is not finite, or the file cannot be written.
        """
        values = {}
        for name, places in self._places.items():
            # What a process has not computed is -inf there; of a pair that two have, the larger numbers count.
            values[name] = highest_each(torch.from_numpy(self._found[name][places]))
            self._check_finite(name, values[name])
        self._found.clear()
        from_main(lambda: self._write_file(values))
        self._attach(values)

    def _check_finite(self, name: str, values: Tensor) -> None:
        wrong = self._places[name][~torch.isfinite(values).numpy()]
        if len(wrong):
            dataset = self._datasets[name]
            starts = dataset.starts
            sample = int(np.flatnonzero((starts <= wrong[0]) & (wrong[0] < starts + dataset.lengths))[0])
            source = dataset.sources[dataset.source[sample]].path
            raise UserError(
                f"reference: the model gives no finite log-probability to {len(wrong):,} tokens, first to one of row "
                f"{dataset.row[sample] + 1} of {source}: its weights are damaged, or model.dtype is not one it was made for"
            )

    def _read_file(self, say: Callable[[str], None]) -> dict[str, Tensor]:
        try:
            with safe_open(self._file, framework="pt") as file:
                about = file.metadata() or {}
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            wrong = self._why_not(dict(json.loads(about.get("facts", "{}"))), about.get("sha256"), values)
        except FileNotFoundError:
            return {}
        except (OSError, SafetensorError, ValueError, TypeError) as error:  # TypeError: other JSON, other dtypes
            wrong = f"it cannot be read: {error}"
        if wrong:
            say(f"reference: {self._file} is computed again, {wrong}")
        return {} if wrong else values

    def _why_not(self, facts: dict[str, str | None], sha256: str | None, values: dict[str, Tensor]) -> str:
        differing = [name for name in self._facts if facts.get(name) != self._facts[name]]
        if differing:
            return f"it is of another {', '.join(differing)}"
        return "" if sha256 == _hash(values) else "it is damaged"

    def _write_file(self, values: dict[str, Tensor]) -> None:
        about = {"facts": json.dumps(self._facts, sort_keys=True), "sha256": _hash(values)}
        try:
            replace_bytes(self._file, safetensors_bytes(values, about))
        except OSError as error:
            raise UserError(f"{self._file} cannot be written: {error}; free space or choose another run.out") from None

    def _attach(self, values: dict[str, Tensor]) -> None:
        columns = self._columns(0.0)
        for name, dataset in self._datasets.items():
            dataset.reference = columns[name]
            dataset.reference[self._places[name]] = values[name].numpy()

    def _columns(self, value: float) -> dict[str, np.ndarray]:
        """A number for each token of each dataset; one array where two share their tokens, as with a part held out."""
        made = {id(held.ids): np.full(len(held.ids), value, np.float32) for held in self._datasets.values()}
        return {name: made[id(held.ids)] for name, held in self._datasets.items()}


def supervised_places(dataset: Dataset, samples: np.ndarray) -> np.ndarray:
    """Where the supervised tokens of these samples stand in the dataset's flat arrays, sample after sample, (M,)."""
    lengths = dataset.lengths[samples]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    index = within + np.repeat(dataset.starts[samples], lengths)
    return index[dataset.supervised[index]]


def _hash(values: dict[str, Tensor]) -> str:
    return hash_arrays({name: tensor.numpy() for name, tensor in values.items()})
