"""Measure recipes on a GPU and append the figures to docs/records.jsonl.

    python scripts/bench_recipe.py --list
    python scripts/bench_recipe.py --case lora_8b_bf16_2048x4_noac --baseline hf_peft --baseline plain
    python scripts/bench_recipe.py --case dpo_1b_bf16_1024x4_noac --baseline trl_dpo
    python scripts/bench_recipe.py --case full_8b_bf16_2048x4_ac --gpus 2 --baseline hf_peft
    python scripts/bench_recipe.py --case lora_8b_bf16_2048x4_noac --case qlora_8b_nf4_2048x1_ac --baseline hf_peft
    python scripts/bench_recipe.py --case qlora_8b_nf4_2048x1_min --option optim.name=adamw_8bit
    python scripts/bench_recipe.py --case qlora_8b_nf4_2048x1_min --option data.max_seq_len=114688 --option run.max_steps=2

The cases that end in _min take the least memory. The longest context that fits into so much: raise data.max_seq_len while the
record's peak_alloc_gib allows; two steps are enough to see it.

Each case runs the recipe itself, in a process of its own, with `model.weights=random`: the config.json of the real model,
a small tokenizer, and text that fills every row with one fully supervised document. 5 steps warm up, the next 10 are
measured: median tokens/s, its spread, and the peak of allocated memory over the whole run; with activation checkpointing, also how
many blocks recompute at least a part, and how much a step sends to CPU memory. Baselines run in the same call on the
same GPUs: hf_peft (transformers + peft; on several, of full_ cases transformers under FSDP2), and, on one, plain, the best of the recipe without kernels over {eager, compile} x {flash,
cuDNN attention}; all four are in the record. The cases of DPO are in bench_dpo.py. Leaves out: loading weights from files, and
any claim about quality.
"""

import argparse
import datetime
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_dpo

REPO = Path(__file__).resolve().parent.parent
WARMUP_STEPS, MEASURED_STEPS = 5, 10
BASELINES = ("hf_peft", "plain", "trl_dpo")
PLAIN = ("compile cudnn", "compile flash", "eager cudnn", "eager flash")

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
SIZES = {  # -> family, row of its SIZES
    "1b": ("llama", "Llama-3.2-1B"),
    "3b": ("llama", "Llama-3.2-3B"),
    "70b": ("llama", "Llama-3.1-70B"),
    "gemma4b": ("gemma3", "Gemma-3-4B"),
    "qwen30ba3b": ("qwen3_moe", "Qwen3-30B-A3B"),
}
CASES = [
    f"{method}_8b_{dtype}_{shape}_{ac}"
    for method, dtype in (("lora", "bf16"), ("lora", "fp8"), ("qlora", "nf4"))
    for shape in ("2048x4", "8192x1", "2048x1")
    for ac in ("noac", "ac")
]
CASES += ["qlora_8b_nf4_2048x1_min", "qlora_70b_nf4_8192x1_ac"]
SMALLEST = {"model.quantize": "nf4_int8_head", "model.offload": "[activations,embeddings]"}
SMALLEST |= {"model.activation_checkpointing": "full"}
CASES += ["full_1b_bf16_2048x4_noac", "full_1b_fp32master_2048x4_noac"]
CASES += ["full_3b_fp32master_2048x4_ac", "full_8b_bf16_2048x4_ac"]
CASES += ["lora_gemma4b_bf16_2048x4_noac", "lora_qwen30ba3b_bf16_2048x4_ac", "qlora_qwen30ba3b_nf4_2048x4_ac"]
CASES += bench_dpo.CASES


def case_overrides(case: str) -> tuple[dict, dict[str, object]]:
    """Split a case's name, method_model_dtype_<seq>x<batch>_<ac|noac|min>, into a config.json and recipe overrides."""
    method, model, dtype, shape, ac = case.split("_")
    seq, batch = (int(part) for part in shape.split("x"))
    # the weights of the one GPU's bf16 case are kept in bf16 too; on several GPUs, and by default, in fp32
    optimizer = {"optim.name": "adamw_bf16" if case.startswith("full_1b_bf16") else "adamw"} if method == "full" else {}
    stored = {
        "model.quantize": "none" if dtype in ("bf16", "fp32master") else dtype,
        "model.activation_checkpointing": "full" if ac == "ac" else "none",
    }
    return model_config(model), optimizer | (SMALLEST if ac == "min" else stored) | {
        "data.max_seq_len": seq,
        "run.global_batch_size": batch,
        "run.micro_batch_size": batch,
    }


