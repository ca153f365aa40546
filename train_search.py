"""Search a recurrent cell by gradient descent: weights on the training text, alphas on the validation text.

    python train_search.py --unrolled                                  # published setting; wants a GPU
    python train_search.py --data builtin --emsize 64 --batch_size 32 --epochs 4

The published code took 4 h 21 min on a V100 for the first; the second takes a minute on a CPU. Both
end with a genotype in the run directory; `python train.py --arch RUN` retrains it.
"""

import sys
from argparse import Namespace
from functools import partial
from shlex import quote
from typing import Any

import torch
from torch import Tensor

import checkpoint
import options
import start
from architect import RADIUS, Architect
from averaging import averaged
from data import Corpus, Cursor, batchify, get_batch, segments
from diagnosis import Diagnosis
from divergence import Watch, go_back
from dropout import HeldRelu, Rates
from engine import Engine
from genotypes import STEPS, Genotype, from_json, to_json
from kernels import products_in
from model_search import RNNModelSearch
from objective import TEST_ROWS, VALID_ROWS, Batch, SmallBatches, clipped_gradient, evaluate, scaled_lr
from optimizers import OPTIMIZERS, new_optimizer, velocity
from progress import Progress, perplexity, told
from ranks import Ranks
from recurrence import NORMS
from sanity import overfit
from stopping import Patience, check_history, identities, is_stable
from utils import Diverged, StopSignal, choose_device

REASONS = ("patience", "stable", "identity")  # to stop before the last epoch
HELD_OUT = 0.1  # of train.txt, for the alphas, with --search_split train


def build_parser() -> options.Parser:
    parser = options.Parser(
        "train_search.py", "Search a recurrent cell for language modelling by gradient descent (DARTS)."
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--unrolled",
        action="store_true",
        help="second order: the alphas' gradient is taken at the weights that the next weight step "
        "would give, not at the present ones",
    )
    search.add_argument(
        "--hessian",
        choices=("finite", "exact"),
        default="finite",
        help="with --unrolled, how the product with the mixed second derivative is formed, at the same cost: by a "
        f"central difference at radius {RADIUS:g}, always in fp32 and with relu's active set held, or exact by "
        "differentiating twice, in the --precision of all else (with --engine eager at its memory). Over 20 batches of "
        "Penn Treebank the cosine of the two in fp32 has a median of 1.0000 and a lowest value of 0.9999; in bf16 the "
        "exact one is faster, and in the odd batch far off (benchmarks/hessian.py)",
    )
    search.add_argument(
        "--search_split",
        choices=("valid", "train"),
        default="valid",
        help="text for the alphas: valid.txt, as published, or the last tenth of train.txt, which "
        "leaves valid.txt unseen for choosing",
    )
    search.add_argument(
        "--norm",
        choices=NORMS,
        default="none",
        help="of the relaxed cell's states: none, with the mean over predecessors in the place of their sum; layer, "
        "over the hidden units of each row; batch, the published one, over the batch. A norm hides from the alphas "
        "what depth costs a discrete cell, which has none, and under batch the recurrence is chaotic (docs/signal.md)",
    )
    search.add_argument(
        "--arch_lr", type=float, default=3e-2, help="learning rate of Adam on the alphas (published: 3e-3)"
    )
    search.add_argument(
        "--arch_start",
        type=int,
        help="epochs in which only the weights are trained, before the alphas begin to move: a model that knows no "
        "more than word frequencies asks for other primitives than one that reads its context (default: 2, or what "
        "leaves one epoch to the alphas)",
    )
    search.add_argument(
        "--arch_batch_size",
        type=int,
        help="rows of the alphas' text read side by side, a multiple of --small_batch_size; more make the gradient of "
        "the alphas less noisy, which batches of a thousand words need (default: batch_size)",
    )
    search.add_argument("--arch_wdecay", type=float, default=1e-3, help="weight decay of the alphas")
    search.add_argument(
        "--derive_from",
        choices=("mean", "last"),
        default="mean",
        help="which alphas the genotype is derived from: a mean over the steps that they have taken, in which later "
        "steps weigh more and which is steady where the alphas swing with the weights (docs/signal.md), or the last "
        "ones, as published",
    )
    search.add_argument(
        "--stop_stable",
        type=int,
        default=0,
        help="stop when the genotype has been the same for so many epochs; 0: never",
    )
    search.add_argument(
        "--max_identity",
        type=int,
        default=STEPS,
        help="stop when more than so many nodes of the genotype are identity, and keep the one of the epoch before",
    )
    search.add_argument(
        "--diagnose_every",
        type=int,
        default=0,
        help="every so many steps measure whether the alphas' gradient has a signal, for visualize.py search: how "
        "alike those of independent batches are, the largest eigenvalue of the loss's Hessian in alpha, what the "
        "finite product misses, what discretising costs. It takes as long as several steps and changes nothing of the "
        "search; 0: never",
    )
    options.add_shared_flags(
        parser,
        size=300,
        batch_size=256,
        epochs=50,
        dropoute=0.0,
        wdecay=5e-7,
        bptt_std=0.0,
        seed=3,
        log_interval=50,
        optimizers=OPTIMIZERS,
    )
    return parser


