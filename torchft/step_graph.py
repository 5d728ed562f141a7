"""The launches of a micro-batch, forward and backward, recorded once as a CUDA graph and from then on launched as one.

    train_batch = StepGraph(run_batch, model, cfg.model.kernels, log)    # or run_batch itself, launch by launch
    loss += train_batch(model, batch.to(device), supervised)

A step of 8B on 2,048 tokens is some ten thousand launches, which take the CPU longer than the GPU needs to compute them. What
is computed stays the same, up to the kernels that libraries choose; batches of another shape than the recorded one are run as
before.

Nothing in such a step may look at a value on the GPU, draw random numbers or copy from memory that is not pinned: so it takes
fused blocks, the loss's kernel, a frozen embedding and head, weights that are here whole or are copied here without a word to other
processes (divided_blocks.py), and RoPE that does not go by the lengths of the documents. With run.deterministic there is no graph:
a run that goes on after a stop, launch by launch at first, would not have the same bits. A graph has memory of its own, about as much
as the step takes without it, which nothing else can use: there must be room for both. What is allocated, the peak in the log, does not
hold it; `graph_gib` there does.

Left out: a graph for each of several shapes (packed pairs, of which a row holds now more and now fewer, have none), KTO, reward
models, training of all weights, evaluation.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchft.activations import GIB, read_memory
from torchft.data.loader import Batch
from torchft.metrics import RunLogger
from torchft.modules.host_embedding import HostEmbedding
from torchft.modules.lora import trained_beside_adapters
from torchft.modules.rope import BY_LENGTH
from torchft.modules.transformer import CausalLM

PATIENCE = 50  # micro-batches, after which it is said that there is no graph
RUNS_BEFORE = 3  # of one shape in a row, launch by launch: kernels are built and memory is laid out by then

Run = Callable[..., Tensor]  # see StepGraph


class Recorded(NamedTuple):
    """A graph, and the memory that it reads and writes each time."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    divisor: Tensor
    sums: Tensor
    grads: list[Tensor]
    offloaded: int  # bytes to CPU memory
    held: list[Tensor]  # that memory: nobody may free it


