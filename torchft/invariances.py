"""`tune check`: on a user's own config, data and machine, what must not change a step does not change it.

The gradients of one optimizer step over a few rows of the config's data, in fp32, computed plainly (one batch, no packing, plain
modules, one process), are held against the same step cut, packed, recomputed, offloaded, compiled, fused, kernel by kernel, and divided over two
processes. Difference: ||g - g'|| / ||g'|| per parameter tensor, tensors below 1e-6 of the largest norm against the norm of all.
Exempt, because they change a step by design: dropout (switched off here), FP8's dynamic scales, KTO's KL baseline. Left out: the
optimizer's update, and whatever a recipe's own text was edited to do.
"""

import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchft.adapter import add_adapter, init_adapter
from torchft.balance import balance_routers
from torchft.checks import KERNELS
from torchft.config import resolve_path
from torchft.data.dataset import Dataset
from torchft.data.loader import Batch, make_batch
from torchft.data.packing import plan_rows
from torchft.device import compile_blocks
from torchft.distributed import divide, join_processes, leave_processes, mean_gradients
from torchft.dry_run import Options, WholeOptions
from torchft.errors import UserError
from torchft.fuse import fuse, swap, why_no_kernels
from torchft.models import build_model
from torchft.models import read_config as read_model_config
from torchft.modules.checkpointing import apply_activation_checkpointing, recompute_blocks
from torchft.modules.compiler import missing_compiler
from torchft.modules.lora import trainable_parameters
from torchft.modules.offload import Traffic
from torchft.modules.sharding import cut, local, whole
from torchft.modules.transformer import CausalLM
from torchft.modules.vocab import grow_vocab, init_new_rows
from torchft.ranks import rank, world_size
from torchft.storage import store_frozen
from torchft.weights import load_weights, random_weights

TOLERANCE = 1e-5  # relative, in fp32
TINY = 1e-6  # of the largest tensor's norm: below it, a tensor is held against the norm of all
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """What is checked: a config in fp32 without dropout, the samples of one step, and how much of the model."""

    cfg: WholeOptions
    dataset: Dataset
    samples: np.ndarray  # (rows,) of the dataset
    layers: int  # of the model, from the first on
    random: bool  # weights are drawn and not read
    new_ids: range
    device: torch.device

    @property
    def model_config(self) -> dict[str, Any]:
        """config.json with that many layers; lists with an entry per layer are cut alike."""
        hf = read_model_config(resolve_path(self.cfg.model.path))
        total = hf["num_hidden_layers"]
        cut_lists = {key: value[: self.layers] for key, value in hf.items() if isinstance(value, list) and len(value) == total}
        return hf if self.layers == total else hf | cut_lists | {"num_hidden_layers": self.layers}

    def model(self, prepare: Callable[[CausalLM], object] = lambda model: None) -> CausalLM:
        """A new model, always with the same weights and an adapter that is not zero; `prepare` is called on meta."""
        cfg = self.cfg
        with torch.device("meta"):
            model = build_model(self.model_config)
        adapted = isinstance(cfg, Options)
        new_rows = add_adapter(model, cfg.lora, self.new_ids)[2] if adapted else grow_vocab(model, self.new_ids)
        store_frozen(model, cfg.model.quantize, cfg.model.offload)
        prepare(model)
        if self.random:
            random_weights(model, seed=cfg.run.seed, device=self.device, dtype=torch.float32)
        else:
            path = resolve_path(cfg.model.path)
            load_weights(model, path, device=self.device, dtype=torch.float32, new_rows=new_rows)
        generator = torch.Generator().manual_seed(cfg.run.seed)
        if adapted:
            init_adapter(model, cfg.lora, self.new_ids, generator)
            _move_adapter(model)
        else:
            init_new_rows(model, self.new_ids, generator)
        return model

    def batches(self, groups: Iterable[Iterable[int]], packing: bool = False) -> Iterator[Batch]:
        """One batch per group: rows of one sample each, or with `packing` all samples of the group in one row."""
        for group in groups:
            rows = [np.asarray(group)] if packing else [np.asarray([sample]) for sample in group]
            limit = self.cfg.data.max_seq_len
            yield make_batch(self.dataset, rows, num_rows=max(1, len(rows)), max_seq_len=limit, packing=packing)

    def without_other_samples(self) -> "Subject":
        """The same step of a dataset that holds nothing else: small enough for a pipe."""
        dataset = self.dataset.select(self.samples)
        tokens = np.concatenate([np.arange(start, start + length) for start, length in zip(dataset.starts, dataset.lengths, strict=True)])
        starts = np.cumsum(dataset.lengths) - dataset.lengths
        dataset = replace(dataset, ids=dataset.ids[tokens], supervised=dataset.supervised[tokens], starts=starts)
        return replace(self, dataset=dataset, samples=np.arange(len(dataset)))

    @property
    def supervised(self) -> int:
        return int(self.dataset.num_supervised[self.samples].sum())


