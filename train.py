"""Retrains a cell from scratch and measures it: SGD, then averaged SGD once the validation loss stops falling.

    python train.py --arch DARTS                                       # at the published sizes, for a GPU
    python train.py --data builtin --arch runs/search-... --emsize 64 --batch_size 32 --epochs 8

The paper gives 3 days on a 1080Ti for the first; the second takes a minute on a CPU. Both end with the test
perplexity of the weights that did best on the validation text.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiment import checkpoint, published_model, resume, signals, startup
from experiment.experiment import Experiment, TrainingState
from experiment.retrain_arguments import EVAL_BATCH_SIZES, build_parser, texts_to_read
from genotypes import cell_to_json, resolve_cell
from model import retrain_model
from training.evaluation import Score, perplexity
from training.losses import Batch, MicroBatches, clipped_gradient
from training.optimizers import NonMonotonicTrigger, averaged, new_optimizer, scaled_lr

REASONS = ("patience", "nonmono")  # the reasons to stop before the last epoch


class RetrainState(TrainingState):
    """What retraining trains and saves: the weights of one cell, and their optimizer."""

    def __init__(self, experiment: Experiment):
        args, words, rates = experiment.args, experiment.corpus.words, experiment.dropout_rates()
        self.cell = resolve_cell(args.arch)
        model = retrain_model(len(words), args.emsize, rates, self.cell, args.n_experts, args.init_range)
        super().__init__(experiment, model)
        self.phase = "sgd" if args.optimizer == "ntasgd" else args.optimizer
        self.optimizer, self.trigger = self.new_optimizer(self.phase), NonMonotonicTrigger(args.nonmono)
        self.capture()

    def new_optimizer(self, phase: str) -> torch.optim.Optimizer:
        return new_optimizer(phase, self.weights, self.args.lr, self.update)

    def gradient(self, x: Tensor, y: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the clipped gradient of a training batch into .grad; returns the loss (nats per word), the last
        hidden states (B, S), and the norm of the gradient before clipping."""
        args, masks = self.args, self.model.sample_masks(self.batch_size)
        two_passes = args.rdrop > 0 or args.fraternal > 0
        batch = Batch(x, y, hidden, masks, self.model.sample_masks(self.batch_size) if two_passes else None)
        losses = MicroBatches(
            self.model, batch, self.micro_batch_size, alpha=args.alpha, beta=args.beta, rdrop=args.rdrop,
            fraternal=args.fraternal,
        )  # fmt: skip
        return clipped_gradient(losses, self.weights, self.update, self.ranks.all_reduce_mean)

    # --- at an epoch's end ---

    def epoch_record(self, *logged: Tensor) -> dict[str, Any]:
        return {"note": " (averaged)" if self.phase == "asgd" else "", "phase": self.phase}

    def reason_to_stop(self, valid_loss: float) -> str:
        """Returns the reason to stop after an epoch with this loss, or "" to continue. With --finetune, which averages
        from the start, the condition that starts averaging elsewhere ends the run."""
        if self.patience.step(valid_loss):
            return "patience"
        return "nonmono" if self.args.finetune and self.trigger.step(valid_loss) else ""

    def switch_to_averaging_if_due(self, epoch: int, valid_loss: float) -> None:
        """Starts to average the weights after an epoch with this loss: after --average_after epochs, or, by NT-ASGD, if
        the validation loss has stopped falling."""
        if self.phase != "sgd" or self.args.optimizer != "ntasgd":
            return
        has_stopped_falling, after = self.trigger.step(valid_loss), self.args.average_after
        is_due = epoch == after if after else has_stopped_falling
        if is_due:
            self.phase, self.optimizer = "asgd", self.new_optimizer("asgd")
            self.run.log(f"averaging the weights from epoch {epoch + 1} on")

    # --- a checkpoint ---

    def parts(self) -> dict[str, Any]:
        return {**super().parts(), "trigger": self.trigger}

    def state_dict(self) -> dict[str, Any]:
        return {
            "eval_batch_sizes": EVAL_BATCH_SIZES, "genotype": cell_to_json(self.cell), "phase": self.phase,
            "hidden": self.ranks.all_gather(self.hidden),
        }  # fmt: skip

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.phase, self.optimizer = saved["phase"], self.new_optimizer(saved["phase"])
        self.hidden = self.ranks.shard(saved["hidden"]).to(self.train_text.device)

    def template(self, saved: dict[str, Any]) -> dict[str, Any]:
        optimizer = checkpoint.optimizer_template(self.new_optimizer(saved["phase"]))
        return {"trigger": {"losses": [1.0]}, "optimizer": optimizer}

    def validate(self, saved: dict[str, Any]) -> None:
        if self.ranks.is_main and saved["best"] < float("inf"):  # the result is computed from best.pt
            best = checkpoint.load(self.run.folder / "best.pt")
            checkpoint.validate_state(best, {"model": self.model.state_dict(), "best": 1.0})

    def best_score(self, experiment: Experiment) -> Score:
        """Loads the weights of best.pt, which are averaged ones in the phase "asgd"; returns their validation score,
        whose loss is the one of their epoch. The text is read again only if it has unknown words."""
        best = checkpoint.load(self.run.folder / "best.pt")
        self.model.load_state_dict(best["model"])
        again = (
            experiment.score(self.model, "valid")
            if len(experiment.corpus.unknown["valid"])
            else Score(best["best"], known_loss=best["best"])
        )
        return again._replace(loss=best["best"])


