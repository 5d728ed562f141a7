"""Reward model training (Bradley-Terry) with LoRA or QLoRA on 1 to N GPUs, from pairs of answers to a verified model directory.

    tune run reward_distributed --config tiny/reward                            # the embedded demo, about a minute on a CPU
    tune run --nproc_per_node 8 reward_distributed --config llama3_1/8B_reward data.train=pairs.jsonl
    tune cp reward_distributed ./mine.py && tune run --nproc_per_node 2 ./mine.py --config tiny/reward

It is lora_distributed with pairs of answers as data and a score on the last token of each in place of log-probabilities;
`diff` the two. What it writes is a Hugging Face `...ForSequenceClassification` with one label, the adapter merged in.
Every process runs all of this; what is printed and written comes from the first.
The whole run is in `main`, from top to bottom: model, optimizer, data, resume, loop, export. Nothing else drives it, so a copy
is yours to edit. Measured results: docs/RECORDS.md. Left out: full fine-tuning.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from torchft.activations import ActivationMemory
from torchft.adapter import add_adapter, init_adapter, save_adapter, tokenizer_folder
from torchft.checkpoint import StopSignal, find_checkpoint, load_checkpoint, save_checkpoint
from torchft.config import DataConfig, LoraOptions, ModelConfig, OptimConfig, RewardOptions, RunConfig, resolve_path
from torchft.data.chat_template import load_template
from torchft.data.dataset import build_datasets
from torchft.data.loader import Batch, Loader, eval_batches
from torchft.data.report import summary
from torchft.data.tokenizer import load_tokenizer
from torchft.device import compile_blocks, setup_device
from torchft.distributed import (
    check_agreement,
    divide,
    highest,
    join_processes,
    leave_processes,
    mean_gradients,
    node_leader_first,
    sum_over_processes,
    sync_gradients,
)
from torchft.fit import check_ids, warn_of_misfits
from torchft.fuse import fuse
from torchft.hf_checkpoint import fingerprint
from torchft.losses import bradley_terry
from torchft.metrics import RunLogger
from torchft.models import build_reward_model, read_config
from torchft.modules.eval_mode import eval_mode
from torchft.modules.lora import trainable_parameters
from torchft.modules.score import RewardModel, init_score, last_tokens
from torchft.optim import build_optimizer, clip_and_check, lr_at, set_lr, step_optimizer
from torchft.parse import parse
from torchft.profiling import ProfileWindow
from torchft.ranks import rank, world_size
from torchft.reward_export import export_reward_model
from torchft.run_dir import best_checkpoint
from torchft.storage import store_frozen
from torchft.throughput import flops_per_token
from torchft.weights import load_weights, random_weights


@dataclass
class Config:
    """Every option stands with its default and unit in torchft/config.py; `tune run reward_distributed --help` lists them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraOptions = field(default_factory=LoraOptions)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    reward: RewardOptions = field(default_factory=RewardOptions)


