"""30 steps of the DPO recipe against TRL's DPOTrainer on the same pairs, with PEFT and with all weights; log-probabilities."""

import json
import os
from pathlib import Path

import pytest
import torch
from processes import problems, run_processes
from test_dpo_distributed import options
from test_lora_single_device import log_records
from tiny_training import hide_cuda

from torchft.adapter import adapter_tensors, add_adapter, init_adapter
from torchft.data.chat_template import load_template
from torchft.data.dataset import Dataset, build_datasets
from torchft.data.loader import Loader, eval_batches, make_batch
from torchft.data.tokenizer import load_tokenizer
from torchft.losses import sum_by_answer
from torchft.models import build_model, read_config
from torchft.modules.transformer import CausalLM
from torchft.recipes import dpo_distributed as recipe
from torchft.weights import load_weights

os.environ["HF_HUB_OFFLINE"] = "1"
STEPS, PAIRS = 30, 4


def datasets(cfg: recipe.Config) -> tuple[Dataset, Dataset | None]:
    tokenizer = load_tokenizer(Path(cfg.model.path))
    return build_datasets(cfg.data, tokenizer, load_template("", tokenizer), cfg.run.seed, kind="pairs", quiet=True)


def start(cfg: recipe.Config) -> CausalLM:
    """The model as the recipe has it before its first step."""
    with torch.device("meta"):
        model = build_model(read_config(cfg.model.path))
    add_adapter(model, cfg.lora, range(0))
    load_weights(model, cfg.model.path, device="cpu", dtype=torch.float32)
    init_adapter(model, cfg.lora, range(0), torch.Generator().manual_seed(cfg.run.seed))
    return model


