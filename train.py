"""Retrain a cell from scratch and measure it: SGD, then averaged SGD once the validation loss stops falling.

    python train.py --arch DARTS                                       # published setting; wants a GPU
    python train.py --data builtin --arch runs/search-... --emsize 64 --batch_size 32 --epochs 8

The paper gives 3 days on a 1080Ti for the first; the second takes a minute on a CPU. Both end with the test
perplexity of the weights that did best on the validation text.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import batchify, get_batch, segments
from engine import Engine
from engine.dropout import Rates
from engine.matmul import products_in
from experiment import arguments, checkpoint, resume, signals, startup
from experiment.distributed import Ranks
from experiment.divergence import Watch, go_back
from experiment.progress import Progress
from experiment.retrain_arguments import EVAL_ROWS, build_parser, texts_to_read
from experiment.signals import StopSignal
from genotypes import cell_to_json, resolve_cell
from model import retrain_model
from training import optimizers
from training.early_stopping import Patience
from training.evaluation import evaluate, perplexity, told
from training.gradients import clipped_gradient, scaled_lr
from training.losses import Batch, SmallBatches
from training.optimizers import NonMonotonicTrigger, averaged
from training.overfit import overfit
from utils import Diverged, choose_device

REASONS = ("patience", "nonmono")  # to stop before the last epoch


def main(argv: list[str] | None = None) -> int:
    ranks = Ranks()
    parser = build_parser()
    args, corpus, run, saved = startup.begin("train", parser, argv, texts_to_read, ranks)
    if args.tensorboard and ranks.first:
        from plots.tensorboard import Mirror  # needs more than the scripts do

        run.mirror = Mirror(run.folder, vars(args))
    device = ranks.device(choose_device(args.device, args.deterministic))
    rows = args.batch_size // ranks.size  # of the batch on this rank
    rows_at_once = min(args.small_batch_size, rows)
    torch.manual_seed(args.seed)
    bptt_rng = torch.Generator().manual_seed(args.seed)
    train, valid, test = (batchify(ids, n).to(device) for ids, n in texts_to_read(corpus, args).values())
    train = ranks.rows(train, dim=1)

    cell = resolve_cell(args.arch)
    rates = Rates(**{name: getattr(args, name) for name in Rates._fields})
    model = retrain_model(len(corpus.words), args.emsize, rates, cell, args.n_experts, args.init_range).to(device)
    model = model.using(Engine(args.engine, args.precision))
    ranks.seed(args.seed)
    weights = model.weights()
    params = sum(w.numel() for w in weights)
    train_loss = partial(
        SmallBatches, model, small_batch_size=rows_at_once, alpha=args.alpha, beta=args.beta,
        rdrop=args.rdrop, fraternal=args.fraternal,
    )  # fmt: skip
    two_passes = args.rdrop > 0 or args.fraternal > 0

    def new_optimizer(phase: str) -> torch.optim.Optimizer:
        return optimizers.new_optimizer(phase, weights, args.lr, args.wdecay, args.momentum)

    phase = "sgd" if args.optimizer == "ntasgd" else args.optimizer
    optimizer, schedule = new_optimizer(phase), arguments.schedule(args)
    trigger, patience = NonMonotonicTrigger(args.nonmono), Patience(args.patience, args.min_delta)

    def gradient(x: Tensor, y: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """That of a segment, for a step of the weights."""
        masks = model.draw_masks(rows)
        twin = model.draw_masks(rows) if two_passes else None
        return clipped_gradient(
            train_loss(Batch(x, y, hidden, masks, twin)), weights, args.clip, args.clip_value, ranks.average
        )

    quick_gradient = model.engine.replayed(gradient, device)

    hidden = model.initial_hidden(rows)  # (B, S), of this rank's rows
    best, stopped_by = float("inf"), ""  # validation loss; why the run ended
    watch = Watch(device, len(corpus.words))
    progress = Progress(run, device, args.epochs, len(train) - 1)
    keeper = checkpoint.Keeper(run.folder, args.checkpoint_minutes, writes=ranks.first)

    def parts() -> dict[str, Any]:
        return {
            "model": model, "optimizer": optimizer, "schedule": schedule, "trigger": trigger, "patience": patience,
            "watch": watch, "progress": progress,
        }  # fmt: skip

    def state() -> dict[str, Any]:
        return {
            **resume.identity("train", args, corpus, ranks.size), "eval_rows": EVAL_ROWS,
            "genotype": cell_to_json(cell), "phase": phase, "hidden": ranks.all_rows(hidden),
            **{name: part.state_dict() for name, part in parts().items()},
            "rng": ranks.gather(checkpoint.rng_state(device, bptt_rng)), "best": best, "stopped_by": stopped_by,
        }  # fmt: skip

    def restore(saved: dict[str, Any]) -> None:
        nonlocal hidden, best, phase, optimizer, stopped_by
        phase, best, stopped_by = saved["phase"], saved["best"], saved["stopped_by"]
        hidden, optimizer = ranks.rows(saved["hidden"]).to(device), new_optimizer(phase)
        for name, part in parts().items():
            part.load_state_dict(saved[name])

    def finished() -> bool:
        return progress.epoch > args.epochs or bool(stopped_by)

    def judge() -> None:
        """Raises Diverged unless the present weights are fit to be kept."""
        start_of_text = train[: args.bptt + 1, :rows_at_once]
        watch.judge(ranks.same(lambda: evaluate(model, start_of_text, args.bptt, "train")))

    if saved:
        with resume.restoring(parser, run):
            form = {**state(), "trigger": {"losses": [1.0]}}
            resume.check_state(saved, form, REASONS, {"optimizer": new_optimizer(saved["phase"])})
            checkpoint.set_rng_state(saved["rng"][ranks.rank], device, bptt_rng)
            if ranks.first and saved["best"] < float("inf"):  # what the result is made from
                checkpoint.check_form(
                    checkpoint.load(run.folder / "best.pt"), {"model": model.state_dict(), "best": 1.0}
                )
            restore(saved)
    elif args.finetune:
        path = Path(args.finetune, "best.pt")
        with resume.restoring(parser, run, path):
            first = ranks.same(lambda: checkpoint.load(path))
            checkpoint.check_form(first, {"model": model.state_dict()})
            model.load_state_dict(first["model"])
            best = ranks.same(lambda: evaluate(model, valid, args.bptt, "valid"))
            checkpoint.check_form(best, 1.0, "its validation loss")  # a number
    run.configure(parser.prog, args, device, corpus.sha256, finished(), ranks.size)
    if saved:
        run.log(f"resumed at epoch {progress.epoch}, step {progress.step}")
    else:
        run.log(
            f"retraining in {run.folder} on {device}: {params:,} weights, {startup.describe(corpus, args.limit_tokens)}"
        )
        run.log(str(cell))
        if args.finetune:
            run.log(f"from the best weights of {args.finetune}: valid ppl {perplexity(best):.2f}")
            keeper.keep_best(state())
        keeper.keep(state())

    if args.overfit:
        with products_in(args.precision), startup.memory_explained(args):
            run.log(overfit(model, optimizer, train, args.bptt, rows_at_once, args.clip, args.clip_value))
        return 0

    with StopSignal() as stop, products_in(args.precision), startup.memory_explained(args):
        while not finished():
            try:
                lengths = segments(
                    len(train), args.bptt, bptt_rng, args.bptt_std, args.max_seq_len_delta, start=progress.row
                )
                for i, seq_len in progress.track(lengths, columns=args.batch_size):
                    x, y = get_batch(train, i, seq_len)  # (T, B)
                    schedule.set_rate(optimizer, progress.step, progress.position())
                    with scaled_lr(optimizer, seq_len / args.bptt) as lr:
                        nll, hidden, norm = quick_gradient(x, y, hidden)
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=device.type == "cpu")  # on CUDA they stay where graphs write them
                    progress.advance(nll, norm, (len(x), args.batch_size), lr)
                    watch.add(nll, norm)

                    if progress.step % args.log_interval == 0:
                        watch.check()
                        progress.close_interval(lr, rate=optimizer.param_groups[0]["lr"])
                    stopping, due = ranks.any(stop.requested, keeper.due())
                    if stopping or due:
                        judge()
                        keeper.keep(state())
                    if stopping:
                        return run.interrupted(ranks.command(parser.prog))

                judge()
                with averaged(optimizer):
                    loss = ranks.same(lambda: evaluate(model, valid, args.bptt, "valid"))
                    note = " (averaged)" if phase == "asgd" else ""
                    progress.close_epoch(loss, optimizer.param_groups[0]["lr"], note=note, phase=phase)
                    hidden = model.initial_hidden(rows)
                    if loss < best:
                        best = loss
                        keeper.keep_best(state())
            except Diverged as fault:
                go_back(
                    fault, run, ranks, keeper, watch, schedule, progress, state, restore, args.backoff,
                    args.max_rollbacks,
                )  # fmt: skip
                continue
            schedule.close_epoch(loss)
            if patience.is_over(loss):
                stopped_by = "patience"
            elif phase == "sgd" and args.optimizer == "ntasgd" and trigger.fires(loss):
                phase, optimizer = "asgd", new_optimizer("asgd")
                run.log("the validation loss has stopped falling: averaging the weights from here on")
            elif args.finetune and trigger.fires(loss):
                stopped_by = "nonmono"
            if stopped_by:
                run.log(f"stopped by {stopped_by}")
            keeper.keep(state())
            if ranks.any(stop.requested)[0]:
                return run.interrupted(ranks.command(parser.prog))

    if not ranks.first:
        return 0
    chosen = checkpoint.load(run.folder / "best.pt")
    model.load_state_dict(chosen["model"])
    best = chosen["best"]
    test_ppl = perplexity(evaluate(model, test, args.bptt, "test")) if args.test == "read" else None
    run.write("result.json", {
        "kind": "train", "epochs": progress.epoch - 1, "steps": progress.step, "seconds": progress.elapsed(),
        "params": params, "valid_ppl": perplexity(best), "test_ppl": test_ppl, "genotype": cell_to_json(cell),
        "stopped_by": stopped_by or "epochs",
    })  # fmt: skip
    run.log(f"best weights: valid ppl {perplexity(best):.2f} | {told(test_ppl)}")
    return 0


if __name__ == "__main__":
    sys.exit(signals.run_script(main))
