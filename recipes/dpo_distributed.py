"""Preference tuning (DPO and its relatives) with LoRA, QLoRA or all weights on 1 to N GPUs, from pairs of answers to a model.

    tune run dpo_distributed --config tiny/dpo                                  # the embedded demo, about a minute on a CPU
    tune run --nproc_per_node 8 dpo_distributed --config llama3_1/8B_dpo data.train=pairs.jsonl dpo.loss=ipo
    tune run --nproc_per_node 8 dpo_distributed --config llama3_1/8B_full_dpo data.train=pairs.jsonl     # all weights
    tune cp dpo_distributed ./mine.py && tune run --nproc_per_node 2 ./mine.py --config tiny/dpo

It is lora_distributed, or with lora.rank=0 full_finetune_distributed (`diff` them), with pairs of answers as data and a loss of pairs
(torchft/losses.py). The reference (torchft/reference.py) is the model at the start: its adapters off, or, where all weights are
trained, dpo.reference. A row holds many pairs, each prompt once, and its two answers behind it do not see each other. Every process
runs all of this, the first prints and writes; a copy is yours to edit. Results: docs/RECORDS.md. Left out: new tokens without adapters.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from torchft.activations import ActivationMemory
from torchft.adapter import add_adapter, init_adapter, save_adapter, tokenizer_folder, verify_adapter
from torchft.answers import Answer, answer_examples, exact_match, first_conversations, shortened
from torchft.balance import balance_routers
from torchft.checkpoint import StopSignal, find_checkpoint
from torchft.config import DataConfig, LoraOptions, ModelConfig, OptimConfig, PreferenceOptions, RunConfig, resolve_path
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
from torchft.in_backward import StepInBackward
from torchft.launch import tune_command
from torchft.losses import FIGURES, REFERENCE_FREE, figures, kl_estimate, preference_loss, sum_by_answer
from torchft.metrics import RunLogger
from torchft.models import build_model, read_config
from torchft.modules.eval_mode import eval_mode
from torchft.modules.lora import adapters_off, trainable_parameters
from torchft.modules.transformer import CausalLM
from torchft.modules.vocab import freeze_old_rows
from torchft.optim import build_optimizer, lr_at, norm_and_check, set_lr, step_optimizer
from torchft.parse import parse
from torchft.parts import PartsWriter, load_parts
from torchft.profiling import ProfileWindow
from torchft.ranks import rank, world_size
from torchft.reference import StoredReference, label_logprobs, prepare_reference
from torchft.run_dir import best_checkpoint
from torchft.save_model import save_model
from torchft.step_graph import StepGraph
from torchft.storage import store_frozen
from torchft.throughput import flops_per_token
from torchft.weights import load_weights, random_weights


@dataclass
class Config:
    """Every option stands with its default and unit in torchft/config.py; `tune run dpo_distributed --help` lists them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraOptions = field(default_factory=LoraOptions)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    dpo: PreferenceOptions = field(default_factory=PreferenceOptions)


def batch_loss(model: CausalLM, frozen: CausalLM | None, batch: Batch, options: PreferenceOptions) -> torch.Tensor:
    """Sums over the batch's pairs, of the loss and of FIGURES (the last one with a reference only); without dropout.

    frozen: the model whose base is the reference; None where the batch brings it along, or the loss needs none.
    """
    def by_answer(values: torch.Tensor) -> torch.Tensor:  # (B, T) -> (P, 2)
        return sum_by_answer(values, batch.sequences, batch.num_sequences).view(-1, 2)

    reference = batch.reference
    if frozen is not None:
        with torch.no_grad(), adapters_off(frozen):
            reference = label_logprobs(frozen, batch)
    logps_ref = None if reference is None else by_answer(reference)
    policy = label_logprobs(model, batch)
    logps, lengths = by_answer(policy), by_answer((batch.labels >= 0).float())
    logged = list(figures(logps, logps_ref, lengths, options).values())
    if reference is not None:
        logged.append(kl_estimate(policy, reference, batch.sequences, lengths))
    return torch.stack([preference_loss(logps, logps_ref, lengths, options).sum(), *logged])


def run_batch(
    model: CausalLM, batch: Batch, divisor: float | torch.Tensor, frozen: CausalLM | None, options: PreferenceOptions
) -> torch.Tensor:
    """Adds the gradients of the batch's loss / divisor; returns what `batch_loss` does."""
    sums = batch_loss(model, frozen, batch, options)
    (sums[0] / divisor).backward()
    return sums.detach()