def eval_rows(norm: str) -> dict[str, int]:
    """In how many rows the relaxed model reads a text. Batch normalisation needs several, since a batch of one has no
    statistics; without it the test text is read in one row, as by a discrete cell."""
    return {"valid": VALID_ROWS, "test": VALID_ROWS if norm == "batch" else TEST_ROWS}


def search_texts(corpus: Corpus, split: str, limit: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Word ids for the weights and for the alphas."""
    train = corpus.train[:limit] if limit else corpus.train
    if split == "valid":
        return train, corpus.valid
    held_out = int(HELD_OUT * len(train))
    return train[:-held_out], train[-held_out:]


def texts_to_read(corpus: Corpus, args: Namespace) -> dict[str, tuple[torch.Tensor, int]]:
    """Word ids and the number of rows that they are cut into, by name."""
    train, alphas = search_texts(corpus, args.search_split, args.limit_tokens)
    rows = eval_rows(args.norm)
    return {
        "train": (train, args.batch_size),
        "the alphas": (alphas, args.arch_batch_size),
        "valid": (corpus.valid, rows["valid"]),
        "test": (corpus.test, rows["test"]),
    }


def main(argv: list[str] | None = None) -> int:
    ranks = Ranks()
    parser = build_parser()
    args, corpus, run, saved = start.begin("search", parser, argv, texts_to_read, ranks)
    device = ranks.device(choose_device(args.device, args.deterministic))
    rows = args.batch_size // ranks.size  # of the batch on this rank
    rows_at_once = min(args.small_batch_size, rows)
    arch_rows = args.arch_batch_size // ranks.size
    torch.manual_seed(args.seed)
    bptt_rng = torch.Generator().manual_seed(args.seed)
    # (n, B) each; the alphas' text has a cursor of its own
    train, alphas_text, valid, test = (batchify(ids, n).to(device) for ids, n in texts_to_read(corpus, args).values())
    train = ranks.rows(train, dim=1)
    valid_batches = Cursor(ranks.rows(alphas_text, dim=1))

    rates = Rates(**{name: getattr(args, name) for name in Rates._fields})
    model = RNNModelSearch(
        len(corpus.words), args.emsize, rates, norm=args.norm, init_range=args.init_range
    ).to(device)  # fmt: skip
    model = model.using(Engine(args.engine, args.precision))
    ranks.seed(args.seed)
    weights = model.weights()
    params = sum(w.numel() for w in weights)
    optimizer = new_optimizer(args.optimizer, weights, args.lr, args.wdecay, args.momentum)
    schedule, patience = options.schedule(args), Patience(args.patience, args.min_delta)
    hessian = args.hessian if args.unrolled else None
    regularised = partial(SmallBatches, alpha=args.alpha, beta=args.beta)

    def architect_of(model: RNNModelSearch, rows_at_once: int, hessian: str | None) -> Architect:
        precise = model.using(Engine(args.engine))  # a difference of nearby weights needs every digit
        at_once = {"small_batch_size": rows_at_once}
        return Architect(
            weights, model.alphas, partial(regularised, model, **at_once), partial(SmallBatches, model, **at_once),
            partial(regularised, precise, **at_once), clip=args.clip, wdecay=args.wdecay, clip_value=args.clip_value,
            hessian=hessian, lr=args.arch_lr, arch_wdecay=args.arch_wdecay, average=ranks.average,
            mean_alphas=args.derive_from == "mean",
        )  # fmt: skip

    architect = architect_of(model, rows_at_once, hessian)
    diagnosis = Diagnosis(
        model, architect_of, hessian, (train, valid_batches.source, valid), rows_at_once, args.bptt, args.seed, ranks
    ) if args.diagnose_every else None  # fmt: skip

    def gradient(
        eta: Tensor, x: Tensor, y: Tensor, hidden: Tensor, xv: Tensor, yv: Tensor, hidden_valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A step of the alphas on validation text (DARTS, algorithm 1), and the gradient of training text, for one of
        the weights."""
        held = model.draw_masks(rows)._replace(relu=HeldRelu() if hessian == "finite" else None)  # over every pass
        hidden_valid = architect.step(
            train=Batch(x, y, hidden, held),
            valid=Batch(xv, yv, hidden_valid, model.draw_masks(arch_rows)),
            eta=eta,
            velocity=velocity(optimizer) if args.unrolled else None,
        )
        return *weight_gradient(x, y, hidden), hidden_valid

    def weight_gradient(x: Tensor, y: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of training text, for a step of the weights."""
        batch = Batch(x, y, hidden, model.draw_masks(rows))
        parts = regularised(model, batch, rows_at_once)
        nll, hidden, norm = clipped_gradient(parts, weights, args.clip, args.clip_value, ranks.average)
        return nll, norm, hidden

    quick_gradient = model.engine.replayed(gradient, device)
    quick_weight_gradient = model.engine.replayed(weight_gradient, device)

    # (B, H), of this rank's rows
    hidden, hidden_valid = model.initial_hidden(rows), model.initial_hidden(arch_rows)
    best, stopped_by = float("inf"), ""  # validation loss; why the search ended
    history = []  # [epoch, genotype] at the end of each epoch
    watch = Watch(device, len(corpus.words))
    progress = Progress(run, device, args.epochs, len(train) - 1)
    keeper = checkpoint.Keeper(run.folder, args.checkpoint_minutes, writes=ranks.first)
    parts = {
        "model": model, "optimizer": optimizer, "arch_optimizer": architect, "schedule": schedule,
        "patience": patience, "watch": watch, "progress": progress,
    }  # fmt: skip

    def state() -> dict[str, Any]:
        return {
            **start.identity("search", args, corpus, ranks.size), "eval_rows": eval_rows(args.norm),
            "genotype": to_json(derived()[0]), "history": history, "valid_position": valid_batches.position,
            "hidden": ranks.all_rows(hidden), "hidden_valid": ranks.all_rows(hidden_valid),
            **{name: part.state_dict() for name, part in parts.items()},
            "rng": ranks.gather(checkpoint.rng_state(device, bptt_rng)), "best": best, "stopped_by": stopped_by,
        }  # fmt: skip

    def restore(saved: dict[str, Any]) -> None:
        nonlocal hidden, hidden_valid, best, history, stopped_by
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        hidden, hidden_valid = (ranks.rows(saved[name]).to(device) for name in ("hidden", "hidden_valid"))
        valid_batches.position, best, history = saved["valid_position"], saved["best"], saved["history"]
        stopped_by = saved["stopped_by"]

    def finished() -> bool:
        return progress.epoch > args.epochs or bool(stopped_by)

    def judge() -> None:
        """Raises Diverged unless the present weights are fit to be kept."""
        start_of_text = train[: args.bptt + 1, :rows_at_once]
        watch.judge(ranks.same(lambda: evaluate(model, start_of_text, args.bptt, "train")))

    def derived() -> tuple[Genotype, list[list[float]]]:
        """The genotype that the search would end with now, and the probabilities (N(N+1)/2, K) that it follows from."""
        with averaged(architect.optimizer):
            return model.genotype(), model.alphas.softmax(-1).tolist()

    def found() -> dict[str, Any]:
        """What the search has found so far, for a row of metrics.jsonl."""
        genotype, probabilities = derived()
        return {
            "genotype": to_json(genotype), "probabilities": [[round(p, 5) for p in edge] for edge in probabilities]
        }  # fmt: skip

    def keep_genotype(epoch: int) -> None:
        """What the search has found at the end of this epoch, to genotype.json."""
        genotype, probabilities = derived()
        run.write("genotype.json", {
            "genotype": to_json(genotype), "text": str(genotype), "epoch": epoch, "probabilities": probabilities,
        })  # fmt: skip

    if saved:
        with start.restoring(parser, run):
            form = {**state(), "history": [[1, to_json(derived()[0])]]}
            start.check_state(saved, form, REASONS, {"optimizer": optimizer, "arch_optimizer": architect.optimizer})
            checkpoint.set_rng_state(saved["rng"][ranks.rank], device, bptt_rng)
            check_history(saved["history"], saved["progress"]["epoch"] - 1, saved["stopped_by"] == "identity")
            if ranks.first and saved["stopped_by"] == "patience":  # what the result is made from
                chosen = checkpoint.load(run.folder / "best.pt")
                alphas = checkpoint.stepped(architect.optimizer)
                checkpoint.check_form(
                    chosen, {"model": model.state_dict(), "progress": {"epoch": 1}, "arch_optimizer": alphas}
                )
                if chosen["progress"]["epoch"] - 1 not in dict(saved["history"]):
                    raise ValueError("its best epoch is not in its history")
            restore(saved)
    run.configure(parser.prog, args, device, corpus.sha256, finished(), ranks.size)
    if saved:
        run.log(f"resumed at epoch {progress.epoch}, step {progress.step}")
    else:
        run.log(f"search in {run.folder} on {device}: {params:,} weights, {model.alphas.numel()} alphas,"
                f" {start.describe(corpus, args.limit_tokens)}")  # fmt: skip
        keeper.keep(state())

    if args.overfit:
        with products_in(args.precision), start.memory_explained(args):
            overfit(run, model, optimizer, train, args.bptt, rows_at_once, args.clip, args.clip_value)
        return 0

    with StopSignal() as stop, products_in(args.precision), start.memory_explained(args):
        while not finished():
            try:
                lengths = segments(
                    len(train), args.bptt, bptt_rng, args.bptt_std, args.max_seq_len_delta, start=progress.row
                )
                for i, seq_len in progress.track(lengths, columns=args.batch_size):
                    x, y = get_batch(train, i, seq_len)  # (T, B)
                    schedule.set_rate(optimizer, progress.step, progress.position())
                    with scaled_lr(optimizer, seq_len / args.bptt) as lr:
                        if progress.epoch <= args.arch_start:
                            nll, norm, hidden = quick_weight_gradient(x, y, hidden)
                        else:
                            xv, yv, wrapped = valid_batches.take(seq_len)  # (T, B) each
                            if wrapped:
                                hidden_valid = model.initial_hidden(arch_rows)
                            eta = torch.full((), lr, device=device)  # a number would be a graph of its own on CUDA
                            nll, norm, hidden, hidden_valid = quick_gradient(eta, x, y, hidden, xv, yv, hidden_valid)
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=device.type == "cpu")  # on CUDA they stay where graphs write them
                    progress.advance(nll, norm, (len(x), args.batch_size), lr)
                    watch.add(nll, norm)

                    if progress.step % args.log_interval == 0:
                        watch.check()
                        progress.close_interval(lr, rate=optimizer.param_groups[0]["lr"], **found())
                        run.log(str(derived()[0]))
                    if diagnosis and progress.step % args.diagnose_every == 0:
                        with progress.paused():
                            eta = optimizer.param_groups[0]["lr"]
                            signal = diagnosis.measure(progress.step, derived()[0], eta, velocity(optimizer))
                        progress.close_diagnosis(signal)
                    stopping, due = ranks.any(stop.requested, keeper.due())
                    if stopping or due:
                        judge()
                        keeper.keep(state())
                    if stopping:
                        return run.interrupted(ranks.command(parser.prog))

                judge()
                with averaged(optimizer):
                    loss = ranks.same(lambda: evaluate(model, valid, args.bptt, "valid"))
                    epoch, genotype = progress.epoch, derived()[0]
                    progress.close_epoch(loss, optimizer.param_groups[0]["lr"], **found())
                    hidden = model.initial_hidden(rows)
                    if loss < best:
                        best = loss
                        keeper.keep_best(state())
            except Diverged as fault:
                go_back(
                    fault, run, ranks, keeper, watch, schedule, progress, state, restore, args.backoff,
                    args.max_rollbacks,
                )  # fmt: skip
                # what was captured holds the old state of the alphas' optimizer
                quick_gradient = model.engine.replayed(gradient, device)
                continue
            run.log(str(genotype))
            schedule.close_epoch(loss)
            alphas_move = epoch > args.arch_start
            collapsed = alphas_move and identities(genotype) > args.max_identity
            if collapsed and history:
                stopped_by = "identity"
            else:
                history.append([epoch, to_json(genotype)])
                keep_genotype(epoch)
                if collapsed:
                    stopped_by = "identity"
                    run.log("the genotype of the first epoch is over --max_identity; there is none before it to keep")
                elif is_stable(history[args.arch_start :], args.stop_stable):
                    stopped_by = "stable"
                elif patience.is_over(loss):
                    stopped_by = "patience"
            if stopped_by:
                run.log(f"stopped by {stopped_by}")
            keeper.keep(state())
            if ranks.any(stop.requested)[0]:
                return run.interrupted(ranks.command(parser.prog))

    if not ranks.first:
        return 0
    epoch = history[-1][0]
    if stopped_by == "patience":
        chosen = checkpoint.load(run.folder / "best.pt")
        epoch = chosen["progress"]["epoch"] - 1
        model.load_state_dict(chosen["model"])
        architect.load_state_dict(chosen["arch_optimizer"])
        optimizer.state.clear()  # an average of later weights
        keep_genotype(epoch)
    with averaged(optimizer):
        valid_ppl = perplexity(evaluate(model, valid, args.bptt, "valid"))
        test_ppl = perplexity(evaluate(model, test, args.bptt, "test")) if args.test == "read" else None
    genotype = dict(history)[epoch]
    run.write("result.json", {
        "kind": "search", "epochs": progress.epoch - 1, "steps": progress.step, "seconds": progress.elapsed(),
        "params": params, "valid_ppl": valid_ppl, "test_ppl": test_ppl, "best_valid_ppl": perplexity(best),
        "genotype": genotype, "stopped_by": stopped_by or "epochs",
    })  # fmt: skip
    run.log(f"relaxed model: valid ppl {valid_ppl:.2f} | {told(test_ppl)}")
    run.log(f"found {from_json(genotype)}")
    run.log(f"retrain it with: python train.py --data {quote(args.data)} --arch {quote(str(run.folder))}")
    return 0


if __name__ == "__main__":
    sys.exit(start.run_script(main))
