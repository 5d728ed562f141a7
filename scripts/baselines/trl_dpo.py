"""The baseline of the DPO cases of scripts/bench_recipe.py: TRL's DPOTrainer with PEFT, random weights, the same token ids.

    python scripts/baselines/trl_dpo.py --folder DIR --pairs 4 --steps 15 --activation_checkpointing none

DIR holds model/config.json with a tokenizer and ids.jsonl (prompt_ids, chosen_ids, rejected_ids). Prints one JSON object:
tokens/s, counting both sequences of a pair without padding (median of the steps after the first third), peak allocated GiB,
first and last loss.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Tokenized(DPOTrainer):
    """Takes the rows as they are: they are tokenised already."""

    def _prepare_dataset(self, dataset: Dataset, *args: object, **kwargs: object) -> Dataset:
        return dataset


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--activation_checkpointing", default="none")
    args = parser.parse_args()
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    rows = [json.loads(line) for line in (args.folder / "ids.jsonl").read_text().splitlines()]
    rows = (rows * (1 + args.pairs * args.steps // len(rows)))[: args.pairs * args.steps]
    with torch.device("cuda" if gpu else "cpu"):
        config = AutoConfig.from_pretrained(args.folder / "model")
        dtype = torch.bfloat16 if gpu else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"))
    tokenizer = AutoTokenizer.from_pretrained(args.folder / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    recomputed = args.activation_checkpointing == "full"
    options = DPOConfig(
        output_dir=str(args.folder / "trl"), per_device_train_batch_size=args.pairs, max_steps=args.steps, learning_rate=2e-4,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not gpu, bf16=gpu, max_length=None,
        gradient_checkpointing=recomputed, gradient_checkpointing_kwargs={"use_reentrant": False} if recomputed else None,
        optim="adamw_torch_fused", train_sampling_strategy="sequential", beta=0.1,
    )  # fmt: skip
    times = StepTimes()
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    trainer = Tokenized(model, args=options, **data, callbacks=[times])
    trainer.train()
    tokens = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
    steps = [sum(tokens[step * args.pairs : (step + 1) * args.pairs]) for step in range(args.steps)]
    rates = [count / seconds for count, seconds in zip(steps, times.seconds, strict=True)]
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    result = {
        "tokens_per_s": round(statistics.median(rates[args.steps // 3 :])),
        "peak_alloc_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else 0.0,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
