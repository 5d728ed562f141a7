"""TensorBoard and Weights & Biases, each an optional extra of the package that is imported only when asked for."""

from pathlib import Path
from typing import Any

from torchft.config import RunConfig
from torchft.errors import UserError

WANDB = "wandb:"  # and the project's name


class Trackers:
    """Sends the log's records to the trackers that the config names; to none by default.

    Raises UserError naming the missing package at once, so that a run does not fail at its first log step.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._tensorboard = None
        self._wandb = None
        self._writer_class = _import_summary_writer() if "tensorboard" in run.trackers else None
        self._wandb_project = next((name.removeprefix(WANDB) for name in run.trackers if name.startswith(WANDB)), None)
        self._wandb_module = _import_wandb() if self._wandb_project else None

    def begin(self, config: dict[str, Any], start_step: int, wandb_id: str | None) -> None:
        """Open them; records after `start_step`, left by a run that was killed, are replaced. `config`: redacted."""
        if self._writer_class is not None:
            log_dir = str(Path(self._run.out) / "tensorboard")
            self._tensorboard = self._writer_class(log_dir=log_dir, purge_step=start_step + 1)
        if self._wandb_module is not None:
            # The command line and the console are not recorded: they may hold a secret.
            settings = self._wandb_module.Settings(
                disable_git=True, save_code=False, x_disable_meta=True, console="off"
            )
            self._wandb = self._wandb_module.init(
                project=self._wandb_project,
                dir=self._run.out,
                config=config,
                id=wandb_id,
                resume="allow",
                settings=settings,
            )

    def wandb_id(self) -> str | None:
        """What a resumed run needs to continue the same W&B page."""
        return self._wandb.id if self._wandb is not None else None

    def log(self, step: int, record: dict[str, float | None]) -> None:
        """One record of the log."""
        numbers = {name: value for name, value in record.items() if name != "step" and value is not None}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Send what is still buffered."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _import_summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "run.trackers has tensorboard, which is not installed: pip install torchft-recipes[tensorboard], or take it out"
        ) from None
    return SummaryWriter


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "run.trackers has wandb, which is not installed: pip install torchft-recipes[wandb], or take it out"
        ) from None
    return wandb
