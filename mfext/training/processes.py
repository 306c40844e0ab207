"""Several training processes on one machine, with Lightning's DDP inside each.

Every process gets its own copy of the model; the caller's process stores what the first one
commits and receives the final weights, so that its locks, its progress bar and its errors stay
where they are. What crosses the pipes is pickled in memory, between our own processes only.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch
import torch.distributed
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch import Tensor

from mfext.errors import InterruptedRun, MachineError, MfextError
from mfext.model.language_model import LanguageModel
from mfext.training.exchange import Commit, FitResult, FitSettings, Place, Progress, ProgressState, Stream
from mfext.training.loop import Hooks
from mfext.training.methods.method import Method
from mfext.training.module import ContinualModuleFormer
from mfext.training.run import accumulation_of, train_here
from mfext.training.signals import hold_signals, stop_flag


@dataclass(frozen=True)
class _Job:
    model: LanguageModel
    method: Method
    stream: Stream
    settings: FitSettings
    resume: ProgressState | None


@dataclass(frozen=True)
class _Shown:
    step: int
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class _Committed:
    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, object]


@dataclass(frozen=True)
class _Done:
    result: FitResult
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Failed:
    kind: type[MfextError]
    what: str
    where: str
    fix: str
    exit_code: int

    def error(self) -> MfextError:
        if issubclass(self.kind, InterruptedRun):
            return InterruptedRun(self.exit_code - 128, self.what, self.where, self.fix)
        return self.kind(self.what, self.where, self.fix)


def train_in_processes(
    module: ContinualModuleFormer,
    stream: Stream,
    settings: FitSettings,
    commit: Commit,
    progress: Progress,
    resume: ProgressState | None,
) -> FitResult:
    """Train on `settings.trainer.devices` processes; the module's weights are the final ones at the end.

    Raises what a process raised; MachineError where one was killed.
    """
    world = settings.trainer.devices
    accumulation_of(settings, world)
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(world)]
    port = find_free_network_port()
    processes = [
        context.Process(target=_work, args=(Place(rank, world), port, pipes[rank][1]), daemon=True)
        for rank in range(world)
    ]
    with stop_flag(lambda number: _forward(processes, number)) as stop:
        try:
            hold_signals(True)  # Inherited: a process takes no signal before it has its handlers.
            for process, (_, theirs) in zip(processes, pipes, strict=True):
                with _quiet_start():
                    process.start()
                theirs.close()
            hold_signals(False)
            job = pickle.dumps(_Job(module.model, module.method, stream, settings, resume))
            for ours, _ in pipes:
                ours.send_bytes(job)
            done = _serve([ours for ours, _ in pipes], processes, commit, progress)
        except InterruptedRun:
            stop.answered = True
            raise
        finally:
            hold_signals(False)
            _end(processes)
    with torch.no_grad():
        parameters = dict(module.model.named_parameters())
        for name, weight in done[0].weights.items():
            parameters[name].copy_(weight)
    module.optimizer_state = dict(done[0].result.optimizer)
    same = all(each.result.frozen_ok and each.result.frozen_sha256 == done[0].result.frozen_sha256 for each in done)
    return replace(done[0].result, frozen_ok=same)


def _serve(
    connections: list[Connection], processes: Sequence[BaseProcess], commit: Commit, progress: Progress
) -> list[_Done]:
    """Answer the processes until each has reported; raises what the first failing one raised.

    An interruption waits for all: the first process may still be committing when others report it.
    """
    reports: dict[int, _Done | _Failed] = {}
    while len(reports) < len(connections):
        for ready in wait([connection for rank, connection in enumerate(connections) if rank not in reports]):
            assert isinstance(ready, Connection)
            try:
                message = pickle.loads(ready.recv_bytes())
            except (EOFError, ConnectionResetError) as error:
                raise _death(processes) from error
            if isinstance(message, _Shown):
                progress.update(message.step, message.numbers)
            elif isinstance(message, _Committed):
                commit(message.step, message.tensors, message.state)
                ready.send_bytes(b"committed")
            elif isinstance(message, _Failed) and not issubclass(message.kind, InterruptedRun):
                raise message.error()
            else:
                assert isinstance(message, _Done | _Failed)
                reports[connections.index(ready)] = message
    for report in reports.values():
        if isinstance(report, _Failed):
            raise report.error()
    return [report for _, report in sorted(reports.items()) if isinstance(report, _Done)]


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Processes started inside leave out torch's C++ advice (on unused parameters: a gate may close)."""
    before = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = before or "ERROR"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCH_CPP_LOG_LEVEL"]


def _death(processes: Sequence[BaseProcess]) -> Exception:
    time.sleep(1.0)  # The others notice, and the first cause has its exit code.
    codes = [process.exitcode for process in processes]
    killed = [code for code in codes if code is not None and code < 0]
    if killed:
        return MachineError(
            f"a training process was killed by signal {-killed[0]}",
            "trainer=ddp",
            "memory may have run out; use fewer devices or a smaller micro_batch_size",
        )
    return RuntimeError(f"training processes ended with exit codes {codes}; the traceback is above")


def _forward(processes: Sequence[BaseProcess], number: int) -> None:
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, number)


def _end(processes: Sequence[BaseProcess]) -> None:
    """Let finished processes leave, stop the others."""
    for process in processes:
        if process.pid is not None:
            process.join(timeout=5.0)
            if process.is_alive():
                process.kill()
                process.join()


class _Parent:
    """The caller's process as seen from a training process: it stores and shows."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.shown_at = 0.0

    def send(self, message: object) -> None:
        self.connection.send_bytes(pickle.dumps(message))

    def commit(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, object], /) -> None:
        self.send(_Committed(step, {name: value.cpu() for name, value in tensors.items()}, state))
        self.connection.recv_bytes()

    def start(self, total: int, done: int, label: str) -> None: ...

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        if numbers or time.monotonic() - self.shown_at > 0.1:
            self.shown_at = time.monotonic()
            self.send(_Shown(done, numbers))

    def close(self) -> None: ...


def _work(place: Place, port: int, connection: Connection) -> None:
    """Body of one training process."""
    os.environ.update(
        LOCAL_RANK=str(place.rank),
        NODE_RANK="0",
        WORLD_SIZE=str(place.world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    parent = _Parent(connection)
    with stop_flag() as stop:
        stop.answered = True  # The caller's process passes a late signal on, not this one.
        hold_signals(False)
        job = pickle.loads(connection.recv_bytes())
        assert isinstance(job, _Job)
        module = ContinualModuleFormer(job.model, job.settings.training, job.method)
        try:
            result = train_here(module, job.stream, job.settings, Hooks(parent.commit, parent, stop), job.resume, place)
        except MfextError as error:
            parent.send(_Failed(type(error), error.what, error.where, error.fix, error.exit_code))
            return
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        weights = {
            name: value.detach().cpu()
            for name, value in module.model.named_parameters()
            if value.requires_grad and place.rank == 0
        }
        parent.send(_Done(result if place.rank == 0 else replace(result, optimizer={}), weights))
