"""Retrain a cell from scratch and measure it: SGD, then averaged SGD once the validation loss stops falling.

    python train.py --arch DARTS                                       # published setting; wants a GPU
    python train.py --data builtin --arch runs/search-... --emsize 64 --lr 5 --epochs 8

The paper gives 3 days on a 1080Ti for the first; the second takes a minute on a CPU. Both end with the test
perplexity of the weights that did best on the validation text.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import checkpoint
import options
import start
from averaging import NonMonotonicTrigger, averaged, averaging_sgd
from data import Corpus, batchify, get_batch, segments
from divergence import Watch, back_off, count_rollback
from dropout import Rates
from engine import Engine
from genotypes import resolve, to_json
from graphs import Graphs
from kernels import products_in
from model import retrain_model
from objective import (
    TEST_ROWS,
    VALID_ROWS,
    Batch,
    evaluate,
    scaled_lr,
    small_batch_losses,
    weight_step,
)
from progress import Progress, perplexity
from utils import Diverged, StopSignal, choose_device

EVAL_ROWS = {"valid": VALID_ROWS, "test": TEST_ROWS}


def build_parser() -> options.Parser:
    parser = options.Parser("train.py", "Retrain a recurrent cell for language modelling, from scratch.")
    cell = parser.add_argument_group("cell")
    cell.add_argument(
        "--arch",
        default="DARTS",
        help="the cell: a name (DARTS, DARTS_V1, DARTS_V2, ENAS), a search's run directory, a "
        "genotype.json, the text of a genotype, or random:SEED",
    )
    options.add_shared_flags(
        parser, size=850, batch_size=64, epochs=8000, dropoute=0.1, wdecay=8e-7, bptt_std=5.0, seed=1267,
        log_interval=200,
    )  # fmt: skip
    averaging = parser.add_argument_group("averaging (NT-ASGD)")
    averaging.add_argument(
        "--nonmono",
        type=int,
        default=5,
        help="averaging starts when the validation loss is above the best of all but this many last epochs",
    )
    return parser


def texts_to_read(corpus: Corpus, args: Namespace) -> dict[str, tuple[torch.Tensor, int]]:
    """Word ids and the number of rows that they are cut into, by name."""
    return {
        "train": (corpus.train, args.batch_size),
        "valid": (corpus.valid, EVAL_ROWS["valid"]),
        "test": (corpus.test, EVAL_ROWS["test"]),
    }


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args, corpus, run, saved = start.begin("train", parser, argv, texts_to_read)
    device = choose_device(args.device, args.deterministic)
    torch.manual_seed(args.seed)
    bptt_rng = torch.Generator().manual_seed(args.seed)
    train, valid, test = (batchify(ids, rows).to(device) for ids, rows in texts_to_read(corpus, args).values())

    genotype = resolve(args.arch)
    rates = Rates(**{name: getattr(args, name) for name in Rates._fields})
    model = retrain_model(len(corpus.words), args.emsize, rates, genotype).to(device)
    model = model.using(Engine(args.engine, args.precision))
    weights = model.weights()
    params = sum(w.numel() for w in weights)
    train_loss = partial(
        small_batch_losses, model, small_batch_size=args.small_batch_size, alpha=args.alpha, beta=args.beta
    )
    trigger = NonMonotonicTrigger(args.nonmono)

    def new_optimizer(phase: str, lr: float) -> torch.optim.Optimizer:
        return {
            "sgd": lambda: torch.optim.SGD(weights, lr=lr, weight_decay=args.wdecay),
            "asgd": lambda: averaging_sgd(weights, lr, args.wdecay),
        }[phase]()

    phase = "sgd"
    optimizer = new_optimizer(phase, args.lr)

    def step(lr: float, x: Tensor, y: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the weights. The optimizer has the rate; here it tells one captured step from another."""
        batch = Batch(x, y, hidden, model.draw_masks(args.batch_size))
        return weight_step(train_loss(batch), weights, optimizer, args.clip)

    def quick() -> Callable:
        return Graphs(step, device) if args.engine == "fused" else step

    hidden = model.initial_hidden(args.batch_size)  # (B, H)
    best = float("inf")  # validation loss
    rollbacks, watch = 0, Watch(device, len(corpus.words))
    progress = Progress(run, device, args.epochs, len(train) - 1)
    keeper = checkpoint.Keeper(run.folder, args.checkpoint_minutes)

    def state() -> dict:
        return {
            **start.identity("train", args, corpus), "eval_rows": EVAL_ROWS, "genotype": to_json(genotype),
            "model": model.state_dict(), "phase": phase, "optimizer": optimizer.state_dict(),
            "valid_losses": trigger.losses, "rng": checkpoint.rng_state(device, bptt_rng),
            "progress": progress.state_dict(), "hidden": hidden, "best": best,
            "watch": watch.state_dict(), "rollbacks": rollbacks,
        }  # fmt: skip

    def restore(saved: dict) -> None:
        nonlocal hidden, best, phase, optimizer, rollbacks
        model.load_state_dict(saved["model"])
        phase = saved["phase"]
        optimizer = new_optimizer(phase, args.lr)
        optimizer.load_state_dict(saved["optimizer"])
        trigger.losses, best, rollbacks = saved["valid_losses"], saved["best"], saved["rollbacks"]
        hidden = saved["hidden"].to(device)
        watch.load_state_dict(saved["watch"])
        progress.load_state_dict(saved["progress"])

    def judge() -> None:
        """Raises Diverged unless all went well, and the present weights, which no step has tried, are fit to keep."""
        watch.check()
        watch.judge(evaluate(model, train[: args.bptt + 1, : args.small_batch_size], args.bptt, "train"))

    def go_back(fault: Diverged) -> None:
        """To the last checkpoint, on with a lower learning rate and other random numbers than led here."""
        nonlocal rollbacks
        attempt = count_rollback(rollbacks, args.max_rollbacks, fault, progress.step)
        restore(checkpoint.load_last(run.folder)[0])
        rollbacks = attempt
        back_off(run, optimizer, args.backoff, fault, progress)
        checkpoint.save(state(), run.folder / "last.pt")  # and previous.pt stays what it is

    if saved:
        with start.restoring(parser, run):
            form = {**state(), "valid_losses": [1.0]}
            start.check_state(saved, form, {"optimizer": new_optimizer(saved["phase"], args.lr)})
            checkpoint.set_rng_state(saved["rng"], device, bptt_rng)
            if saved["best"] < float("inf"):  # what the result is made from
                checkpoint.check_form(
                    checkpoint.load(run.folder / "best.pt"), {"model": model.state_dict(), "best": 1.0}
                )
            restore(saved)
    run.configure(parser.prog, args, device, corpus.sha256, finished=progress.epoch > args.epochs)
    if saved:
        run.log(f"resumed at epoch {progress.epoch}, step {progress.step}")
    else:
        run.log(f"retraining in {run.folder} on {device}: {params:,} weights, {start.describe(corpus)}")
        run.log(str(genotype))
        keeper.keep(state())

    with StopSignal() as stop, products_in(args.precision), start.memory_explained(args):
        take_step = quick()
        while progress.epoch <= args.epochs:
            try:
                lengths = segments(
                    len(train), args.bptt, bptt_rng, args.bptt_std, args.max_seq_len_delta, start=progress.row
                )
                for i, seq_len in progress.track(lengths, columns=args.batch_size):
                    x, y = get_batch(train, i, seq_len)  # (T, B)
                    with scaled_lr(optimizer, seq_len / args.bptt) as lr:
                        nll, hidden, norm = take_step(lr, x, y, hidden)
                    progress.advance(nll, x.shape, lr)
                    watch.add(nll, norm)

                    if progress.step % args.log_interval == 0:
                        watch.check()
                        progress.close_interval(lr)
                    stopping = stop.requested
                    if stopping or keeper.due():
                        judge()
                        keeper.keep(state())
                    if stopping:
                        return run.interrupted(parser.prog)

                judge()
                with averaged(optimizer):
                    lr, note = optimizer.param_groups[0]["lr"], " (averaged)" if phase == "asgd" else ""
                    loss = evaluate(model, valid, args.bptt, "valid")
                    progress.close_epoch(loss, lr, note=note, phase=phase)
                    hidden = model.initial_hidden(args.batch_size)
                    if loss < best:
                        best = loss
                        checkpoint.save(state(), run.folder / "best.pt")
            except Diverged as fault:
                go_back(fault)
                take_step = quick()  # what was captured holds the old optimizer
                continue
            if phase == "sgd" and trigger.fires(loss):
                phase, optimizer = "asgd", new_optimizer("asgd", lr)
                take_step = quick()
                run.log("the validation loss has stopped falling: averaging the weights from here on")
            keeper.keep(state())
            if stop.requested:
                return run.interrupted(parser.prog)

    chosen = checkpoint.load(run.folder / "best.pt")
    model.load_state_dict(chosen["model"])
    best = chosen["best"]
    test_ppl = perplexity(evaluate(model, test, args.bptt, "test"))
    run.write("result.json", {
        "kind": "train", "epochs": progress.epoch - 1, "steps": progress.step, "seconds": progress.elapsed(),
        "params": params, "valid_ppl": perplexity(best), "test_ppl": test_ppl, "genotype": to_json(genotype),
        "stopped_by": "epochs",
    })  # fmt: skip
    run.log(f"best weights: valid ppl {perplexity(best):.2f} | test ppl {test_ppl:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(start.run_script(main))