class StepGraph:
    """`run(model, batch, divisor, *more)`, which adds gradients and returns sums, recorded where that is possible.

    switches: `model.kernels`, whose graph: eager forbids it. `log` is told once what became of it.
    """

    def __init__(self, run: Run, model: CausalLM, switches: dict[str, str], log: RunLogger) -> None:
        self._run, self._log = run, log
        self._params = [param for param in model.parameters() if param.requires_grad]
        reason = why_not(model, switches)
        self._possible = not reason
        if reason and self._params[0].is_cuda:
            log.print(f"CUDA graph: none, {reason}")
        self._batches, self._largest = 0, 0  # so far; tokens of the largest batch
        self._last, self._times = None, 0  # the shape of the last batch, and how often it came in a row
        self._recorded: Recorded | None = None
        self._shape = None  # of what is recorded

    def __call__(self, model: CausalLM, batch: Batch, divisor: float, *more: object) -> Tensor:
        """As `run`. `more`: what it takes besides, the same for all batches."""
        if not self._possible:
            return self._run(model, batch, divisor, *more)
        shape, self._batches = _shape(model, batch), self._batches + 1
        self._times = self._times + 1 if shape == self._last else 1
        self._last = shape
        if model.model.checkpointing.probe is not None:  # of `auto`: blocks may do otherwise in a moment
            self._times = 0
        tokens = batch.input_ids.numel()
        if tokens > self._largest:  # which needs the room of a graph that is there
            self._largest, self._recorded, self._shape = tokens, None, None
        if self._recorded is None and tokens == self._largest and self._times > RUNS_BEFORE:
            self._possible = self._fits(batch)
            if self._possible:
                self._recorded, self._shape = self._record(model, batch, more), shape
        if self._recorded is None and self._batches == PATIENCE:
            why = f"since no {RUNS_BEFORE + 1} of the largest micro-batches came in a row and in one shape"
            self._log.print(f"CUDA graph: none so far, {why}")
        if shape != self._shape:
            return self._run(model, batch, divisor, *more)
        return self._replay(model, batch, divisor)

    def _fits(self, batch: Batch) -> bool:
        """Whether what a step takes is there twice; says so if not."""
        device = batch.input_ids.device
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        memory = read_memory(device)
        wanted = 2 * (memory.peak - memory.allocated)
        if memory.free <= wanted:
            free = memory.free / GIB
            self._log.print(f"CUDA graph: none, it wants {wanted / GIB:.1f} GiB beside the weights, and {free:.1f} are free")
        return memory.free > wanted

    def _record(self, model: CausalLM, batch: Batch, more: tuple) -> Recorded:
        """Nothing is computed by this. Gradients are as they were afterwards."""
        gc.collect()  # a model before this one, were it found amid the recording: memory that others read waits for the GPU to be freed
        torch._C._cuda_clearCublasWorkspaces()  # the graph brings its own
        torch.cuda.empty_cache()  # as capturing begins with: what it takes is counted from here on
        static = replace(batch, **{name: value.clone() for name, value in batch.tensors().items()})
        divisor = torch.ones((), device=batch.input_ids.device)
        before = self._take_grads()
        traffic, graph, reserved = model.model.checkpointing.traffic, torch.cuda.CUDAGraph(), torch.cuda.memory_reserved()
        sent = traffic.sent if traffic else 0
        _forget_fetched(model)  # so that the graph fetches all that it needs
        try:
            # Other threads may ask the GPU things meanwhile: NCCL's, which looks after its own, or one that writes a checkpoint.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                sums = self._run(model, static, divisor, *more)
        except RuntimeError as error:
            error.add_note("This came up while a step was recorded; model.kernels={graph: eager} launches kernel by kernel.")
            raise
        grads = self._take_grads()
        self._give_grads(before)
        own, (num_rows, width) = (torch.cuda.memory_reserved() - reserved) / GIB, batch.input_ids.shape
        self._log.constant(graph_gib=round(own, 3))
        self._log.print(f"CUDA graph: micro-batches of {num_rows} x {width} tokens are launched as one, in {own:.2f} GiB of their own")
        if traffic is None:
            return Recorded(graph, static, divisor, sums, grads, 0, [])
        offloaded, traffic.sent = traffic.sent - sent, sent  # nothing has travelled yet
        return Recorded(graph, static, divisor, sums, grads, offloaded, traffic.memory.buffers())

    def _replay(self, model: CausalLM, batch: Batch, divisor: float) -> Tensor:
        recorded, before = self._recorded, self._take_grads()
        if before[0] is recorded.grads[0]:  # of the micro-batch before this one, which the graph is about to overwrite
            before = [grad.clone() for grad in before]
        for name, value in recorded.batch.tensors().items():
            value.copy_(getattr(batch, name))
        recorded.divisor.fill_(divisor)
        _forget_fetched(model)  # nothing else may be under way to where the graph puts it
        recorded.graph.replay()
        if model.model.checkpointing.traffic:
            model.model.checkpointing.traffic.sent += recorded.offloaded
        if before[0] is None:
            self._give_grads(recorded.grads)
        else:
            torch._foreach_add_(before, recorded.grads)
            self._give_grads(before)
        return recorded.sums.clone()

    def _take_grads(self) -> list[Tensor | None]:
        grads = [param.grad for param in self._params]
        for param in self._params:
            param.grad = None
        return grads

    def _give_grads(self, grads: list[Tensor | None]) -> None:
        for param, grad in zip(self._params, grads, strict=True):
            param.grad = grad


def _shape(model: CausalLM, batch: Batch) -> tuple:
    """What must be the same for a graph to be a batch's: its shapes, and which blocks are recomputed how."""
    shapes = tuple((name, value.shape) for name, value in batch.tensors().items())
    checkpointing = model.model.checkpointing
    return shapes, batch.num_sequences, checkpointing.blocks, checkpointing.offload


def why_not(model: CausalLM, switches: dict[str, str]) -> str:
    """Why a step of this model cannot be recorded, or ""."""
    params, blocks = dict(model.named_parameters()), model.model.layers
    trained = [name for name, param in params.items() if param.requires_grad]
    reasons = {
        "model.kernels says so": "eager" in (switches.get("graph"), switches.get("cross_entropy")),
        "run.deterministic: a run that goes on begins launch by launch": torch.are_deterministic_algorithms_enabled(),
        "the model is not on a GPU": params[trained[0]].device.type != "cuda",
        "its weights are divided over processes, which gather them together": _gathers(model),
        "its blocks are not fused": any(block.compilable or block.draws for block in blocks),
        "more than adapters is trained": bool(trained_beside_adapters(model)),
        "its RoPE goes by the lengths of the documents": any(rope.kind in BY_LENGTH for rope in model.model.ropes),
        "its logits are capped": model.config.final_logit_softcapping is not None,
        "the CPU fetches the embedding's rows": _waits(model.model.embed_tokens),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def _forget_fetched(model: CausalLM) -> None:
    divided = model.model.layers[0].divided
    if divided is not None:
        divided.forget()


def _gathers(model: CausalLM) -> bool:
    divided = model.model.layers[0].divided
    return any(isinstance(param, DTensor) for param in model.parameters()) and (divided is None or not divided.copies)


def _waits(embedding: nn.Module) -> bool:
    return isinstance(embedding, HostEmbedding) and embedding.gather is None