@torch.no_grad()
def _move_adapter(model: CausalLM) -> None:
    """B starts at zero, which would hide what is wrong with A: give every adapter something to do."""
    for name, param in trainable_parameters(model).items():
        if ".lora_B" in name:
            value = 0.02 * torch.randn(param.shape, generator=torch.Generator().manual_seed(len(name)))
            param.copy_(cut(value.to(local(param).device), param))


def gradients(model: CausalLM, batches: Iterable[Batch], supervised: int, device: torch.device) -> Gradients:
    """Of one step: the sum over its supervised tokens divided by their number; tensors whole, by parameter name."""
    batches = list(batches)
    balance_routers(model, batches, device)
    for batch in batches:
        on_device = batch.to(device)
        loss = model(on_device.input_ids, positions=on_device.positions, documents=on_device.documents, labels=on_device.labels)
        (loss * world_size() / supervised).backward()
    mean_gradients(trainable_parameters(model))
    return {name: _gradient(param) for name, param in trainable_parameters(model).items()}


def _gradient(param: nn.Parameter) -> Tensor:
    return whole(torch.zeros_like(param) if param.grad is None else param.grad).detach().float().cpu()


def difference(found: Gradients, expected: Gradients) -> tuple[float, str]:
    """(the largest relative distance of a tensor, its name), as D6 of the design defines it."""
    norms = {name: tensor.double().norm().item() for name, tensor in expected.items()}
    largest, total = max(norms.values()), sum(norm**2 for norm in norms.values()) ** 0.5
    if not total > 0:
        raise UserError("the gradients are all zero: the rows have nothing to train, or nothing of the model is trained")
    errors = {}
    for name, tensor in expected.items():
        scale = norms[name] if norms[name] >= TINY * largest else total
        error = (found[name].double() - tensor.double()).norm().item() / scale
        errors[name] = error if error == error else float("inf")  # NaN is no agreement
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


@dataclass(frozen=True)
class Check:
    """One way to compute the same step. `skipped`: why it cannot be computed here, or ""."""

    name: str
    option: str  # what a user would change
    compute: Callable[[], Gradients]
    skipped: str = ""


def list_checks(subject: Subject) -> Iterator[Check]:
    """Every check, in the order of the table."""
    samples, count = subject.samples.tolist(), subject.supervised

    def step(groups: list[list[int]], packing: bool = False, prepare: Callable[[CausalLM], object] = lambda model: None) -> Gradients:
        return gradients(subject.model(prepare), subject.batches(groups, packing), count, subject.device)

    alone, pairs = [[sample] for sample in samples], [samples[i : i + 2] for i in range(0, len(samples), 2)]
    rows = plan_rows(subject.dataset.lengths[subject.samples], seed=0, epoch=0, max_seq_len=subject.cfg.data.max_seq_len, packing=True)
    packed = [[samples[index] for index in row] for row in rows]
    no_pair = "no two of the rows fit into data.max_seq_len" if len(packed) == len(samples) else ""
    yield Check("the same again", "run.deterministic", lambda: step([samples]))
    yield Check("one row at a time", "run.micro_batch_size=1", lambda: step(alone))
    yield Check("two rows at a time", "run.micro_batch_size=2", lambda: step(pairs))
    yield Check("packed rows", "data.packing=true", lambda: step(packed, packing=True), no_pair)
    for mode in ("full", "every_2", "auto"):
        prepare = lambda model, mode=mode: _recompute(model, mode)  # noqa: E731
        yield Check(f"recomputed, {mode}", f"model.activation_checkpointing={mode}", lambda prepare=prepare: step([samples], prepare=prepare))
    offload = lambda model: _offload(model, subject.device)  # noqa: E731
    yield Check("offloaded", "model.offload=[activations]", lambda: step([samples], prepare=offload))
    compiled = lambda model: compile_blocks(model, "on", subject.device, lambda text: None)  # noqa: E731
    yield Check("compiled", "model.compile=on", lambda: step([samples], prepare=compiled), _why_not_compiled(subject))
    for name, eager, skipped in _kernel_cases(subject):
        fused = lambda model, eager=eager: swap(model, eager)  # noqa: E731
        option = f"model.kernels={{{name}: eager}}" if name in KERNELS else "model.kernels"
        label = f"kernel {name}" if name in KERNELS else name
        yield Check(label, option, lambda fused=fused: step([samples], prepare=fused), skipped)
    yield Check("two processes", "--nproc_per_node 2", lambda: _on_two_processes(subject), _why_not_divided(subject))


