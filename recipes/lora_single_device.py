"""LoRA, QLoRA or DoRA fine-tuning of a causal language model on one device, from a model directory to a verified adapter.

    tune run lora_single_device --config tiny/lora                              # the embedded demo, on a CPU or a GPU
    tune run lora_single_device --config llama3_1/8B_lora data.train=my.jsonl   # a real model on one GPU
    tune cp lora_single_device ./mine.py && tune run ./mine.py --config tiny/lora

The whole run is in `main`, from top to bottom: model, optimizer, data, resume, loop, export. Nothing else drives it, so a copy
is yours to edit. Measured results: docs/RECORDS.md. Left out: several processes, full fine-tuning.
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
from torchft.checkpoint import StopSignal, find_checkpoint, load_checkpoint, save_checkpoint
from torchft.config import DataConfig, LoraOptions, ModelConfig, OptimConfig, RunConfig, resolve_path
from torchft.data.chat_template import load_template
from torchft.data.dataset import build_datasets
from torchft.data.loader import Batch, Loader, eval_batches
from torchft.data.report import summary
from torchft.data.tokenizer import load_tokenizer
from torchft.device import compile_blocks, setup_device
from torchft.distributed import require_single_process
from torchft.fit import check_ids, warn_of_misfits
from torchft.fuse import fuse
from torchft.hf_checkpoint import fingerprint
from torchft.launch import tune_command
from torchft.metrics import RunLogger
from torchft.models import build_model, read_config
from torchft.modules.eval_mode import eval_mode
from torchft.modules.lora import trainable_parameters
from torchft.modules.transformer import CausalLM
from torchft.modules.vocab import freeze_old_rows
from torchft.optim import build_optimizer, clip_and_check, lr_at, set_lr, step_optimizer
from torchft.parse import parse
from torchft.profiling import ProfileWindow
from torchft.run_dir import best_checkpoint
from torchft.step_graph import StepGraph
from torchft.storage import store_frozen
from torchft.throughput import flops_per_token
from torchft.weights import load_weights, random_weights


@dataclass
class Config:
    """Every option stands with its default and unit in torchft/config.py; `tune run lora_single_device --help` lists them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraOptions = field(default_factory=LoraOptions)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


def batch_loss(model: CausalLM, batch: Batch) -> torch.Tensor:
    """Sum over the batch's supervised tokens of their cross entropy, in nats: a fp32 scalar."""
    return model(batch.input_ids, positions=batch.positions, documents=batch.documents, labels=batch.labels)


def run_batch(model: CausalLM, batch: Batch, divisor: float | torch.Tensor) -> torch.Tensor:
    """Adds the gradients of the batch's loss / divisor; returns its loss."""
    loss = batch_loss(model, batch)
    (loss / divisor).backward()
    return loss.detach()


@torch.no_grad()
def evaluate(model: CausalLM, batches: Iterable[Batch], device: torch.device) -> float:
    """Mean cross entropy per supervised token over all batches, in nats; it does not depend on how they are cut."""
    loss, supervised = torch.zeros((), device=device, dtype=torch.float64), 0
    with eval_mode(model):
        for batch in batches:
            loss += batch_loss(model, batch.to(device))
            supervised += batch.num_supervised
    return loss.item() / supervised


def show(answers: list[Answer], log: RunLogger) -> None:
    """A few answers below their prompts, and what was expected where it is something else."""
    for answer in answers:
        verdict = " (right)" if answer.right else f"\n  expected  {shortened(answer.expected)}"
        log.print(f"  prompt    {shortened(answer.prompt)}\n  answer    {answer.answer}{verdict}")