def retrain(experiment: Experiment, state: RetrainState) -> None:
    """Trains by SGD, and by averaged SGD after the validation loss has stopped falling (NT-ASGD)."""
    for epoch in experiment.epochs():
        with experiment.rollback_on_divergence(state):
            for x, y in experiment.segments(state.train_text):  # (T, B) each
                experiment.set_lr(state.optimizer)
                with scaled_lr(state.optimizer, len(x) / experiment.args.bptt) as lr:
                    nll, norm = state.weight_gradient(x, y)
                    state.optimizer.step()
                experiment.after_step(state, nll, norm, lr, len(x))
                experiment.save_if_due(state)

            experiment.check_weights(state)
            with averaged(state.optimizer):
                valid_loss = experiment.evaluate(state.model, state.valid_text, "valid")
                experiment.close_epoch(state, valid_loss)
            reason = state.reason_to_stop(valid_loss)
            if not reason:
                state.switch_to_averaging_if_due(epoch, valid_loss)
            experiment.end_epoch(state, valid_loss, reason)


def load_finetuned(experiment: Experiment, state: RetrainState) -> None:
    """Loads the best weights of the run that --finetune names, or those of a model of the published code; only a lower
    validation loss replaces them as best."""
    path = Path(experiment.args.finetune)
    is_run = path.is_dir()
    path = path / "best.pt" if is_run else path
    with resume.restoring(experiment.parser, experiment.run, path):
        read = (lambda: checkpoint.load(path)) if is_run else (lambda: {"model": published_model.load(path).weights})
        first = experiment.ranks.broadcast_from_main(read)
        if is_run:
            resume.check_vocabulary(first, experiment.corpus.words)
        checkpoint.validate_state(first, {"model": state.model.state_dict()})
        state.model.load_state_dict(first["model"])
        experiment.best = experiment.evaluate(state.model, state.valid_text, "valid")
        if not math.isfinite(experiment.best):
            raise ValueError("its validation loss is not finite")


def main(argv: list[str] | None = None) -> int:
    """Retrains a cell from its start or its last checkpoint to result.json; returns the exit code."""
    with Experiment("train", build_parser(), argv, texts_to_read, REASONS) as experiment:
        args, corpus, run = experiment.args, experiment.corpus, experiment.run
        if args.tensorboard and experiment.ranks.is_main:
            from plots.tensorboard import TensorBoardLogger  # imported only here, since it needs another package

            run.tensorboard = TensorBoardLogger(run.folder, vars(args))
        state = RetrainState(experiment)
        text = startup.describe(corpus, args.limit_tokens)
        title = f"retraining in {run.folder} on {experiment.device}: {state.n_weights:,} weights, {text}"
        lines = [title, str(state.cell), *startup.notes(corpus, args)]
        if args.finetune and not experiment.saved:
            load_finetuned(experiment, state)
            lines.append(f"from the best weights of {args.finetune}: valid ppl {perplexity(experiment.best):.2f}")
        experiment.start(state, *lines)
        if args.overfit:
            experiment.overfit(state)
            return 0
        with experiment.running():
            retrain(experiment, state)
        if not experiment.ranks.is_main:
            return 0

        valid = state.best_score(experiment)
        test = experiment.score(state.model, "test") if args.test == "read" else None
        experiment.write_result("best weights", state, valid, test, genotype=cell_to_json(state.cell))
    return experiment.exit_code


if __name__ == "__main__":
    sys.exit(signals.run_script(main))
