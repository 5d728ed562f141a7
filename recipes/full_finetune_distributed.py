"""Full fine-tuning of a causal language model on 1 to N GPUs, from a model directory to a verified model directory.

    tune run full_finetune_distributed --config tiny/full                       # the embedded demo, on a CPU or one GPU
    tune run --nproc_per_node 8 full_finetune_distributed --config llama3_1/8B_full data.train=my.jsonl
    tune cp full_finetune_distributed ./mine.py && tune run --nproc_per_node 2 ./mine.py --config tiny/full

Every weight is trained. FSDP2 divides the weights (in fp32; in bf16 with optim.name=adamw_bf16), their gradients and moments
over the processes and gathers a block's weights in model.dtype while it computes. It is lora_distributed without adapters: `diff` the two. Every process runs all of
this; what is printed and written comes from the first.
The whole run is in `main`, from top to bottom: model, optimizer, data, resume, loop, export. Nothing else drives it, so a copy
is yours to edit. Measured results: docs/RECORDS.md. Left out: training some of the weights.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from torchft.activations import ActivationMemory
from torchft.answers import Answer, answer_examples, exact_match, first_conversations, shortened
from torchft.balance import balance_routers
from torchft.checkpoint import StopSignal, find_checkpoint
from torchft.config import DataConfig, ModelConfig, OptimConfig, RunConfig, resolve_path
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
    node_leader_first,
    sum_over_processes,
)
from torchft.fit import check_ids, warn_of_misfits
from torchft.fuse import fuse
from torchft.hf_checkpoint import fingerprint
from torchft.in_backward import StepInBackward
from torchft.launch import tune_command
from torchft.metrics import RunLogger
from torchft.models import build_model, read_config
from torchft.modules.eval_mode import eval_mode
from torchft.modules.lora import trainable_parameters
from torchft.modules.transformer import CausalLM
from torchft.modules.vocab import grow_vocab, init_new_rows
from torchft.optim import build_optimizer, lr_at, norm_and_check, set_lr, step_optimizer
from torchft.parse import parse
from torchft.parts import PartsWriter, load_parts
from torchft.profiling import ProfileWindow
from torchft.ranks import rank, world_size
from torchft.run_dir import best_checkpoint
from torchft.save_model import save_model
from torchft.throughput import flops_per_token
from torchft.weights import load_weights, random_weights


@dataclass
class Config:
    """Every option stands with its default and unit in torchft/config.py; `tune run full_finetune_distributed --help` lists them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5))
    run: RunConfig = field(default_factory=RunConfig)


def batch_loss(model: CausalLM, batch: Batch) -> torch.Tensor:
    """Sum over the batch's supervised tokens of their cross entropy, in nats: a fp32 scalar."""
    return model(batch.input_ids, positions=batch.positions, documents=batch.documents, labels=batch.labels)


@torch.no_grad()
def evaluate(model: CausalLM, batches: Iterable[Batch], device: torch.device) -> float:
    """Mean cross entropy per supervised token over all batches, in nats; it does not depend on how they are cut."""
    loss, supervised = torch.zeros((), device=device, dtype=torch.float64), 0
    with eval_mode(model):
        for batch in batches:
            loss += batch_loss(model, batch.to(device))
            supervised += batch.num_supervised
    loss, supervised = sum_over_processes(torch.stack([loss, loss.new_tensor(supervised)])).tolist()
    return loss / supervised


def show(answers: list[Answer], log: RunLogger) -> None:
    """A few answers below their prompts, and what was expected where it is something else."""
    for answer in answers:
        verdict = " (right)" if answer.right else f"\n  expected  {shortened(answer.expected)}"
        log.print(f"  prompt    {shortened(answer.prompt)}\n  answer    {answer.answer}{verdict}")


