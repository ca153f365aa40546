"""Runs one search or retraining: its flags and texts, progress, checkpoints, rollbacks, and the reason that it ends."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from experiment import arguments, checkpoint, processor, resume, startup
from architect import WeightUpdate
from engine import Engine
from engine.dropout import DropoutRates
from engine.matmul import matmul_precision
from experiment.distributed import Distributed
from experiment.divergence import BACKOFF, DivergenceMonitor
from experiment.progress import Progress
from experiment.run_directory import LogHandler
from experiment.signals import StopSignal
from training.early_stopping import Patience
from training.evaluation import Score, evaluate, format_score, format_share, score, score_entries, unknown_warning
from training.overfit import overfit
from utils import Diverged, batchify, choose_device, get_batch, segments, to_host


class TrainingState:
    """What a run trains: model, optimizer, and all else that a checkpoint must hold to resume bit-identically.

    The state of a script adds the `optimizer`, the methods without a body here, and `gradient`, which computes the
    clipped gradient of a training batch (x, y, hidden) and returns loss, last hidden states (B, S) and norm.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, experiment: "Experiment", model: nn.Module):
        args = experiment.args
        self.args, self.ranks, self.run, self.patience = args, experiment.ranks, experiment.run, experiment.patience
        self.update = experiment.update
        self.batch_size, self.micro_batch_size = experiment.local_batch_size, experiment.micro_batch_size
        self.train_text = self.ranks.shard(experiment.texts["train"], dim=1)  # (n, B), the batch elements of this rank
        self.valid_text = experiment.texts["valid"]  # (n, B)
        precision = processor.usable_precision(args.precision, experiment.device)
        self.model = model.to(experiment.device).with_engine(Engine(args.engine, precision))
        self.ranks.seed(args.seed)
        self.weights = self.model.weights()
        self.n_weights = sum(w.numel() for w in self.weights)
        self.start_epoch()

    def start_epoch(self) -> None:
        """Resets the hidden states to their initial values."""
        self.hidden = self.model.initial_hidden(self.batch_size)  # (B, S)

    def capture(self) -> None:
        """Makes the gradient replay as a CUDA graph, on CUDA; repeated when a tensor that it reads is replaced."""
        self.replayed_gradient = self.model.engine.with_cuda_graphs(self.gradient, self.train_text.device)

    def weight_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the clipped gradient of a training batch into .grad; returns loss (nats per word) and norm."""
        nll, self.hidden, norm = self.replayed_gradient(x, y, self.hidden)
        return nll, norm

    def logged_tensors(self) -> tuple[Tensor, ...]:
        """Returns the tensors, on the device, of which the three methods below take copies on the CPU."""
        return ()

    def interval_record(self, *logged: Tensor) -> dict[str, Any]:
        """Returns what the record of a log interval in metrics.jsonl has besides the loss."""
        return {}

    def epoch_record(self, *logged: Tensor) -> dict[str, Any]:
        """Returns what the record of an epoch in metrics.jsonl has besides the losses."""
        return self.interval_record(*logged)

    def log_summary(self, *logged: Tensor) -> None:
        """Logs more than the losses at each interval and epoch, if there is more."""

    def parts(self) -> dict[str, Any]:
        """Returns the objects that save and load their own state, by their names in a checkpoint."""
        return {"model": self.model, "optimizer": self.optimizer}

    def state_dict(self) -> dict[str, Any]:
        """Returns what training changes beside the `parts`, with the same value on every rank."""

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, before the `parts` are loaded."""

    def template(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Returns the form of those entries of the checkpoint `saved` that differ in form from what a run that has not
        begun would save; it replaces theirs when the form of a checkpoint is checked."""

    def validate(self, saved: dict[str, Any]) -> None:
        """Raises ValueError for a state of the right form that no run can have."""


class Interrupted(Exception):
    """Raised when the run was asked to stop and has saved its state."""


class Experiment:
    """One run, from its flags to its last checkpoint.

    Its kind is "search" or "train"; `argv` are its flags, None for those of the command line, and `reasons` those for
    which it may be stopped before its last epoch.
    """

    def __init__(
        self, kind: str, parser: arguments.Parser, argv: list[str] | None, texts_to_read: startup.TextsToRead,
        reasons: Sequence[str],
    ):  # fmt: skip
        self.kind, self.parser, self.reasons = kind, parser, reasons
        self.ranks = Distributed()
        self.args, self.corpus, self.run, self.saved = startup.start_run(kind, parser, argv, texts_to_read, self.ranks)
        args = self.args
        self.device = self.ranks.device(choose_device(args.device, args.deterministic))
        self.local_batch_size, self.micro_batch_size = startup.batch_sizes(args, self.ranks.size)
        torch.manual_seed(args.seed)
        self.bptt_rng = torch.Generator().manual_seed(args.seed)
        texts = texts_to_read(self.corpus, args).items()
        self.texts = {name: batchify(ids, size).to(self.device) for name, (ids, size) in texts}  # (n, B) each
        self.update = WeightUpdate(args.clip, args.clip_value, args.wdecay, args.momentum)
        self.schedule, self.patience = arguments.schedule(args), Patience(args.patience, args.min_delta)
        self.monitor = DivergenceMonitor(self.device, len(self.corpus.words))
        self.progress = Progress(self.run, self.device, args.epochs, len(self.texts["train"]) - 1)
        if (unknown := self.unknown_mask("valid")) is not None:  # the first time step is not predicted
            self.progress.valid_note = f", {format_share(unknown[1:].double().mean().item())} unknown words"
        self.last_save = time.monotonic()
        self.best, self.stopped_by, self.exit_code = float("inf"), "", 0  # `best` is the lowest validation loss.

    def __enter__(self) -> "Experiment":
        self.log_handler = LogHandler(self.run)
        logging.getLogger("engine").addHandler(self.log_handler)
        return self

    def __exit__(self, _: Any, error: BaseException | None, *__: Any) -> bool:
        """Releases the run directory. An `Interrupted` goes no further: it logs the command that resumes the run, and
        sets the exit code to 130."""
        interrupted = isinstance(error, Interrupted)
        if interrupted:
            command, self.exit_code = self.ranks.command(self.parser.prog), 130
            self.run.log(f"interrupted; continue with: {command} --resume --save {quote(str(self.run.folder))}")
        logging.getLogger("engine").removeHandler(self.log_handler)
        self.run.release()
        return interrupted

    def dropout_rates(self) -> DropoutRates:
        return DropoutRates(**{name: getattr(self.args, name) for name in DropoutRates._fields})

    # --- state ---

    def parts(self, state: TrainingState) -> dict[str, Any]:
        return {
            **state.parts(), "schedule": self.schedule, "patience": self.patience, "watch": self.monitor,
            "progress": self.progress,
        }  # fmt: skip

    def state_dict(self, state: TrainingState) -> dict[str, Any]:
        """Returns a checkpoint: what is trained, the progress of the run, and what identifies it."""
        return {
            **resume.identity(self.kind, self.args, self.corpus, self.ranks.size), **state.state_dict(),
            **{name: part.state_dict() for name, part in self.parts(state).items()},
            "rng": self.ranks.gather(checkpoint.rng_state(self.device, self.bptt_rng)),
            "best": self.best, "stopped_by": self.stopped_by,
        }  # fmt: skip

    def load_state_dict(self, state: TrainingState, saved: dict[str, Any]) -> None:
        state.load_state_dict(saved)
        for name, part in self.parts(state).items():
            part.load_state_dict(saved[name])
        state.capture()  # captured graphs refer to the old states of the optimizers
        self.best, self.stopped_by = saved["best"], saved["stopped_by"]

    def save(self, state: TrainingState, name: str) -> None:
        """Saves a checkpoint under this name and does not keep the one that it replaces."""
        saved = self.state_dict(state)  # on all ranks, since each has a share in it
        if self.ranks.is_main:
            checkpoint.save(saved, self.run.folder / name)

    def save_last(self, state: TrainingState) -> None:
        """Saves last.pt, and keeps the one before as previous.pt."""
        saved = self.state_dict(state)
        if self.ranks.is_main:
            checkpoint.save_last(saved, self.run.folder)
        self.last_save = time.monotonic()

    def start(self, state: TrainingState, *first_lines: str) -> None:
        """Resumes from the saved state, or begins a run and logs these lines; writes config.json. Ends the script
        with exit code 2 if the saved state cannot be loaded."""
        if self.saved:
            with resume.restoring(self.parser, self.run):
                template = {**self.state_dict(state), **state.template(self.saved)}
                resume.check_state(self.saved, template, self.reasons)
                checkpoint.set_rng_state(self.saved["rng"][self.ranks.rank], self.device, self.bptt_rng)
                state.validate(self.saved)
                self.load_state_dict(state, self.saved)
        self.run.configure(
            self.parser.prog, self.args, self.device, self.corpus.sha256, self.is_finished(), self.ranks.size
        )
        resumed = [f"resumed at epoch {self.progress.epoch}, step {self.progress.step}"] if self.saved else []
        for line in [*(resumed or first_lines), *processor.notes(self.args.precision, self.device, self.ranks.size)]:
            self.run.log(line)
        if resumed:
            return
        if self.best < float("inf"):  # The weights were trained by another run.
            self.save(state, "best.pt")
        self.save_last(state)

    # --- the loop ---

    @contextmanager
    def running(self) -> Iterator[None]:
        """Handles signals, sets the --precision of products and explains out-of-memory errors inside the block."""
        explained = startup.memory_explained(self.args, self.ranks.size)
        with StopSignal() as self.signal, matmul_precision(self.args.precision), explained:
            yield

    def is_finished(self) -> bool:
        return self.progress.epoch > self.args.epochs or bool(self.stopped_by)

    def epochs(self) -> Iterator[int]:
        """Yields the number of each epoch that is left; the present one again after a rollback."""
        while not self.is_finished():
            yield self.progress.epoch

    def segments(self, text: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields inputs and targets (T, B) of the segments of a text (n, B) that are left of this epoch, with a bar."""
        args = self.args
        lengths = segments(
            len(text), args.bptt, self.bptt_rng, args.bptt_std, args.max_seq_len_delta, start=self.progress.time_step
        )
        for i, seq_len in self.progress.track(lengths, columns=args.batch_size):
            yield get_batch(text, i, seq_len)

    def set_lr(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets the optimizer's learning rate for the next step."""
        self.schedule.set_rate(optimizer, self.progress.step, self.progress.position())

    def after_step(self, state: TrainingState, nll: Tensor, norm: Tensor, lr: float, seq_len: int) -> None:
        """Counts a step on a segment of `seq_len` time steps with this loss (nats per word), gradient norm and scaled
        learning rate, and logs at each --log_interval. Raises `Diverged`."""
        state.optimizer.zero_grad(set_to_none=self.device.type == "cpu")  # CUDA graphs write to the same tensors.
        self.progress.advance(nll, norm, (seq_len, self.args.batch_size), lr)
        self.monitor.add(nll, norm)
        if self.progress.step % self.args.log_interval == 0:
            tensors = self.monitor.verdict(), self.progress.interval_means(), *state.logged_tensors()
            verdict, means, *logged = to_host(*tensors)
            self.monitor.check(verdict)
            rate = state.optimizer.param_groups[0]["lr"]
            self.progress.close_interval(means, lr, rate=rate, **state.interval_record(*logged))
            state.log_summary(*logged)

    def save_if_due(self, state: TrainingState) -> None:
        """Saves the state after --checkpoint_minutes, and when the run is asked to stop, then raising `Interrupted`.
        Raises `Diverged` instead of saving weights that have diverged."""
        due = time.monotonic() - self.last_save >= 60 * self.args.checkpoint_minutes
        stopping, due = self.ranks.all_reduce_any(self.signal.requested, due)
        if stopping or due:
            self.check_weights(state)
            self.save_last(state)
        if stopping:
            raise Interrupted

    def check_weights(self, state: TrainingState) -> None:
        """Raises `Diverged` if a step, or the present weights' loss on the first training segment, has diverged."""
        beginning = state.train_text[: self.args.bptt + 1, : self.micro_batch_size]
        self.monitor.check_weights(self.evaluate(state.model, beginning, "train"))

    def evaluate(self, model: nn.Module, text: Tensor, name: str) -> float:
        """Returns the loss of a text (n, B), in nats per word, the same on every rank; the main rank evaluates it."""
        return self.ranks.broadcast_from_main(lambda: evaluate(model, text, self.args.bptt, name))

    def close_epoch(self, state: TrainingState, valid_loss: float, may_be_best: bool = True) -> None:
        """Logs the epoch, and saves best.pt if its loss (nats per word) is the lowest of those that `may_be_best`."""
        logged = [tensor.cpu() for tensor in state.logged_tensors()]
        self.progress.close_epoch(valid_loss, state.optimizer.param_groups[0]["lr"], **state.epoch_record(*logged))
        state.start_epoch()
        if may_be_best and valid_loss < self.best:
            self.best = valid_loss
            self.save(state, "best.pt")
        state.log_summary(*logged)

    def end_epoch(self, state: TrainingState, valid_loss: float, reason: str) -> None:
        """Saves the state, and ends the run if `reason` is not empty. Raises `Interrupted` if it is asked to stop."""
        self.schedule.close_epoch(valid_loss)
        self.stopped_by = reason
        if reason:
            self.run.log(f"stopped by {reason}")
        self.save_last(state)
        if self.ranks.all_reduce_any(self.signal.requested)[0]:
            raise Interrupted

    @contextmanager
    def rollback_on_divergence(self, state: TrainingState) -> Iterator[None]:
        """Goes back to the last checkpoint when training diverges inside the block, with `BACKOFF` times the learning
        rate and other random numbers; raises RunError after `MAX_ROLLBACKS` such rollbacks."""
        try:
            yield
        except Diverged as fault:
            args, lr = self.args, self.args.lr * self.schedule.scale
            attempt = self.monitor.next_rollback(fault, self.progress.step, lr, args.optimizer, args.clip)
            saved, note = self.ranks.broadcast_from_main(lambda: checkpoint.load_last(self.run.folder))
            if note:
                self.run.log(note)
            self.load_state_dict(state, saved)
            self.monitor.rollbacks = attempt
            self.schedule.scale *= BACKOFF
            epoch, step = self.progress.epoch, self.progress.step
            lr = self.schedule.rate(step, self.progress.position())
            self.run.log(f"diverged ({fault}): back to epoch {epoch}, step {step}, with lr {lr:.4g}")
            seconds = self.progress.elapsed()
            self.run.record(kind="rollback", epoch=epoch, step=step, lr=lr, reason=str(fault), seconds=seconds)
            self.save(state, "last.pt")  # previous.pt is left unchanged

    # --- the end ---

    def overfit(self, state: TrainingState) -> None:
        """Trains on a single batch and logs the result, for --overfit."""
        args = self.args
        with matmul_precision(args.precision), startup.memory_explained(args, self.ranks.size):
            self.run.log(
                overfit(state.model, state.optimizer, state.train_text, args.bptt, self.micro_batch_size, self.update)
            )

    def score(self, model: nn.Module, split: str) -> Score:
        """Returns the score of the split "valid" or "test", measured by this process alone."""
        return score(model, self.texts[split], self.args.bptt, split, self.unknown_mask(split))

    def unknown_mask(self, split: str) -> Tensor | None:
        """Returns a mask (n, B) of the words of the split "valid" or "test" that became <unk>; None if none did."""
        if not len(self.corpus.unknown[split]):
            return None
        return batchify(self.corpus.unknown_mask(split), self.texts[split].size(1))

    def write_result(self, title: str, state: TrainingState, valid: Score, test: Score | None, **result: Any) -> None:
        """Writes result.json, with the scores of both texts (None for one that was not read) and `result` in it, and
        logs the scores under a title."""
        self.run.write("result.json", {
            "kind": self.kind, "epochs": self.progress.epoch - 1, "steps": self.progress.step,
            "seconds": self.progress.elapsed(), "params": state.n_weights, **score_entries(valid=valid, test=test),
            **result,
            "stopped_by": self.stopped_by or "epochs",
        })  # fmt: skip
        for line in (*unknown_warning("valid", valid), *unknown_warning("test", test)):
            self.run.log(line)
        self.run.log(f"{title}: {format_score('valid', valid)} | {format_score('test', test)}")
