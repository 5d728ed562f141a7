"""Tuning on single answers with a verdict, good or bad (KTO), with LoRA or QLoRA on 1 to N GPUs, to a verified adapter.

    tune run kto_distributed --config tiny/kto                                  # the embedded demo, about a minute on a CPU
    tune run --nproc_per_node 8 kto_distributed --config llama3_1/8B_kto data.train=verdicts.jsonl
    tune cp kto_distributed ./mine.py && tune run --nproc_per_node 2 ./mine.py --config tiny/kto

It is lora_distributed with verdicts as data and their loss (torchft/losses.py: kto); `diff` the two. An answer's reward is compared with a
baseline, the divergence from the reference, which each step estimates from its prompts with each other's answers before it
takes a gradient. Every process runs all of this; what is printed and written comes from the first. The whole run is in
`main`, from top to bottom: model, optimizer, data, resume, loop, export. Nothing else drives it, so a copy is yours to
edit. Measured results: docs/RECORDS.md. Left out: full fine-tuning.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from torchft.activations import ActivationMemory
from torchft.adapter import add_adapter, init_adapter, save_adapter, tokenizer_folder, verify_adapter
from torchft.answers import Answer, answer_examples, exact_match, first_conversations, shortened
from torchft.balance import balance_routers
from torchft.checkpoint import StopSignal, find_checkpoint, load_checkpoint, save_checkpoint
from torchft.config import DataConfig, KtoOptions, LoraOptions, ModelConfig, OptimConfig, RunConfig, resolve_path
from torchft.data.chat_template import load_template
from torchft.data.dataset import Dataset, build_datasets
from torchft.data.loader import Batch, Loader, eval_batches
from torchft.data.mismatched import mismatched
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
from torchft.launch import tune_command
from torchft.losses import kto, sum_by_answer, verdict_means, verdict_sums
from torchft.metrics import RunLogger
from torchft.models import build_model, read_config
from torchft.modules.eval_mode import eval_mode
from torchft.modules.lora import adapters_off, trainable_parameters
from torchft.modules.transformer import CausalLM
from torchft.modules.vocab import freeze_old_rows
from torchft.optim import build_optimizer, clip_and_check, lr_at, set_lr, step_optimizer
from torchft.parse import parse
from torchft.profiling import ProfileWindow
from torchft.ranks import rank, world_size
from torchft.run_dir import best_checkpoint
from torchft.storage import store_frozen
from torchft.throughput import flops_per_token
from torchft.weights import load_weights, random_weights


@dataclass
class Config:
    """Every option stands with its default and unit in torchft/config.py; `tune run kto_distributed --help` lists them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraOptions = field(default_factory=LoraOptions)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    kto: KtoOptions = field(default_factory=KtoOptions)


def log_ratios(model: CausalLM, batch: Batch) -> torch.Tensor:
    """log pi(y|x) - log pi_ref(y|x) of each answer, (N,) fp32; without dropout on either side."""

    def logps() -> torch.Tensor:
        where = {"positions": batch.positions, "documents": batch.documents}
        tokens = model(batch.input_ids, **where, labels=batch.labels, per_token=True)  # (B, T)
        return sum_by_answer(tokens, batch.sequences, batch.num_sequences)

    with torch.no_grad(), adapters_off(model):
        reference = logps()
    return logps() - reference


@torch.no_grad()
def baseline(model: CausalLM, batches: Iterable[Batch], device: torch.device) -> torch.Tensor:
    """The KL divergence from the reference in nats per answer, at least 0, from answers to other prompts: a scalar, on all
    processes.
    """
    totals = torch.zeros(2, device=device, dtype=torch.float64)
    for batch in batches:
        totals[0] += log_ratios(model, batch.to(device)).sum()
        totals[1] += batch.num_sequences
    total, count = sum_over_processes(totals)
    return (total / count).clamp(min=0).float()