def batch_loss(model: RewardModel, batch: Batch, options: RewardOptions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses of the batch's pairs, summed, and what else is logged, summed likewise."""
    where = {"positions": batch.positions, "documents": batch.documents, "branches": batch.branches}
    scores = model(batch.input_ids, **where, ends=last_tokens(batch.sequences, batch.num_sequences))
    chosen, rejected = scores.view(-1, 2).unbind(1)  # (P,)
    margin = (chosen - rejected).detach()
    logged = {"rewards_chosen": chosen.detach(), "rewards_rejected": rejected.detach(), "margin": margin}
    logged["accuracy"] = (margin.sign() + 1) / 2  # a tie counts half
    return bradley_terry(chosen, rejected, options.center_weight).sum(), {name: value.sum() for name, value in logged.items()}


@torch.no_grad()
def evaluate(model: RewardModel, batches: Iterable[Batch], device: torch.device, options: RewardOptions) -> dict[str, float]:
    """Means over all pairs of the loss and what is logged with it; they do not depend on how the batches are cut."""
    totals: dict[str, torch.Tensor] = {}
    with eval_mode(model):
        for batch in batches:
            loss, logged = batch_loss(model, batch.to(device), options)
            counted = {"pairs": loss.new_tensor(batch.num_sequences // 2), "loss": loss} | logged
            totals = {name: totals.get(name, 0.0) + value.double() for name, value in counted.items()}
    pairs, *sums = sum_over_processes(torch.stack(list(totals.values()))).tolist()
    return {f"valid_{name}": value / pairs for name, value in zip(list(totals)[1:], sums, strict=True)}


def main(cfg: Config) -> None:
    """Train one adapter; all files go to cfg.run.out. Raises UserError for what a user can get wrong."""
    join_processes(cfg.model, cfg.optim, cfg.run)
    run, out = cfg.run, Path(cfg.run.out)
    device = setup_device(run.seed, run.deterministic)
    generator = torch.Generator().manual_seed(run.seed)  # on the CPU: one seed gives one adapter on every device
    log = RunLogger(run, asdict(cfg), device)
    checkpoint = find_checkpoint(out, run.resume, asdict(cfg), log.print)  # now: a wrong one fails before anything is loaded

    # ---- Model. On meta until its weights stream in, so that a quantised model never exists dense. The order is the same in
    # all recipes: adapters, quantised types, kernels, checkpointing, compile, division, weights.
    path = resolve_path(cfg.model.path)
    tokenizer = load_tokenizer(tokenizer_folder(path, cfg.lora.adapter))
    template = load_template(cfg.data.chat_template, tokenizer, cfg.data.new_tokens)
    new_ids = tokenizer.added_ids  # a range, empty without data.new_tokens
    with torch.device("meta"):
        model = build_reward_model(read_config(path))
    spec, report, new_rows = add_adapter(model, cfg.lora, new_ids)
    model.score.requires_grad_(True)
    log.print(str(report))
    for line in store_frozen(model, cfg.model.quantize, cfg.model.offload):
        log.print(line)
    log.print(str(fuse(model, cfg.model.kernels, device)))  # delete this line for plain PyTorch
    activations = ActivationMemory(model, cfg.model, cfg.data, run, device, log)  # recomputed, offloaded, or what fits
    compile_blocks(model, cfg.model.compile, device, log.print)
    log.print(str(divide(model, cfg.model, device)))
    dtype = getattr(torch, cfg.model.dtype)  # of the base; what is trained is kept in fp32
    if cfg.model.weights == "random":
        log.print("WARNING: model.weights=random is for measuring; nothing will be exported")
        random_weights(model, seed=run.seed, device=device, dtype=dtype)
    else:
        log.print(str(load_weights(model, path, device=device, dtype=dtype, new_rows=new_rows)))
    init_adapter(model, cfg.lora, new_ids, generator)
    init_score(model, generator)
    params = trainable_parameters(model)
    optimizer = build_optimizer(params, cfg.optim)

    # ---- Data. All epochs are planned here, so that the data position of a run is its step number.
    with node_leader_first():
        train, valid = build_datasets(cfg.data, tokenizer, template, run.seed, kind="pairs", quiet=rank() > 0)
    check_ids(model.config, tokenizer, train, valid)
    warn_of_misfits(model, train, tokenizer, cfg.data.max_seq_len, log.print)
    loader = Loader(train, cfg.data, run, rank(), world_size())
    log.print(summary(loader, valid))

    # ---- Resume: parameters, moments, random state and step; the run goes on as if it had never stopped.
    state, fingerprints = {}, {"data": train.fingerprint, "valid": valid.fingerprint if valid else None}
    fingerprints["model"] = None if cfg.model.weights == "random" else fingerprint(path)
    check_agreement(fingerprints)
    if checkpoint:
        state = load_checkpoint(checkpoint, params=params, optimizer=optimizer, unchanged=fingerprints)
    first_step = state.get("step", 0) + 1
    length = {"total_steps": loader.total_steps, "steps_per_epoch": loader.steps_per_epoch(0), "start_step": first_step - 1}
    log.begin(**length, state=state.get("log"), flops_per_token=flops_per_token(model, cfg.data.max_seq_len))
    best_loss = best_checkpoint(out, log.print)[0] if checkpoint else math.inf  # log.begin has moved what a later step left aside
    profiler = ProfileWindow(run, device, log.print)
    cells = {"data_cfg": cfg.data, "micro_batch_size": run.micro_batch_size, "rank": rank(), "world_size": world_size()}
    if valid and first_step == 1:
        with log.paused():
            log.validation(0, **evaluate(model, eval_batches(valid, **cells), device, cfg.reward))

    # ---- Loop. A step's loss is the sum over its pairs divided by their number, however it is cut into batches.
    stop = StopSignal()  # from here on there is something to save
    for step in range(first_step, loader.total_steps + 1):
        batches, (tokens, supervised) = loader.step(step - 1), loader.step_tokens(step - 1)
        lr = lr_at(step - 1, loader.total_steps, cfg.optim)
        set_lr(optimizer, lr)
        pairs, totals = len(loader.step_samples(step - 1)), 0.0
        for batch in batches:
            sync_gradients(model, batch is batches[-1])  # accumulate here first
            micro_loss, logged = batch_loss(model, batch.to(device), cfg.reward)
            (micro_loss * world_size() / pairs).backward()  # the mean over processes is taken; the sum is meant
            totals += torch.stack([micro_loss.detach(), *logged.values()])
        mean_gradients(params)  # where each process holds all of them; FSDP2 has done it in backward
        loss, *sums = sum_over_processes(totals)
        grad_norm, found_inf = clip_and_check(params, cfg.optim.max_grad_norm, loss)
        step_optimizer(optimizer, found_inf)  # a step that is not finite is skipped, and the log stops the run
        optimizer.zero_grad()
        log.figures(pairs, dict(zip(logged, sums, strict=True)))
        activations.step()
        log.step(step, loss=loss, supervised=supervised, tokens=tokens, lr=lr, grad_norm=grad_norm, found_inf=found_inf)
        profiler.step()

        last, valid_loss = step == loader.total_steps, None
        if valid and (last or (run.eval_every and step % run.eval_every == 0)):
            with log.paused():
                found = evaluate(model, eval_batches(valid, **cells), device, cfg.reward)
                valid_loss = found["valid_loss"]
                log.validation(step, **found)
        stopping = highest(stop.exit_code)  # 0: nobody asked, not even while it was validated
        improved = run.keep_best and valid_loss is not None and valid_loss < best_loss
        if last or improved or stopping or (run.save_every and step % run.save_every == 0):
            with log.paused():
                state = fingerprints | {"log": log.state()}
                kept = {"keep_last": run.keep_last, "valid_loss": valid_loss if run.keep_best else None}
                save_checkpoint(out, step, params=params, optimizer=optimizer, state=state, config=asdict(cfg), **kept)
            best_loss = valid_loss if improved else best_loss
        if stopping and not last:
            log.print(f"stopped after step {step}; go on with run.resume=auto")
            leave_processes()
            sys.exit(stopping)
    stop.close()  # the last checkpoint stands: from here on a signal ends the run at once
    profiler.close()

    # ---- Result: the model as a Hugging Face directory, read back and compared before it is called done.
    if run.keep_best and (best := best_checkpoint(out, log.print)[1]):
        load_checkpoint(best, params=params, optimizer=optimizer, unchanged={})
        log.print(f"exporting {best}, the lowest validation loss")
    if cfg.model.weights != "random":
        text = {"tokenizer": tokenizer, "template": template}  # saved where they are not the base model's own
        save_adapter(model, spec, out / "adapter", base_path=str(path), **text, replace_existing=True)
        nf4_base = cfg.model.quantize.startswith("nf4")  # merged into what it was trained on
        log.print(export_reward_model(model, path, out / "adapter", out / "reward_model", **text, nf4_base=nf4_base))
    log.close()
    leave_processes()


if __name__ == "__main__":
    main(parse(Config))
