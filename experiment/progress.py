"""Tracks the progress of a run and reports it: a progress bar, a log line at each interval, records of metrics."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from experiment.run_directory import Run
from training.evaluation import perplexity
from utils import Diverged


class Progress:
    """Counts epochs, steps and tokens, and averages the training loss.

    The running sums stay on `device`. They are read at the log interval, and at most once a second for the bar, so that
    the host does not wait for a GPU at every step. An epoch has `epoch_length` time steps.
    """

    def __init__(self, run: Run, device: torch.device, epochs: int, epoch_length: int):
        self.run, self.epochs, self.epoch_length = run, epochs, epoch_length
        self.epoch, self.step = 1, 0
        self.time_step = 0  # at which the next segment starts
        self.seconds = 0.0  # This includes earlier processes of a resumed run, up to the last record kept.
        self.valid_note = ""  # This follows the validation perplexity in the line of an epoch.
        self.interval = Sum(device)
        self.norm = Sum(device)  # This sums the gradient norm of each step.
        self.whole = Sum(device)  # This sums the loss since the epoch began.
        self.clock = self.shown = time.perf_counter()

    def track(self, segments: Iterable[tuple[int, int]], columns: int) -> Iterator[tuple[int, int]]:
        """Yields the segments, and shows a progress bar that counts tokens; `columns` is the batch size."""
        self.bar = tqdm(
            desc=f"epoch {self.epoch}/{self.epochs}", total=self.epoch_length * columns,
            initial=self.time_step * columns, unit="tok", unit_scale=True, leave=False,
            disable=self.run.disable_progress_bar, dynamic_ncols=True,
        )  # fmt: skip
        self.tick = (time.perf_counter(), self.interval.tokens)
        with self.bar:
            yield from segments

    def advance(self, nll: Tensor, norm: Tensor, shape: tuple[int, int], lr: float) -> None:
        """Counts a weight step on a segment of shape (T, B) with this loss (nats per word) and gradient norm."""
        tokens = math.prod(shape)
        self.norm.add(norm, 1)
        self.interval.add(nll, tokens)
        self.whole.add(nll, tokens)
        self.time_step += shape[0]
        self.step += 1
        self.bar.update(tokens)
        if not self.bar.disable and time.perf_counter() - self.shown > 1:
            self.shown = time.perf_counter()
            loss = self.interval.mean().item()
            self.bar.set_postfix_str(f"loss {loss:.3f}, ppl {perplexity(loss):.1f}, lr {lr:.3g}")

    def interval_means(self) -> Tensor:
        """Returns the mean loss and the mean gradient norm since the last log interval (2,), on the device."""
        return torch.stack([self.interval.mean(), self.norm.mean()])

    def close_interval(self, means: Tensor, lr: float, **extra: Any) -> None:
        """Logs and records `interval_means`, which have been read, and begins the next interval; `extra` is added to
        the record."""
        (loss, norm), seconds = means.tolist(), self.elapsed()
        since, tokens = self.tick
        speed = (self.interval.tokens - tokens) / (time.perf_counter() - since)
        self.run.log(
            f"epoch {self.epoch} | {100 * self.time_step / self.epoch_length:3.0f}% | step {self.step} | lr {lr:.4g}"
            f" | loss {loss:.3f} | ppl {perplexity(loss):.2f} | norm {norm:.3g} | {speed:,.0f} tok/s"
        )
        self.run.record(
            kind="interval", epoch=self.epoch, step=self.step, loss=loss, ppl=perplexity(loss), lr=lr,
            norm=norm, tokens_per_s=speed, seconds=seconds, **extra,
        )  # fmt: skip
        self.interval.reset()
        self.norm.reset()
        self.tick = (time.perf_counter(), 0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside the block from the logged tokens per second."""
        clock = time.perf_counter()
        yield
        since, tokens = self.tick
        self.tick = (since + time.perf_counter() - clock, tokens)

    def close_diagnosis(self, signal: NamedTuple) -> None:
        """Logs a diagnosis of a search's alpha gradients, and records each of its fields by name."""
        self.run.log(str(signal))
        self.run.record(kind="diagnosis", epoch=self.epoch, step=self.step, seconds=self.elapsed(), **signal._asdict())

    def close_epoch(self, valid_loss: float, lr: float, note: str = "", **extra: Any) -> None:
        """Logs and records the training loss and the validation loss (nats per word) of an epoch, and begins the next.
        Raises `Diverged` if the validation perplexity is not finite."""
        loss, valid_ppl = self.whole.mean().item(), perplexity(valid_loss)
        if not math.isfinite(valid_ppl):
            raise Diverged(f"the validation loss is {valid_loss:.4g}")
        seconds = self.elapsed()
        left = seconds / self.epoch * (self.epochs - self.epoch)
        self.run.log(
            f"epoch {self.epoch}/{self.epochs} done | train ppl {perplexity(loss):.2f} | valid loss {valid_loss:.4f}"
            f" | valid ppl {valid_ppl:.2f}{note}{self.valid_note} | {tqdm.format_interval(seconds)} elapsed,"
            f" {tqdm.format_interval(left)} left"
        )
        self.run.record(
            kind="epoch", epoch=self.epoch, step=self.step, loss=loss, ppl=perplexity(loss), valid_loss=valid_loss,
            valid_ppl=valid_ppl, lr=lr, seconds=seconds, **extra,
        )  # fmt: skip
        self.whole.reset()
        self.epoch, self.time_step = self.epoch + 1, 0

    def position(self) -> float:
        """Returns the number of epochs so far, with the present one counted by the share of its text that was read."""
        return self.epoch - 1 + self.time_step / self.epoch_length

    def elapsed(self) -> float:
        """Returns the seconds of work on this run so far, over all its processes."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        return self.seconds

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch, "time_step": self.time_step, "step": self.step,
            "interval": self.interval.state_dict(), "norm": self.norm.state_dict(), "whole": self.whole.state_dict(),
            "metrics_records": self.run.n_records,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state; records of metrics.jsonl that are newer are removed, since they will be written again."""
        self.epoch, self.time_step, self.step = (state[key] for key in ("epoch", "time_step", "step"))
        self.interval.load_state_dict(state["interval"])
        self.norm.load_state_dict(state["norm"])
        self.whole.load_state_dict(state["whole"])
        # A resumed run counts from its last record; one that rolls back has worked longer than the records kept say.
        self.seconds = max(self.elapsed(), self.run.cut_metrics(state["metrics_records"]))


class Sum:
    """Sums a loss over tokens, or a norm over steps, on the device."""

    def __init__(self, device: torch.device):
        self.total, self.tokens = torch.zeros((), dtype=torch.float64, device=device), 0

    def add(self, nll: Tensor, tokens: int) -> None:
        """Adds `nll`, a mean over this many tokens."""
        self.total += nll.double() * tokens
        self.tokens += tokens

    def mean(self) -> Tensor:
        """Returns the mean per token, a scalar on the device; 0 before the first."""
        return self.total / max(self.tokens, 1)

    def reset(self) -> None:
        self.total.zero_()
        self.tokens = 0

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total.copy_(state["total"])
        self.tokens = state["tokens"]