def batch_loss(model: CausalLM, batch: Batch, kl: torch.Tensor, options: KtoOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of the batch's answers, summed, and what is logged of them, summed likewise."""
    ratios = log_ratios(model, batch)
    losses = kto(ratios, batch.desirable, kl, options.beta, (options.desirable_weight, options.undesirable_weight))
    return losses.sum(), verdict_sums(ratios, batch.desirable, kl, options.beta)


@torch.no_grad()
def evaluate(model: CausalLM, valid: Dataset, device: torch.device, options: KtoOptions, **cells: object) -> dict[str, float]:
    """Means over all answers of the loss and what is logged with it; they do not depend on how the batches are cut."""
    totals = torch.zeros(6, device=device, dtype=torch.float64)
    with eval_mode(model):
        others = mismatched(valid, np.arange(len(valid)), cells["data_cfg"].max_seq_len)
        kl = baseline(model, eval_batches(others, **cells), device)
        for batch in eval_batches(valid, **cells):
            loss, sums = batch_loss(model, batch.to(device), kl, options)
            totals += torch.cat([loss[None], sums])
    loss, *sums = sum_over_processes(totals)
    means = {"loss": loss / len(valid)} | verdict_means(torch.stack(sums), kl)
    return {f"valid_{name}": value.item() for name, value in means.items()}


def show(answers: list[Answer], log: RunLogger) -> None:
    """A few answers below their prompts, and what was expected where it is something else."""
    for answer in answers:
        verdict = " (right)" if answer.right else f"\n  expected  {shortened(answer.expected)}"
        log.print(f"  prompt    {shortened(answer.prompt)}\n  answer    {answer.answer}{verdict}")


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
        model = build_model(read_config(path))
    spec, report, new_rows = add_adapter(model, cfg.lora, new_ids)
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
    params = trainable_parameters(model)
    optimizer = build_optimizer(params, cfg.optim)

    # ---- Data. All epochs are planned here, so that the data position of a run is its step number.
    with node_leader_first():
        train, valid = build_datasets(cfg.data, tokenizer, template, run.seed, kind="verdicts", quiet=rank() > 0)
    check_ids(model.config, tokenizer, train, valid)
    warn_of_misfits(model, train, tokenizer, cfg.data.max_seq_len, log.print)
    loader = Loader(train, cfg.data, run, rank(), world_size())
    log.print(summary(loader, valid))
    rows_at_once = max(1, 16_384 // (cfg.data.max_seq_len + run.max_new_tokens))  # bounds the KV cache
    answering = {"batch_size": rows_at_once, "max_new_tokens": run.max_new_tokens}
    samples, scored = (first_conversations(valid, template, n) for n in (run.sample_rows, run.exact_match_rows))

    # ---- Resume: parameters, moments, random state and step; the run goes on as if it had never stopped.
    state, fingerprints = {}, {"data": train.fingerprint, "valid": valid.fingerprint if valid else None}
    fingerprints["model"] = None if cfg.model.weights == "random" else fingerprint(path)
    check_agreement(fingerprints)
    if checkpoint:
        state = load_checkpoint(checkpoint, params=params, optimizer=optimizer, unchanged=fingerprints)
    first_step = state.get("step", 0) + 1
    length = {"total_steps": loader.total_steps, "steps_per_epoch": loader.steps_per_epoch(0), "start_step": first_step - 1}
    flops = 2.5 * flops_per_token(model, cfg.data.max_seq_len)  # three forwards more than the two halves of a LoRA step
    log.begin(**length, state=state.get("log"), flops_per_token=flops)
    best_loss = best_checkpoint(out, log.print)[0] if checkpoint else math.inf  # log.begin has moved what a later step left aside
    profiler = ProfileWindow(run, device, log.print)
    cells = {"data_cfg": cfg.data, "micro_batch_size": run.micro_batch_size, "rank": rank(), "world_size": world_size()}
    if valid and first_step == 1:
        with log.paused():
            log.validation(0, **evaluate(model, valid, device, cfg.kto, **cells))
    if scored and first_step == 1:
        with log.paused():
            accuracy, answers = exact_match(model, tokenizer, template, scored, **answering)
        log.validation(0, exact_match=accuracy)
        show(answers[: run.sample_rows], log)

    # ---- Loop. A step's loss is the sum over its answers divided by their number, however it is cut into batches.
    stop = StopSignal()  # from here on there is something to save
    for step in range(first_step, loader.total_steps + 1):
        batches, (tokens, supervised) = loader.step(step - 1), loader.step_tokens(step - 1)
        lr = lr_at(step - 1, loader.total_steps, cfg.optim)
        set_lr(optimizer, lr)
        log.latest(**balance_routers(model, batches, device))  # a mixture's auxiliary loss, if config.json asks for it
        samples_now, totals = loader.step_samples(step - 1), 0.0
        others = mismatched(train, samples_now, cfg.data.max_seq_len)
        kl = baseline(model, eval_batches(others, **cells), device)
        for batch in batches:
            sync_gradients(model, batch is batches[-1])  # accumulate here first
            micro_loss, sums = batch_loss(model, batch.to(device), kl, cfg.kto)
            (micro_loss * world_size() / len(samples_now)).backward()  # the mean over processes is taken; the sum is meant
            totals += torch.cat([micro_loss.detach()[None], sums])
        mean_gradients(params)  # where each process holds all of them; FSDP2 has done it in backward
        loss, *sums = sum_over_processes(totals)
        if new_ids and not cfg.lora.modules_to_save:
            freeze_old_rows(model, new_ids)
        grad_norm, found_inf = clip_and_check(params, cfg.optim.max_grad_norm, loss)
        step_optimizer(optimizer, found_inf)  # a step that is not finite is skipped, and the log stops the run
        optimizer.zero_grad()
        logged = verdict_means(torch.stack(sums), kl)
        log.figures(len(samples_now), {name: value * len(samples_now) for name, value in logged.items()})
        activations.step()
        log.step(step, loss=loss, supervised=supervised, tokens=tokens, lr=lr, grad_norm=grad_norm, found_inf=found_inf)
        profiler.step()

        last, valid_loss = step == loader.total_steps, None
        if valid and (last or (run.eval_every and step % run.eval_every == 0)):
            with log.paused():
                found = evaluate(model, valid, device, cfg.kto, **cells)
                valid_loss = found["valid_loss"]
                log.validation(step, **found)
                show(answer_examples(model, tokenizer, template, samples, **answering), log)
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

    # ---- Result: the adapter as a PEFT directory, read back and compared before it is called done.
    if run.keep_best and (best := best_checkpoint(out, log.print)[1]):
        load_checkpoint(best, params=params, optimizer=optimizer, unchanged={})
        log.print(f"exporting {best}, the lowest validation loss")
    if cfg.model.weights != "random":
        text = {"tokenizer": tokenizer, "template": template}  # saved where they are not the base model's own
        save_adapter(model, spec, out / "adapter", base_path=str(path), **text, replace_existing=True)
        log.print(f"saved and verified: {verify_adapter(model, spec, out / 'adapter')}")
        log.print(f"try it: {tune_command()} generate {cfg.model.path} --adapter {out / 'adapter'}")
    if scored:  # after the export, which an interruption does not cost then
        accuracy, _ = exact_match(model, tokenizer, template, scored, **answering)
        log.validation(loader.total_steps, exact_match=accuracy)
    log.close()
    leave_processes()


if __name__ == "__main__":
    main(parse(Config))