@torch.no_grad()
def evaluate(
    model: CausalLM, frozen: CausalLM | None, batches: Iterable[Batch], device: torch.device, options: PreferenceOptions
) -> dict[str, float]:
    """Means over all pairs of the loss and what is logged with it; they do not depend on how the batches are cut."""
    totals, pairs = 0.0, 0
    with eval_mode(model):
        for batch in batches:
            totals += batch_loss(model, frozen, batch.to(device), options).double()
            pairs += batch.num_sequences // 2
    pairs, *sums = sum_over_processes(torch.cat([totals.new_tensor([pairs]), totals])).tolist()
    return {f"valid_{name}": value / pairs for name, value in zip(("loss", *FIGURES[: len(sums) - 1]), sums, strict=True)}


def show(answers: list[Answer], log: RunLogger) -> None:
    """A few answers below their prompts, and what was expected where it is something else."""
    for answer in answers:
        verdict = " (right)" if answer.right else f"\n  expected  {shortened(answer.expected)}"
        log.print(f"  prompt    {shortened(answer.prompt)}\n  answer    {answer.answer}{verdict}")


def main(cfg: Config) -> None:
    """Train one adapter, or all weights; all files go to cfg.run.out. Raises UserError for what a user can get wrong."""
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
    full = cfg.lora.rank == 0  # all weights are trained, without an adapter
    with torch.device("meta"):
        model = build_model(read_config(path))
    if not full:
        spec, report, new_rows = add_adapter(model, cfg.lora, new_ids)
        log.print(str(report))
    for line in store_frozen(model, cfg.model.quantize, cfg.model.offload):
        log.print(line)
    log.print(str(fuse(model, cfg.model.kernels, device)))  # delete this line for plain PyTorch
    activations = ActivationMemory(model, cfg.model, cfg.data, run, device, log)  # recomputed, offloaded, or what fits
    compile_blocks(model, cfg.model.compile, device, log.print)
    dtype = getattr(torch, cfg.model.dtype)  # to compute and export in, and of a base below an adapter
    kept = dtype if not full or cfg.optim.name == "adamw_bf16" else torch.float32  # of the weights; an adapter's are in fp32
    log.print(str(divide(model, cfg.model, device, *((kept, dtype) if full else ()))))
    if cfg.model.weights == "random":
        log.print("WARNING: model.weights=random is for measuring; nothing will be exported")
        random_weights(model, seed=run.seed, device=device, dtype=kept)
    else:
        log.print(str(load_weights(model, path, device=device, dtype=kept, new_rows=0 if full else new_rows)))
    init_adapter(model, cfg.lora, new_ids, generator)
    params = trainable_parameters(model)
    optimizer = build_optimizer(params, cfg.optim, run.seed)
    updates = StepInBackward(params, optimizer) if cfg.optim.in_backward else None
    train_batch = StepGraph(run_batch, model, cfg.model.kernels, log)  # or run_batch itself, launch by launch

    # ---- Data. All epochs are planned here, so that the data position of a run is its step number.
    with node_leader_first():
        train, valid = build_datasets(cfg.data, tokenizer, template, run.seed, kind="pairs", quiet=rank() > 0)
    check_ids(model.config, tokenizer, train, valid)
    warn_of_misfits(model, train, tokenizer, cfg.data.max_seq_len, log.print)
    loader = Loader(train, cfg.data, run, rank(), world_size())
    log.print(summary(loader, valid))
    rows_at_once = max(1, 16_384 // (cfg.data.max_seq_len + run.max_new_tokens))  # bounds the KV cache
    answering = {"batch_size": rows_at_once, "max_new_tokens": run.max_new_tokens}
    samples, scored = (first_conversations(valid, template, n) for n in (run.sample_rows, run.exact_match_rows))
    cells = {"data_cfg": cfg.data, "micro_batch_size": run.micro_batch_size, "rank": rank(), "world_size": world_size()}

    # ---- Resume: parameters, moments, random state and step; the run goes on as if it had never stopped.
    state, fingerprints = {}, {"data": train.fingerprint, "valid": valid.fingerprint if valid else None}
    fingerprints["model"] = None if cfg.model.weights == "random" else fingerprint(path)
    check_agreement(fingerprints)
    frozen = None if cfg.dpo.loss in REFERENCE_FREE else model  # of the reference: with its adapters off
    if full and frozen is not None:  # while its weights are those of the start: a copy; or None, and batches bring it along
        facts = fingerprints | {"model": fingerprints["model"] or f"random: {path} {run.seed}", "dtype": cfg.model.dtype}
        stored = StoredReference(out, loader, valid, cells, facts)
        frozen = prepare_reference(cfg.dpo, cfg.model, model, stored, device, run.seed, log.print)
    if checkpoint:
        state = load_parts(checkpoint, params=params, optimizer=optimizer, unchanged=fingerprints)
    first_step = state.get("step", 0) + 1
    length = {"total_steps": loader.total_steps, "steps_per_epoch": loader.steps_per_epoch(0), "start_step": first_step - 1}
    forwards = 1.0 if frozen is None else 4 / 3 if full else 1.5  # the reference's is half of what a LoRA step costs
    log.begin(**length, state=state.get("log"), flops_per_token=forwards * flops_per_token(model, cfg.data.max_seq_len))
    best_loss = best_checkpoint(out, log.print)[0] if checkpoint else math.inf  # log.begin has moved what a later step left aside
    profiler = ProfileWindow(run, device, log.print)
    if valid and first_step == 1:
        with log.paused():
            log.validation(0, **evaluate(model, frozen, eval_batches(valid, **cells), device, cfg.dpo))
    if scored and first_step == 1:
        with log.paused():
            accuracy, answers = exact_match(model, tokenizer, template, scored, **answering)
        log.validation(0, exact_match=accuracy)
        show(answers[: run.sample_rows], log)

    # ---- Loop. A step's loss is the sum over its pairs divided by their number, however it is cut into batches.
    writer = PartsWriter(out)  # in the background of the following steps
    stop = StopSignal()  # from here on there is something to save
    for step in range(first_step, loader.total_steps + 1):
        batches, (tokens, supervised) = loader.step(step - 1), loader.step_tokens(step - 1)
        lr = lr_at(step - 1, loader.total_steps, cfg.optim)
        set_lr(optimizer, lr)
        log.latest(**balance_routers(model, batches, device))  # a mixture's auxiliary loss, if config.json asks for it
        pairs, totals = len(loader.step_samples(step - 1)), 0.0
        for batch in batches:
            sync_gradients(model, full or batch is batches[-1])  # an adapter's, which are small, accumulate here first
            divisor = pairs / world_size()  # the mean over processes is taken; the sum is meant
            if updates:  # optim.in_backward: each weight's step and zero_grad happen in here
                found = batch_loss(model, frozen, batch.to(device), cfg.dpo)
                grad_norm, found_inf = updates.backward(found[0] / divisor)
                totals += found.detach()
            else:
                totals += train_batch(model, batch.to(device), divisor, frozen, cfg.dpo)
        mean_gradients(params)  # where each process holds all of them; FSDP2 has done it in backward
        loss, *sums = sum_over_processes(totals)
        if new_ids and not cfg.lora.modules_to_save:
            freeze_old_rows(model, new_ids)
        if not updates:
            grad_norm, found_inf, clip = norm_and_check(params, cfg.optim.max_grad_norm, loss)
            step_optimizer(optimizer, found_inf, clip)  # a step that is not finite is skipped, and the log stops the run
            optimizer.zero_grad()
        log.figures(pairs, dict(zip(FIGURES[: len(sums)], sums, strict=True)))  # without a reference no kl, the last
        activations.step()
        log.step(step, loss=loss, supervised=supervised, tokens=tokens, lr=lr, grad_norm=grad_norm, found_inf=found_inf)
        profiler.step()

        writer.check()  # a save that failed ends the run
        last, valid_loss = step == loader.total_steps, None
        if valid and (last or (run.eval_every and step % run.eval_every == 0)):
            with log.paused():
                found = evaluate(model, frozen, eval_batches(valid, **cells), device, cfg.dpo)
                valid_loss = found["valid_loss"]
                log.validation(step, **found)
                show(answer_examples(model, tokenizer, template, samples, **answering), log)
        stopping = highest(stop.exit_code)  # 0: nobody asked, not even while it was validated
        improved = run.keep_best and valid_loss is not None and valid_loss < best_loss
        kept_last = last and cfg.model.weights != "random"  # a run for measuring leaves nothing that was not asked for
        if kept_last or improved or stopping or (run.save_every and step % run.save_every == 0):
            with log.paused():
                state = fingerprints | {"log": log.state()}
                kept = {"keep_last": run.keep_last, "valid_loss": valid_loss if run.keep_best else None}
                writer.save(step, params=params, optimizer=optimizer, state=state, config=asdict(cfg), **kept)
            best_loss = valid_loss if improved else best_loss
        if stopping and not last:
            writer.wait()
            log.print(f"stopped after step {step}; go on with run.resume=auto")
            leave_processes()
            sys.exit(stopping)
    writer.wait()
    stop.close()  # the last checkpoint stands: from here on a signal ends the run at once
    profiler.close()

    # ---- Result: the adapter as a PEFT directory, or a Hugging Face model directory, read back and compared before it is done.
    if run.keep_best and (best := best_checkpoint(out, log.print)[1]):
        load_parts(best, params=params, optimizer=optimizer, unchanged={})
        log.print(f"exporting {best}, the lowest validation loss")
    if full and cfg.model.weights != "random":
        saved = save_model(model, path, out / "model", dtype=dtype, tokenizer=tokenizer, template=template)
        log.print(f"saved and verified: {saved}")
        log.print(f"try it: {tune_command()} generate {out / 'model'}")
    elif cfg.model.weights != "random":
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