def trl_records(cfg: recipe.Config, rows: list[dict], out: Path) -> list[dict]:
    """What TRL logs, of rows in this order: from the recipe's initial adapter, or of all weights against a second model."""
    from datasets import Dataset as HubDataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(cfg.model.path, dtype=torch.float32)
    shape = {"r": cfg.lora.rank, "lora_alpha": cfg.lora.alpha, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if cfg.lora.rank:
        model = get_peft_model(model, LoraConfig(**shape))
        with torch.no_grad():
            for name, tensor in adapter_tensors(start(cfg)).items():
                model.get_parameter(f"base_model.model.{name.removesuffix('.weight')}.default.weight").copy_(tensor)
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
    tokenizer.pad_token = tokenizer.eos_token
    args = DPOConfig(
        output_dir=str(out), per_device_train_batch_size=PAIRS, max_steps=STEPS, learning_rate=cfg.optim.lr, logging_steps=1,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, beta=cfg.dpo.beta, seed=0,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
        max_length=None,
        optim="adamw_torch", adam_epsilon=cfg.optim.eps, dataloader_num_workers=0, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = DPOTrainer(model, args=args, train_dataset=HubDataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


TRAINED = {
    "an adapter": ("optim.lr=0.004",),
    "all weights": ("optim.lr=0.0005", "lora.rank=0", "lora.alpha=32"),
}


def both_curves(model: Path, data: Path, folder: Path, trained: str = "an adapter") -> tuple[list[dict], list[dict]]:
    """What the recipe and TRL log of each step, over the same pairs in the same order."""
    more = (f"run.max_steps={STEPS}", f"run.global_batch_size={PAIRS}", "run.micro_batch_size=4", "run.epochs=9")
    more += ("optim.schedule=constant", "optim.warmup_steps=0", "data.valid_fraction=0", "run.eval_every=0")
    cfg = options(model, data, folder / "ours", *more, *TRAINED[trained])
    assert run_processes(1, lambda _: recipe.main(cfg), folder / "ours") == [0], problems(folder / "ours")
    ours = [record for record in log_records(folder / "ours") if "loss" in record]

    train, _ = datasets(cfg)
    loader = Loader(train, cfg.data, cfg.run)
    table = [json.loads(line) for line in data.read_text().splitlines()]
    rows = [table[train.row[sample]] for step in range(STEPS) for sample in loader.step_samples(step)]
    theirs = trl_records(cfg, rows, folder / "trl")
    assert len(ours) == len(theirs) == STEPS and len(rows) == STEPS * PAIRS
    return ours, theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trained", TRAINED)
def test_thirty_steps_are_trls_and_pefts(
    small_model: Path, pair_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str
) -> None:
    pytest.importorskip("trl", reason="TRL, of the test extra, is not installed")
    hide_cuda(monkeypatch)
    ours, theirs = both_curves(small_model, pair_data, tmp_path, trained)
    for mine, other in zip(ours, theirs, strict=True):
        assert abs(mine["loss"] - other["loss"]) <= 1e-4, (mine["step"], mine["loss"], other["loss"])
        names = {"rewards_chosen": "rewards/chosen", "margin": "rewards/margins", "logps_rejected": "logps/rejected"}
        for name, theirs_name in names.items():
            assert mine[name] == pytest.approx(other[theirs_name], rel=1e-3, abs=1e-3), (mine["step"], name)
    assert ours[-1]["loss"] < 0.55, "a curve that does not fall compares nothing"


def answer_logps(model: CausalLM, batch: object) -> torch.Tensor:
    return sum_by_answer(recipe.label_logprobs(model, batch), batch.sequences, batch.num_sequences).view(-1, 2)


def trl_logps(model: torch.nn.Module, dataset: Dataset, sample: int, pad: tuple[int, int]) -> list[float]:
    """log pi of both answers of a pair by TRL's own fused head, each whole sequence alone and padded on either side."""
    ids, trained = sequences(dataset, sample)
    found = []
    for tokens, targets in zip(ids, trained, strict=True):
        row = torch.tensor([[0] * pad[0] + tokens + [0] * pad[1]])
        mask = torch.tensor([[0] * pad[0] + [1] * len(tokens) + [0] * pad[1]])
        answer = [token if on else -100 for token, on in zip(tokens, targets, strict=True)]
        labels = torch.tensor([[-100] * pad[0] + answer + [-100] * pad[1]])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        where = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        out = model(input_ids=row, **where, labels=labels, fused_lm_head=True)
        found.append(out.log_probs.sum().item())
    return found


def sequences(dataset: Dataset, sample: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Ids and targets of chosen and rejected, each behind the trunk."""
    start, (trunk, chosen) = int(dataset.starts[sample]), dataset.parts[sample].tolist()
    ids = dataset.ids[start : start + dataset.lengths[sample]].tolist()
    trained = [False, *dataset.supervised[start : start + dataset.lengths[sample] - 1].tolist()]
    return tuple([part[: trunk + chosen], part[:trunk] + part[trunk + chosen :]] for part in (ids, trained))


@torch.no_grad()
def test_answers_have_trls_log_probabilities(small_model: Path, pair_data: Path, tmp_path: Path) -> None:
    """PITFALLS P2: whatever the padding, the packing and the order."""
    pytest.importorskip("trl", reason="TRL, of the test extra, is not installed")
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    cfg = options(small_model, pair_data, tmp_path, "data.valid_fraction=0", "run.eval_every=0", "data.max_seq_len=300")
    train, _ = datasets(cfg)
    model = start(cfg).eval()
    hf = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()
    add_fused_lm_head(hf)
    samples = range(6)
    expected = torch.tensor([trl_logps(hf, train, sample, (sample % 3, 5 * (sample % 2))) for sample in samples])
    orders = [[[0, 1, 2], [3, 4, 5]], [[5, 3], [1], [4, 0, 2]], [[sample] for sample in samples]]
    for rows in orders:
        for packing in (True, False) if len(rows) == 6 else (True,):
            members = [torch.tensor(row).numpy() for row in rows]
            batch = make_batch(train, members, num_rows=len(rows) + 1, max_seq_len=300, packing=packing)
            got = answer_logps(model, batch)
            order = [sample for row in rows for sample in row]
            assert (got - expected[order]).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
    batches = list(eval_batches(train, data_cfg=cfg.data, micro_batch_size=2))
    assert sum(batch.num_sequences for batch in batches) == 2 * len(train)


def test_packed_pairs_have_the_gradients_of_single_pairs(small_model: Path, pair_data: Path, tmp_path: Path) -> None:
    """PITFALLS T8: all pairs of a row together, each as two ordinary rows of its own."""
    cfg = options(small_model, pair_data, tmp_path, "data.valid_fraction=0", "run.eval_every=0", "data.max_seq_len=300")
    train, _ = datasets(cfg)
    model = start(cfg)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in adapter_tensors(model).values():
            param += 0.05 * torch.randn(param.shape, generator=generator)
    row = torch.arange(6).numpy()
    batch = make_batch(train, [row], num_rows=1, max_seq_len=600, packing=True)
    loss, *_ = recipe.batch_loss(model, model, batch, cfg.dpo)
    params = list(adapter_tensors(model).values())
    got = torch.autograd.grad(loss, params)

    total = 0.0
    for sample in row:
        sides = []
        for tokens, targets in zip(*sequences(train, sample), strict=True):
            ids, on = torch.tensor([tokens]), torch.tensor([targets])
            logps = model(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            with torch.no_grad(), recipe.adapters_off(model):
                base = model(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            sides.append(((logps - base) * on[:, 1:]).sum())
        total = total - torch.nn.functional.logsigmoid(cfg.dpo.beta * (sides[0] - sides[1]))
    assert abs(loss - total) <= 1e-5 * abs(total)
    for one, other in zip(got, torch.autograd.grad(total, params), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