def _recompute(model: CausalLM, mode: str) -> None:
    """auto: one of the numbers of blocks that may come out of it."""
    if mode == "auto":
        recompute_blocks(model, range(len(model.model.layers) // 2), offload=False)
    else:
        apply_activation_checkpointing(model, mode)


def _offload(model: CausalLM, device: torch.device) -> None:
    """With blocks folded where they can be, of which most travels."""
    swap(model, tuple(name for name in KERNELS if name != "lora"))
    apply_activation_checkpointing(model, "full", offload=True)
    model.model.checkpointing.traffic = Traffic(device, smallest=1)  # of a small model too


def _why_not_compiled(subject: Subject) -> str:
    if subject.cfg.model.compile == "off" or (subject.cfg.model.compile == "auto" and subject.device.type != "cuda"):
        return f"model.compile={subject.cfg.model.compile} compiles nothing here"
    missing = missing_compiler(subject.device)
    return f"this machine lacks {missing}" if missing else ""


def _kernel_cases(subject: Subject) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(name, kernels that stay eager, why skipped): each kernel alone in the folded blocks, then all of them together."""
    folded, nowhere = _why_not_folded(subject), why_no_kernels(subject.device)
    for name in KERNELS:
        if name == "fp8":  # exempt, see above
            continue
        used = {name} if name in ("cross_entropy", "embedding") else {name, "lora"}
        reasons = [nowhere if name != "lora" else ""]  # which folds products by torch, on any machine
        reasons += [folded] if "lora" in used else []
        reasons += ["nothing is quantised"] if name == "nf4" and not subject.cfg.model.quantize.startswith("nf4") else []
        reasons += ["it is not in CPU memory"] if name == "embedding" and "embeddings" not in subject.cfg.model.offload else []
        yield name, tuple(other for other in KERNELS if other not in used), next(filter(None, reasons), "")
    yield "all kernels", (), nowhere


def _why_not_folded(subject: Subject) -> str:
    with torch.device("meta"):
        model = build_model(subject.model_config)
    if isinstance(subject.cfg, Options):
        add_adapter(model, subject.cfg.lora, subject.new_ids)
    return swap(model, tuple(name for name in KERNELS if name != "lora")).skipped


def _why_not_divided(subject: Subject) -> str:
    if len(subject.samples) < 2:
        return "one row cannot be divided"
    if subject.device.type == "cuda" and torch.cuda.device_count() < 2:
        return "this machine has one GPU"
    return ""


def _on_two_processes(subject: Subject) -> Gradients:
    """Two new processes, each with half of the rows; the model divided as model.shard says, with the kernels that a run has."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="tune_check_") as folder:
        file = Path(folder) / "gradients.safetensors"
        # Ctrl-C reaches them too. They inherit the mask and do not see it: as daemons they end with this process, both at once.
        resource_tracker.ensure_running()  # started first, since it lifts the mask
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            arguments = {"nprocs": 2, "start_method": "spawn", "join": False, "daemon": True}
            alone = subject.without_other_samples()  # else this waits, masked, until each of them has imported torch and reads on
            processes = torch.multiprocessing.start_processes(_one_of_two, (port, alone, file), **arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        while not processes.join():
            pass
        return load_file(file)


def _one_of_two(number: int, port: int, subject: Subject, file: Path) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    cfg = subject.cfg
    cfg = replace(cfg, model=replace(cfg.model, offload=[]))  # where weights lie between steps is no part of one
    join_processes(cfg.model, cfg.optim, replace(cfg.run, global_batch_size=2, micro_batch_size=1))
    device = torch.device("cuda", number) if subject.device.type == "cuda" else subject.device
    mine = replace(subject, device=device)

    def prepare(model: CausalLM) -> None:
        fuse(model, cfg.model.kernels, device)  # as a run does on a GPU: fused blocks are divided in a way of their own
        divide(model, cfg.model, device)

    model = mine.model(prepare)
    share = mine.samples.tolist()[rank() :: 2]
    batches = [[sample] for sample in share] + [[]] * (-(-len(mine.samples) // 2) - len(share))  # equally many on both
    found = gradients(model, mine.batches(batches), mine.supervised, device)
    if number == 0:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)
    leave_processes()