def model_config(size: str) -> dict:
    """config.json of a model of that size."""
    if size == "8b":
        return LLAMA_3_1_8B
    family, row = SIZES[size]
    shape = importlib.import_module(f"torchft.models.{family}").SIZES[row]
    activation = {} if family == "gemma3" else {"hidden_act": "silu"}  # Gemma's is gelu_pytorch_tanh, and goes by another name
    return shape | activation | {"initializer_range": 0.02, "torch_dtype": "bfloat16"}


def write_inputs(folder: Path, config: dict, num_tokens: int) -> None:
    """A model directory without weights, and one document of at least `num_tokens` tokens."""
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((REPO / "torchft/assets/tiny_llama" / name).read_bytes())
    words = [f"{a}{b}" for a in ("north", "river", "stone", "amber", "cedar") for b in ("gate", "field", "ford", "wick")]
    text = " ".join(words[(i * i + 7 * i) % len(words)] for i in range(num_tokens))  # at least one token a word
    (folder / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")


def run_recipe(case: str, timeout_s: int, gpus: int, options: list[str]) -> dict:
    """Run one case through the recipe and reduce its log to the figures of a record; `gpus`: of the distributed one."""
    if case in bench_dpo.CASES:
        return reduce_log(bench_dpo.run_recipe(case, WARMUP_STEPS + MEASURED_STEPS, timeout_s, options, dry_run=False))
    recipe = "full_finetune_distributed" if case.startswith("full_") else "lora_distributed" if gpus else "lora_single_device"
    recipe = [f"--nproc_per_node={gpus}", recipe] if gpus else [recipe]
    return measure(["-m", "torchft", "run", *recipe], case, timeout_s, max(1, gpus), options)


def run_plain(case: str, timeout_s: int, configurations: list[str]) -> dict:
    """The recipe without kernels: the best of these configurations, with the figures of all."""
    script = str(REPO / "scripts/baselines/plain.py")
    found = {}
    for name in configurations:
        try:
            found[name] = measure([script, *name.split()], case, timeout_s, 1, [])
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            found[name] = {"tokens_per_s": 0, "failed": str(error)}
    best = max(found, key=lambda name: found[name]["tokens_per_s"])
    return found[best] | {"configuration": best, "all": found}


def measure(command: list[str], case: str, timeout_s: int, gpus: int, options: list[str]) -> dict:
    """Run a recipe on a case's shapes, the batch times the GPUs."""
    config, overrides = case_overrides(case)
    overrides["run.global_batch_size"] *= gpus
    overrides |= dict(option.split("=", 1) for option in options)  # which may be the case's own
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = int(overrides.get("run.max_steps", WARMUP_STEPS + MEASURED_STEPS))
        rows = int(overrides["run.global_batch_size"]) * steps
        write_inputs(folder, config, 8 * rows * int(overrides["data.max_seq_len"]))  # its one short row is seldom drawn
        fixed = {
            "model.path": folder / "model",
            "model.weights": "random",
            "data.train": folder / "text.jsonl",
            "run.out": folder / "out",
            "run.max_steps": steps,
            "run.sample_rows": 0,
        }
        fixed |= {} if case.startswith("full_") else {"lora.rank": 16}
        args = [f"{key}={value}" for key, value in {**fixed, **overrides}.items()]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
        subprocess.run([sys.executable, *command, *args], check=True, timeout=timeout_s, cwd=REPO, env=environment)
        out = Path(overrides.get("run.out", folder / "out"))
        records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return reduce_log([r for r in records if "tokens_per_s" in r])


def reduce_log(records: list[dict]) -> dict:
    """Median and spread of tokens/s after the warm-up, or of the last step of a shorter run; peak memory and loss of all of it."""
    rates = [r["tokens_per_s"] for r in records[min(WARMUP_STEPS, len(records) - 1) :]]
    return {
        "tokens_per_s": round(statistics.median(rates)),
        "tokens_per_s_min_max": [round(min(rates)), round(max(rates))],
        "peak_alloc_gib": round(max(r["peak_memory_gib"] for r in records), 2),
        "loss_first": records[0]["loss"],
        "loss_last": records[-1]["loss"],
        **{name: records[-1][name] for name in ("recomputed_blocks", "offloaded_gib", "graph_gib") if name in records[-1]},
    }


def run_baseline(name: str, case: str, timeout_s: int, configurations: list[str], gpus: int) -> dict:
    """Run scripts/baselines/<name>.py on the case's shapes, the batch times the GPUs; its last line is one JSON object."""
    if name == "plain":
        return run_plain(case, timeout_s, configurations)
    if name == "trl_dpo":
        return bench_dpo.run_trl(case, WARMUP_STEPS + MEASURED_STEPS, timeout_s, dry_run=False)
    config, overrides = case_overrides(case)
    overrides["run.global_batch_size"] *= max(1, gpus)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        overrides.pop("model.offload", None)
        overrides.pop("optim.name", None)  # transformers keeps the weights and states in the dtype they were loaded in
        args = [f"--{key.split('.')[1]}={value}" for key, value in overrides.items()]
        args += ["--full"] if case.startswith("full_") else []
        # on several GPUs the recipe keeps the 8B case in fp32, as it does by default: its peer too
        args += ["--dtype=float32"] if "fp32master" in case or (gpus > 1 and case.startswith("full_8b")) else []
        command = [sys.executable, *launcher, str(REPO / "scripts/baselines" / f"{name}.py"), f"--config={folder}", *args]
        done = subprocess.run(command, check=True, timeout=timeout_s, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def check(cases: list[str], options: list[str], gpus: int) -> None:
    """Raises SystemExit, before anything is written or started, where cases cannot be measured as asked."""
    if unknown := sorted(set(cases) - set(CASES)):
        raise SystemExit(f"error: no case {', '.join(unknown)}; bench_recipe.py --list prints those there are")
    if gpus and set(cases) & set(bench_dpo.CASES):
        raise SystemExit("error: DPO cases are measured on one GPU: leave out --gpus")
    if wrong := [option for option in options if "=" not in option]:
        raise SystemExit(f"error: --option {wrong[0]}: write KEY=VALUE, such as --option model.shard=all")
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("error: no GPU to measure on")
    if not 0 <= gpus <= torch.cuda.device_count():
        raise SystemExit(f"error: --gpus {gpus}: write 0 (one process) to {torch.cuda.device_count()}, as many as this machine has")


def environment(gpus: int) -> dict:
    """Where and with what a record was measured."""
    import torch
    import triton

    git = subprocess.run(["git", "-C", str(REPO), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(["git", "-C", str(REPO), "status", "--porcelain"], capture_output=True, text=True)
    # The tree may have been copied here without its history; whoever copies it says which commit it is.
    commit = os.environ.get("BENCH_COMMIT") or git.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "gpu": torch.cuda.get_device_name(),
        "num_gpus": max(1, gpus),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[], help="may be repeated; see --list")
    parser.add_argument(
        "--gpus", type=int, default=0, help="a distributed recipe on so many GPUs, the batch times that; 0: one process"
    )
    parser.add_argument("--option", action="append", default=[], help="one more of the recipe's, such as model.shard=all")
    parser.add_argument("--baseline", action="append", default=[], choices=BASELINES, help="hf_peft (of full_ cases transformers alone), plain, or of DPO cases trl_dpo; may be repeated")
    parser.add_argument(
        "--plain", action="append", choices=PLAIN, help="a configuration of the baseline plain; may be repeated; without it all four"
    )
    parser.add_argument("--records", type=Path, default=REPO / "docs/records.jsonl", help="JSON lines are appended here")
    parser.add_argument("--timeout", type=int, default=240, help="seconds per case and per baseline")
    parser.add_argument("--list", action="store_true", help="print the usual cases")
    args = parser.parse_args()
    if args.list:
        print("\n".join(CASES))
        return
    if not args.case:
        parser.error("give a --case; --list prints those there are")
    if any((case in bench_dpo.CASES) != (name == "trl_dpo") for case in args.case for name in args.baseline):
        raise SystemExit("error: the baseline of DPO cases is trl_dpo, and only theirs")
    if args.gpus > 1 and "plain" in args.baseline:
        raise SystemExit("error: the baseline plain runs on one GPU: leave out --gpus")
    check(args.case, args.option, args.gpus)
    failed = False
    for case in args.case:
        try:
            options = [f"--gpus {args.gpus}"] * bool(args.gpus) + [f"--option {option}" for option in args.option]
            options += [f"--baseline {name}" for name in args.baseline] + [f"--plain '{name}'" for name in args.plain or []]
            command = " ".join(["python scripts/bench_recipe.py --case", case, *options])
            measured = run_recipe(case, args.timeout, args.gpus, args.option)
            record = {"case": case, **environment(args.gpus), "command": command, **measured, "baselines": {}}
            for name in args.baseline:
                record["baselines"][name] = run_baseline(name, case, args.timeout, args.plain or list(PLAIN), args.gpus)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"{case}: FAILED, nothing recorded: {error}", flush=True)
            failed = True
            continue
        with args.records.open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(f"{case}: {record['tokens_per_s']:,} tokens/s, {record['peak_alloc_gib']} GiB", record["baselines"], flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