def main(cfg: Config) -> None:
    """Train one adapter; all files go to cfg.run.out. Raises UserError for what a user can get wrong."""
    require_single_process("lora_single_device", cfg.model)
    run, out = cfg.run, Path(cfg.run.out)
    device = setup_device(run.seed, run.deterministic)
    generator = torch.Generator().manual_seed(run.seed)  # on the CPU: one seed gives one adapter on every device
    log = RunLogger(run, asdict(cfg), device)
    checkpoint = find_checkpoint(out, run.resume, asdict(cfg), log.print)  # now: a wrong one fails before anything is loaded

    # ---- Model. On meta until its weights stream in, so that a quantised model never exists dense. The order is the same in
    # all recipes: adapters, quantised types, kernels, checkpointing, compile, weights.
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
    dtype = getattr(torch, cfg.model.dtype)  # of the base; what is trained is kept in fp32
    if cfg.model.weights == "random":
        log.print("WARNING: model.weights=random is for measuring; nothing will be exported")
        random_weights(model, seed=run.seed, device=device, dtype=dtype)
    else:
        log.print(str(load_weights(model, path, device=device, dtype=dtype, new_rows=new_rows)))
    init_adapter(model, cfg.lora, new_ids, generator)
    params = trainable_parameters(model)
    optimizer = build_optimizer(params, cfg.optim)
    train_batch = StepGraph(run_batch, model, cfg.model.kernels, log)  # or run_batch itself, launch by launch

    # ---- Data. All epochs are planned here, so that the data position of a run is its step number.
    train, valid = build_datasets(cfg.data, tokenizer, template, run.seed)
    check_ids(model.config, tokenizer, train, valid)
    warn_of_misfits(model, train, tokenizer, cfg.data.max_seq_len, log.print)
    loader = Loader(train, cfg.data, run)
    log.print(summary(loader, valid))
    rows_at_once = max(1, 16_384 // (cfg.data.max_seq_len + run.max_new_tokens))  # bounds the KV cache
    answering = {"batch_size": rows_at_once, "max_new_tokens": run.max_new_tokens}
    samples, scored = (first_conversations(valid, template, n) for n in (run.sample_rows, run.exact_match_rows))

    # ---- Resume: parameters, moments, random state and step; the run goes on as if it had never stopped.
    state, fingerprints = {}, {"data": train.fingerprint, "valid": valid.fingerprint if valid else None}
    fingerprints["model"] = None if cfg.model.weights == "random" else fingerprint(path)
    if checkpoint:
        state = load_checkpoint(checkpoint, params=params, optimizer=optimizer, unchanged=fingerprints)
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
    stop = StopSignal()  # from here on there is something to save
    for step in range(first_step, loader.total_steps + 1):
        batches, (tokens, supervised) = loader.step(step - 1), loader.step_tokens(step - 1)
        lr = lr_at(step - 1, loader.total_steps, cfg.optim)
        set_lr(optimizer, lr)
        log.latest(**balance_routers(model, batches, device))  # a mixture's auxiliary loss, if config.json asks for it
        loss = torch.zeros((), device=device)
        for batch in batches:
            loss += train_batch(model, batch.to(device), supervised)
        if new_ids and not cfg.lora.modules_to_save:
            freeze_old_rows(model, new_ids)
        grad_norm, found_inf = clip_and_check(params, cfg.optim.max_grad_norm, loss)
        step_optimizer(optimizer, found_inf)  # a step that is not finite is skipped, and the log stops the run
        optimizer.zero_grad()
        activations.step()
        log.step(step, loss=loss, supervised=supervised, tokens=tokens, lr=lr, grad_norm=grad_norm, found_inf=found_inf)
        profiler.step()

        last, valid_loss = step == loader.total_steps, None
        if valid and (last or (run.eval_every and step % run.eval_every == 0)):
            with log.paused():
                held_out = eval_batches(valid, data_cfg=cfg.data, micro_batch_size=run.micro_batch_size)
                valid_loss = evaluate(model, held_out, device)
                log.validation(step, valid_loss=valid_loss)
                show(answer_examples(model, tokenizer, template, samples, **answering), log)
        stopping = stop.exit_code  # 0: nobody asked, not even while it was validated
        improved = run.keep_best and valid_loss is not None and valid_loss < best_loss
        if last or improved or stopping or (run.save_every and step % run.save_every == 0):
            with log.paused():
                state = fingerprints | {"log": log.state()}
                kept = {"keep_last": run.keep_last, "valid_loss": valid_loss if run.keep_best else None}
                save_checkpoint(out, step, params=params, optimizer=optimizer, state=state, config=asdict(cfg), **kept)
            best_loss = valid_loss if improved else best_loss
        if stopping and not last:
            log.print(f"stopped after step {step}; go on with run.resume=auto")
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


if __name__ == "__main__":
    main(parse(Config))
