"""A small model divided over two GPUs in both ways, against the whole one. Run by test_divided_gpu.py:

    python -m torch.distributed.run --nproc_per_node 2 tests/divided_peers.py
"""

import os

import torch
import torch.distributed as dist
from test_activations import Log
from test_divided_blocks import divided, model_of
from test_step_graph import rows, run_batch, steps
from torch import Tensor

from torchft.modules.checkpointing import apply_activation_checkpointing
from torchft.modules.transformer import CausalLM, KVCache
from torchft.step_graph import StepGraph

CASES = [("all", "none"), ("all", "full"), ("one layer", "none")]
WAYS = {"copied": True, "gathered": False}


def answers(model: CausalLM) -> Tensor:
    """By the plain forward, with a cache."""
    cache, ids = KVCache(model.config, 2, 6, torch.device("cuda")), torch.arange(12, device="cuda").view(2, 6)
    with torch.no_grad():
        return torch.cat([model(ids[:, :4], cache=cache), model(ids[:, 4:], cache=cache)], dim=1)


def results(model: CausalLM, graph: bool) -> list[Tensor]:
    """Of steps, of a forward without gradients, which leaves other blocks in the slots, of answers, and of steps again."""
    log, plan = Log(), [[rows(n, "cuda"), rows(10 + n, "cuda")] for n in range(4)]
    run = StepGraph(run_batch, model, {}, log) if graph else run_batch
    found = steps(run, model, plan, rate=0.01)
    with torch.no_grad():
        row = rows(30, "cuda")
        found.append(model(row.input_ids, positions=row.positions, documents=row.documents, labels=row.labels))
    found.append(answers(model))
    found += steps(run, model, plan, rate=0.01)
    assert not graph or (run._recorded is not None) == ("CUDA graph: micro-batches" in log.lines[0]), log.lines
    return [*found, torch.tensor(float(graph and run._recorded is not None))]


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    for variant, recomputed in CASES:
        whole = model_of(variant, "cuda")
        apply_activation_checkpointing(whole, recomputed)
        *expected, _ = results(whole, graph=False)
        for way, copies in WAYS.items():
            for graph in (False, True):
                model = divided(variant, (2,), copies=copies, recomputed=recomputed, device="cuda")
                before = torch.cuda.memory_allocated()
                *found, recorded = results(model, graph)
                assert bool(recorded) == (graph and copies), (way, graph)
                worst = max(((a.cpu() - b.cpu()).norm() / b.cpu().norm()).item() for a, b in zip(found, expected, strict=True))
                assert worst <= 1e-4, (variant, recomputed, way, graph, worst)  # some sums of attention's backward are in no fixed order
                held = sum(memory.numel() for block in model.model.layers[0].divided._held for memory in block[:1]) * 4
                print(f"{variant}, {recomputed}, {way}, graph={graph}: {worst:.1e}; {held} bytes held, {torch.cuda.memory_allocated() - before} more allocated", flush=True)
    print(f"rank {dist.get_rank()}: all equal", flush=True)
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