def main(cfg: Config) -> None:
    """Train all weights; all files go to cfg.run.out. Raises UserError for what a user can get wrong."""
    join_processes(cfg.model, cfg.optim, cfg.run)
    run, out = cfg.run, Path(cfg.run.out)
    device = setup_device(run.seed, run.deterministic)
    log = RunLogger(run, asdict(cfg), device)
    checkpoint = find_checkpoint(out, run.resume, asdict(cfg), log.print)  # now: a wrong one fails before anything is loaded

    # ---- Model. On meta until its weights stream in, so that no process ever holds all of it. The order is the same in
    # all recipes: rows for added tokens, kernels, checkpointing, compile, division, weights.
    path = resolve_path(cfg.model.path)
    tokenizer = load_tokenizer(path)
    template = load_template(cfg.data.chat_template, tokenizer, cfg.data.new_tokens)
    new_ids = tokenizer.added_ids  # a range, empty without data.new_tokens
    with torch.device("meta"):
        model = build_model(read_config(path))
    new_rows = grow_vocab(model, new_ids)
    log.print(str(fuse(model, cfg.model.kernels, device)))  # delete this line for plain PyTorch
    activations = ActivationMemory(model, cfg.model, cfg.data, run, device, log)  # recomputed, offloaded, or what fits
    compile_blocks(model, cfg.model.compile, device, log.print)
    dtype = getattr(torch, cfg.model.dtype)  # to compute and export in
    kept = dtype if cfg.optim.name == "adamw_bf16" else torch.float32  # of the weights that are trained
    log.print(str(divide(model, cfg.model, device, kept, dtype)))
    home = torch.device("cpu") if "weights" in cfg.model.offload else device  # where weights and moments lie between times
    if cfg.model.weights == "random":
        log.print("WARNING: model.weights=random is for measuring; nothing will be exported")
        random_weights(model, seed=run.seed, device=home, dtype=kept)
    else:
        log.print(str(load_weights(model, path, device=home, dtype=kept, new_rows=new_rows)))
    init_new_rows(model, new_ids, torch.Generator().manual_seed(run.seed))  # on the CPU: the same on every device
    params = trainable_parameters(model)
    optimizer = build_optimizer(params, cfg.optim, run.seed)
    updates = StepInBackward(params, optimizer) if cfg.optim.in_backward else None

    # ---- Data. All epochs are planned here, so that the data position of a run is its step number.
    with node_leader_first():
        train, valid = build_datasets(cfg.data, tokenizer, template, run.seed, quiet=rank() > 0)
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
        state = load_parts(checkpoint, params=params, optimizer=optimizer, unchanged=fingerprints)
    first_step = state.get("step", 0) + 1
    length = {"total_steps": loader.total_steps, "steps_per_epoch": loader.steps_per_epoch(0), "start_step": first_step - 1}
    log.begin(**length, state=state.get("log"), flops_per_token=flops_per_token(model, cfg.data.max_seq_len))
    best_loss = best_checkpoint(out, log.print)[0] if checkpoint else math.inf  # log.begin has moved what a later step left aside
    profiler = ProfileWindow(run, device, log.print)
    if scored and first_step == 1:
        with log.paused():
            accuracy, answers = exact_match(model, tokenizer, template, scored, **answering)
        log.validation(0, exact_match=accuracy)
        show(answers[: run.sample_rows], log)

    # ---- Loop. A step's loss is the sum over its supervised tokens divided by their number, however it is cut into batches.
    writer = PartsWriter(out)  # in the background of the following steps
    stop = StopSignal()  # from here on there is something to save
    for step in range(first_step, loader.total_steps + 1):
        batches, (tokens, supervised) = loader.step(step - 1), loader.step_tokens(step - 1)
        lr = lr_at(step - 1, loader.total_steps, cfg.optim)
        set_lr(optimizer, lr)
        log.latest(**balance_routers(model, batches, device))  # a mixture's auxiliary loss, if config.json asks for it
        loss = torch.zeros((), device=device)
        for batch in batches:
            divisor = supervised / world_size()  # the mean over processes is taken; the sum is meant
            micro_loss = batch_loss(model, batch.to(device))
            if updates:  # optim.in_backward: each weight's step and zero_grad happen in here
                grad_norm, found_inf = updates.backward(micro_loss / divisor)
            else:
                (micro_loss / divisor).backward()
            loss += micro_loss.detach()
        sum_over_processes(loss)
        if not updates:
            grad_norm, found_inf, clip = norm_and_check(params, cfg.optim.max_grad_norm, loss)
            step_optimizer(optimizer, found_inf, clip)  # a step that is not finite is skipped, and the log stops the run
            optimizer.zero_grad()
        activations.step()
        log.step(step, loss=loss, supervised=supervised, tokens=tokens, lr=lr, grad_norm=grad_norm, found_inf=found_inf)
        profiler.step()

        writer.check()  # a save that failed ends the run
        last, valid_loss = step == loader.total_steps, None
        if valid and (last or (run.eval_every and step % run.eval_every == 0)):
            with log.paused():
                cells = {"micro_batch_size": run.micro_batch_size, "rank": rank(), "world_size": world_size()}
                held_out = eval_batches(valid, data_cfg=cfg.data, **cells)
                valid_loss = evaluate(model, held_out, device)
                log.validation(step, valid_loss=valid_loss)
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

    # ---- Result: a Hugging Face model directory, read back and compared before it is called done.
    if run.keep_best and (best := best_checkpoint(out, log.print)[1]):
        load_parts(best, params=params, optimizer=optimizer, unchanged={})
        log.print(f"exporting {best}, the lowest validation loss")
    if cfg.model.weights != "random":
        saved = save_model(model, path, out / "model", dtype=dtype, tokenizer=tokenizer, template=template)
        log.print(f"saved and verified: {saved}")
        log.print(f"try it: {tune_command()} generate {out / 'model'}")
    if scored:  # after the export, which an interruption does not cost then
        accuracy, _ = exact_match(model, tokenizer, template, scored, **answering)
        log.validation(loader.total_steps, exact_match=accuracy)
    log.close()
    leave_processes()


if __name__ == "__main__":
    main(parse(Config))
