"""Searches a recurrent cell by gradient descent: weights on the training text, alphas on the validation text.

    python train_search.py --unrolled                                  # at the published sizes, for a GPU
    python train_search.py --data builtin --emsize 64 --batch_size 32 --epochs 4

The published code took 4 h 21 min on a V100 for the first; the second takes a minute on a CPU. Both write a genotype
to the run directory, and `python train.py --arch RUN` retrains it.
"""

import sys
from functools import partial
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from experiment import checkpoint, signals, startup
from architect import Architect
from engine import Engine
from engine.dropout import FrozenReLU
from experiment.experiment import Experiment, TrainingState
from experiment.search_arguments import build_parser, eval_batch_sizes, texts_to_read
from genotypes import Genotype, from_json, to_json
from model_search import RNNModelSearch, derive
from training.diagnostics import Diagnosis
from training.early_stopping import check_history, identities, is_stable
from training.evaluation import perplexity
from training.losses import Batch, MicroBatches, clipped_gradient
from training.optimizers import averaged, new_optimizer, scaled_lr, velocity
from utils import Cursor

REASONS = ("patience", "stable", "identity")  # the reasons to stop before the last epoch


class SearchState(TrainingState):
    """What a search trains and saves: the weights, the alphas, their optimizers, and its positions in both texts."""

    def __init__(self, experiment: Experiment):
        args, words, rates = experiment.args, experiment.corpus.words, experiment.dropout_rates()
        model = RNNModelSearch(len(words), args.emsize, rates, norm=args.norm, init_range=args.init_range)
        super().__init__(experiment, model)
        self.arch_batch_size = args.arch_batch_size // self.ranks.size
        self.valid_batches = Cursor(self.ranks.shard(experiment.texts["the alphas"], dim=1))
        self.optimizer = new_optimizer(args.optimizer, self.weights, args.lr, self.update)
        self.hessian = args.hessian if args.unrolled else None
        self.architect = self.architect_of(self.model, self.micro_batch_size, self.hessian)
        self.diagnosis = Diagnosis(
            self.model, self.architect_of, self.hessian, (self.train_text, self.valid_batches.source, self.valid_text),
            self.micro_batch_size, args.bptt, args.seed, self.ranks.seed,
        ) if args.diagnose_every else None  # fmt: skip
        self.history: list[list[Any]] = []  # [epoch, genotype] at the end of each epoch after --arch_start
        self.hidden_valid = self.model.initial_hidden(self.arch_batch_size)  # (B, H)
        self.capture()

    def architect_of(self, model: RNNModelSearch, micro_batch_size: int, hessian: str | None) -> Architect:
        """Returns the optimizer of the alphas, for a model with any engine and so many batch elements at a time."""
        args, at_once = self.args, {"micro_batch_size": micro_batch_size}
        precise = model.with_engine(Engine(args.engine))  # the central difference needs full precision
        regularised = {**at_once, "alpha": args.alpha, "beta": args.beta}
        return Architect(
            self.weights, model.alphas, partial(MicroBatches, model, **regularised),
            partial(MicroBatches, model, **at_once), partial(MicroBatches, precise, **regularised),
            update=self.update, hessian=hessian, lr=args.arch_lr, arch_wdecay=args.arch_wdecay,
            average=self.ranks.all_reduce_mean, mean_alphas=args.derive_from == "mean",
        )  # fmt: skip

    def capture(self) -> None:
        """Makes both steps replay as CUDA graphs, on CUDA."""
        super().capture()
        self.replayed_alpha_step = self.model.engine.with_cuda_graphs(
            self.captured_alpha_step, self.train_text.device, beside=self.replayed_gradient
        )

    # --- the two steps ---

    def captured_alpha_step(
        self, eta: Tensor, x: Tensor, y: Tensor, hidden: Tensor, x_valid: Tensor, y_valid: Tensor, hidden_valid: Tensor
    ) -> tuple[Tensor]:
        """Takes a step on the alphas, in the form that a CUDA graph captures; returns the hidden states (B, H) after
        the validation batch."""
        masks = self.model.sample_masks(self.batch_size)  # the same masks in each pass over the training batch
        masks = masks._replace(relu=FrozenReLU() if self.hessian == "finite" else None)
        valid_masks = self.model.sample_masks(self.arch_batch_size)
        train, valid = Batch(x, y, hidden, masks), Batch(x_valid, y_valid, hidden_valid, valid_masks)
        momentum = velocity(self.optimizer) if self.args.unrolled else None
        return (self.architect.step(train, valid, eta=eta, velocity=momentum),)

    def gradient(self, x: Tensor, y: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the clipped gradient of a training batch into .grad; returns the loss (nats per word), the last
        hidden states (B, H), and the norm of the gradient before clipping."""
        args, batch = self.args, Batch(x, y, hidden, self.model.sample_masks(self.batch_size))
        micro_batches = MicroBatches(self.model, batch, self.micro_batch_size, alpha=args.alpha, beta=args.beta)
        return clipped_gradient(micro_batches, self.weights, self.update, self.ranks.all_reduce_mean)

    def alpha_step(self, lr: float, x: Tensor, y: Tensor) -> None:
        """Moves the alphas down the gradient of the next validation batch's loss (`architect.Architect`)."""
        x_valid, y_valid, wrapped = self.valid_batches.take(len(x))  # (T, B) each
        if wrapped:
            self.hidden_valid = self.model.initial_hidden(self.arch_batch_size)
        eta = torch.full((), lr, device=x.device)  # a tensor, since a number would need a CUDA graph for each value
        [self.hidden_valid] = self.replayed_alpha_step(eta, x, y, self.hidden, x_valid, y_valid, self.hidden_valid)

    # --- the result so far ---

    def probabilities(self) -> Tensor:
        """Returns the probabilities (N(N+1)/2, K) that the present genotype is derived from, on the device."""
        with averaged(self.architect.optimizer):
            return self.model.alphas.detach().softmax(-1)

    def derived(self) -> tuple[Genotype, list[list[float]]]:
        """Returns the present genotype and the probabilities (N(N+1)/2, K) that it is derived from."""
        probs = self.probabilities().cpu()
        return derive(probs), probs.tolist()

    def logged_tensors(self) -> tuple[Tensor, ...]:
        return (self.probabilities(),)

    def interval_record(self, probs: Tensor) -> dict[str, Any]:
        rounded = [[round(p, 5) for p in edge] for edge in probs.tolist()]
        return {"genotype": to_json(derive(probs)), "probabilities": rounded}

    def log_summary(self, probs: Tensor) -> None:
        if self.architect.optimizer.state:  # else the alphas have not moved, and their cell is a random one
            self.run.log(str(derive(probs)))

    def diagnose(self, progress: Any) -> None:
        """Measures the alphas' gradient (docs/signal.md) every --diagnose_every steps."""
        if self.diagnosis and progress.step % self.args.diagnose_every == 0:
            with progress.paused():
                eta = self.optimizer.param_groups[0]["lr"]
                signal = self.diagnosis.measure(progress.step, self.derived()[0], eta, velocity(self.optimizer))
            progress.close_diagnosis(signal)

    def write_genotype(self, epoch: int) -> None:
        """Writes genotype.json: the genotype at the end of this epoch and its probabilities."""
        genotype, probabilities = self.derived()
        record = {"genotype": to_json(genotype), "text": str(genotype), "epoch": epoch, "probabilities": probabilities}
        self.run.write("genotype.json", record)

    def reason_to_stop(self, epoch: int, valid_loss: float) -> str:
        """Records the genotype of this epoch; returns the reason to stop the search, or "" to continue. Until the
        alphas have moved, the genotype is that of their random initial values, and nothing is recorded."""
        args = self.args
        if epoch <= args.arch_start:
            return ""
        genotype = self.derived()[0]
        collapsed = identities(genotype) > args.max_identity
        if collapsed and self.history:
            return "identity"
        self.history.append([epoch, to_json(genotype)])
        self.write_genotype(epoch)
        if collapsed:
            self.run.log("the first genotype is over --max_identity; there is none before it to keep")
            return "identity"
        if is_stable(self.history, args.stop_stable):
            return "stable"
        return "patience" if self.patience.step(valid_loss) else ""

    # --- a checkpoint ---

    def parts(self) -> dict[str, Any]:
        return {**super().parts(), "arch_optimizer": self.architect.optimizer}

    def state_dict(self) -> dict[str, Any]:
        return {
            "eval_batch_sizes": eval_batch_sizes(self.args.norm), "genotype": to_json(self.derived()[0]),
            "history": self.history, "valid_position": self.valid_batches.position,
            "hidden": self.ranks.all_gather(self.hidden), "hidden_valid": self.ranks.all_gather(self.hidden_valid),
        }  # fmt: skip

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.valid_batches.position, self.history = saved["valid_position"], saved["history"]
        device = self.train_text.device
        self.hidden = self.ranks.shard(saved["hidden"]).to(device)
        self.hidden_valid = self.ranks.shard(saved["hidden_valid"]).to(device)

    def template(self, saved: dict[str, Any]) -> dict[str, Any]:
        return {
            "history": [[1, to_json(self.derived()[0])]], "optimizer": checkpoint.optimizer_template(self.optimizer),
            "arch_optimizer": checkpoint.optimizer_template(self.architect.optimizer),
        }  # fmt: skip

    def validate(self, saved: dict[str, Any]) -> None:
        epochs = range(self.args.arch_start + 1, saved["progress"]["epoch"])
        check_history(saved["history"], epochs, saved["stopped_by"] == "identity")
        if self.ranks.is_main and saved["stopped_by"] == "patience":  # the result is computed from best.pt
            best = checkpoint.load(self.run.folder / "best.pt")
            alphas = checkpoint.optimizer_template(self.architect.optimizer)
            form = {"model": self.model.state_dict(), "progress": {"epoch": 1}, "arch_optimizer": alphas}
            checkpoint.validate_state(best, form)
            if best["progress"]["epoch"] - 1 not in dict(saved["history"]):
                raise ValueError("its best epoch is not in its history")

    def load_best(self) -> int:
        """Loads the weights and alphas of best.pt; returns their epoch."""
        best = checkpoint.load(self.run.folder / "best.pt")
        self.model.load_state_dict(best["model"])
        self.architect.optimizer.load_state_dict(best["arch_optimizer"])
        self.optimizer.state.clear()  # the average is that of later weights
        epoch = best["progress"]["epoch"] - 1
        self.write_genotype(epoch)
        return epoch


def search(experiment: Experiment, state: SearchState) -> None:
    """DARTS, algorithm 1: a step of the alphas, then a step of the weights, until the search ends."""
    args = experiment.args
    for epoch in experiment.epochs():
        with experiment.rollback_on_divergence(state):
            for x, y in experiment.segments(state.train_text):  # (T, B) each
                experiment.set_lr(state.optimizer)
                with scaled_lr(state.optimizer, len(x) / args.bptt) as lr:
                    # 1. alphas down the gradient of L_valid(w - xi grad_w L_train(w, alpha), alpha), with xi = lr if
                    #    --unrolled, and 0 in first order
                    if epoch > args.arch_start:
                        state.alpha_step(lr, x, y)
                    # 2. weights down the gradient of L_train(w, alpha)
                    nll, norm = state.weight_gradient(x, y)
                    state.optimizer.step()
                experiment.after_step(state, nll, norm, lr, len(x))
                state.diagnose(experiment.progress)
                experiment.save_if_due(state)

            experiment.check_weights(state)
            with averaged(state.optimizer):
                valid_loss = experiment.evaluate(state.model, state.valid_text, "valid")
                experiment.close_epoch(state, valid_loss, may_be_best=epoch > args.arch_start)
            experiment.end_epoch(state, valid_loss, state.reason_to_stop(epoch, valid_loss))


def main(argv: list[str] | None = None) -> int:
    """Runs a search from its start or its last checkpoint to result.json; returns the exit code."""
    with Experiment("search", build_parser(), argv, texts_to_read, REASONS) as experiment:
        args, corpus, run = experiment.args, experiment.corpus, experiment.run
        if args.tensorboard and experiment.ranks.is_main:
            from plots.tensorboard import TensorBoardLogger  # imported only here, since it needs another package

            run.tensorboard = TensorBoardLogger(run.folder, vars(args))
        state = SearchState(experiment)
        sizes = f"{state.n_weights:,} weights, {state.model.alphas.numel()} alphas"
        text = startup.describe(corpus, args.limit_tokens)
        title = f"search in {run.folder} on {experiment.device}: {sizes}, {text}"
        experiment.start(state, title, *startup.notes(corpus, args))
        if args.overfit:
            experiment.overfit(state)
            return 0
        with experiment.running():
            search(experiment, state)
        if not experiment.ranks.is_main:
            return 0

        epoch = state.load_best() if experiment.stopped_by == "patience" else state.history[-1][0]
        genotype = dict(state.history)[epoch]
        with averaged(state.optimizer):
            valid = experiment.score(state.model, "valid")
            test = experiment.score(state.model, "test") if args.test == "read" else None
        best = perplexity(experiment.best)
        experiment.write_result("relaxed model", state, valid, test, best_valid_ppl=best, genotype=genotype)
        run.log(f"found {from_json(genotype)}")
        flags = "".join(f" --{name} {getattr(args, name)}" for name in ("min_count", "vocab_size", "test")
                       if getattr(args, name) not in (0, "read"))  # fmt: skip
        run.log(f"retrain it with: python train.py --data {quote(args.data)}{flags} --arch {quote(str(run.folder))}")
    return experiment.exit_code


if __name__ == "__main__":
    sys.exit(signals.run_script(main))
