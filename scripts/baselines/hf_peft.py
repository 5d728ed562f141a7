"""The baseline of scripts/bench_recipe.py: the same step with transformers + peft, or of all weights with transformers alone.

Random weights, fully supervised rows.

    python scripts/baselines/hf_peft.py --config DIR --max_seq_len 2048 --global_batch_size 4 --activation_checkpointing none

DIR holds a config.json. Prints one JSON object: tokens/s (median of 10 steps after 5), peak allocated GiB, first and last loss.
With --first_step (scripts/bench_start.py) the weights come from DIR's files; it ends after one step, and lines say how far it is.
Under torchrun each process takes its share of the batch: adapters by DistributedDataParallel, the whole model by FSDP2, a
layer at a time. Without a GPU it runs on the CPU, to see that it runs.
"""

import argparse
import json
import os
import statistics
import time
from functools import partial

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
KIND = "cuda" if torch.cuda.is_available() else "cpu"


def distributed(model: nn.Module, full: bool, dtype: str) -> nn.Module:
    """The model on several processes as its users would have it: all weights divided, or a frozen base on each."""
    if not full:
        return DistributedDataParallel(model, device_ids=[LOCAL_RANK] if KIND == "cuda" else None)
    types = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if dtype == "float32" else {}
    mixed = MixedPrecisionPolicy(**types)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=mixed)
    return fully_shard(model, mp_policy=mixed)


def where_is(model: torch.nn.Module, name: str) -> str:
    """The path of the first module of that name, "" without one."""
    return next((path for path, _ in model.named_modules() if path.endswith(f".{name}")), "")


def adapted_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The model on the device, with its adapters unless all of it is trained."""
    config = AutoConfig.from_pretrained(args.config)
    stored = {"dtype": getattr(torch, args.dtype), "attn_implementation": "sdpa"}
    if args.first_step:
        model = AutoModelForCausalLM.from_pretrained(args.config, device_map=device, **stored)
    else:
        with device:
            model = AutoModelForCausalLM.from_config(config, **stored)
    if args.full:
        return model
    # A mixture's experts are stacked parameters there, and no linears: adapted by their names.
    mixture = getattr(config, "num_experts", None) is not None
    experts = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]} if mixture else {}
    targets = [name for name in TARGETS if not mixture or "self_attn" in where_is(model, name)]
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, **experts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--max_seq_len", type=int, required=True)
    parser.add_argument("--global_batch_size", type=int, required=True)
    parser.add_argument("--micro_batch_size", type=int)
    parser.add_argument("--activation_checkpointing", default="none")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--full", action="store_true", help="train every weight, without peft")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights; from float32 ones, autocast computes in bf16")
    parser.add_argument("--first_step", action="store_true", help="one, from DIR's weights; a line when each thing is done")
    args = parser.parse_args()
    say = partial(print, flush=True) if args.first_step else lambda *_: None
    say("imported")
    if args.quantize != "none":
        raise SystemExit("error: the baseline has no NF4 base (bitsandbytes is not used here)")
    if WORLD > 1:
        dist.init_process_group("nccl" if KIND == "cuda" else "gloo")
    device = torch.device(KIND, LOCAL_RANK) if KIND == "cuda" else torch.device(KIND)
    if KIND == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = adapted_model(args, device)
    say("loaded")
    if args.activation_checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    if WORLD > 1:
        model = distributed(model, args.full, args.dtype)
        torch.manual_seed(LOCAL_RANK)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-5 if args.full else 2e-4, weight_decay=0.0, fused=True)
    in_bf16 = args.dtype == "float32" and not (args.full and WORLD > 1)  # FSDP2 casts by itself
    rates, losses = [], []
    for _ in range(1 if args.first_step else 15):
        ids = torch.randint(0, 1024, (args.global_batch_size // WORLD, args.max_seq_len), device=device)
        torch.cuda.synchronize() if KIND == "cuda" else None
        start = time.perf_counter()
        with torch.autocast(KIND, torch.bfloat16, enabled=in_bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        rates.append(WORLD * ids.numel() / (time.perf_counter() - start))
        say(f"step {len(losses)}/1  loss {losses[-1]:.4f}")
    if args.first_step:
        return
    result = {
        "tokens_per_s": round(statistics.median(rates[5:])),
        "peak_alloc_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if KIND == "cuda" else 0.0,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
    if LOCAL_RANK == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
