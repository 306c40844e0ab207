"""The numbers of a fit: metrics.csv always, TensorBoard and Weights & Biases by option."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from mfext.config_machine import LoggerConfig
from mfext.errors import InputError
from mfext.training.routing_log import ROUTING_COLUMNS

COLUMNS = (
    "step",
    "loss_nats_per_token",
    "bits_per_token",
    "routing_loss",
    "penalty",
    "learning_rate",
    "gradient_norm",
    "tokens_per_s",
    "skipped_windows",
    *ROUTING_COLUMNS,
)


class MetricsFile:
    """metrics.csv: one row per logged step, each step at most once.

    A resumed fit drops the rows after its step (and a row torn by a kill) and goes on below.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.csv"
        kept = _rows_until(self.path, start_step) if start_step and self.path.exists() else []
        temporary = folder / f".metrics.csv.{os.getpid()}"
        temporary.write_text("".join(_line(row) for row in [list(COLUMNS), *kept]), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, numbers: Mapping[str, float]) -> None:
        """Append one row; a number that is absent leaves its cell empty."""
        row = [f"{numbers[column]:.9g}" if column in numbers else "" for column in COLUMNS]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))


def _line(row: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue()


def _rows_until(path: Path, step: int) -> list[list[str]]:
    whole, _, _torn = path.read_text(encoding="utf-8").rpartition("\n")
    rows = list(csv.reader(io.StringIO(whole)))[1:]
    return [row for row in rows if len(row) == len(COLUMNS) and row[0].isdigit() and int(row[0]) <= step]


def extra_loggers(config: LoggerConfig, folder: Path, start_step: int) -> list[Logger]:
    """The loggers asked for. Raises InputError naming the extra where a package is missing."""
    purge_step = start_step + 1 if start_step else None
    loggers: list[Logger] = []
    if config.tensorboard:
        with _needs("tensorboard"):
            loggers.append(TensorBoardLogger(folder, name="", version="tensorboard", purge_step=purge_step))
    if config.wandb:
        with _needs("wandb"):
            loggers.append(WandbLogger(project=config.wandb_project, save_dir=folder))
    return loggers


@contextmanager
def _needs(name: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        where, fix = f"logger.{name}=true", f"pip install 'mfext[{name}]'"
        raise InputError(f"the package {name} is not installed", where, fix) from error
