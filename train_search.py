"""Search a recurrent cell by gradient descent: weights on the training text, alphas on the validation text.

    python train_search.py --unrolled                                  # published setting; wants a GPU
    python train_search.py --data builtin --emsize 64 --batch_size 32 --lr 5 --epochs 2 --unrolled

The published code took 4 h 21 min on a V100 for the first; the second takes two to three minutes on a CPU. Both
end with a genotype in the run directory; `python train.py --arch RUN` retrains it.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from shlex import quote

import torch
from torch import Tensor

import checkpoint
import options
import start
from architect import RADIUS, Architect
from data import Corpus, Cursor, batchify, get_batch, segments
from divergence import Watch, back_off, count_rollback
from dropout import HeldRelu, Rates
from engine import Engine
from genotypes import to_json
from graphs import Graphs
from kernels import products_in
from model_search import RNNModelSearch
from objective import VALID_ROWS, Batch, evaluate, scaled_lr, small_batch_losses, weight_step
from progress import Progress, perplexity
from utils import Diverged, StopSignal, choose_device

# The relaxed cell normalises by the statistics of the batch, and a batch of one has none: the test text is
# read in as many rows as the validation text, where a discrete cell reads it in one.
EVAL_ROWS = {"valid": VALID_ROWS, "test": VALID_ROWS}
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
        help="with --unrolled, how the product with the mixed second derivative is formed: by a central difference "
        f"at radius {RADIUS:g} with relu's active set held, or exact by differentiating twice. Over 20 batches of "
        "Penn Treebank the cosine of the two has a median of 1.0000 and a lowest value of 0.997 "
        "(benchmarks/hessian.py). The exact product needs --engine eager for itself, and its time and memory",
    )
    search.add_argument(
        "--search_split",
        choices=("valid", "train"),
        default="valid",
        help="text for the alphas: valid.txt, as published, or the last tenth of train.txt, which "
        "leaves valid.txt unseen for choosing",
    )
    search.add_argument("--arch_lr", type=float, default=3e-3, help="learning rate of Adam on the alphas")
    search.add_argument("--arch_wdecay", type=float, default=1e-3, help="weight decay of the alphas")
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
    )
    return parser


def search_texts(corpus: Corpus, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Word ids for the weights and for the alphas."""
    if split == "valid":
        return corpus.train, corpus.valid
    held_out = int(HELD_OUT * len(corpus.train))
    return corpus.train[:-held_out], corpus.train[-held_out:]


def texts_to_read(corpus: Corpus, args: Namespace) -> dict[str, tuple[torch.Tensor, int]]:
    """Word ids and the number of rows that they are cut into, by name."""
    train, alphas = search_texts(corpus, args.search_split)
    return {
        "train": (train, args.batch_size),
        "the alphas": (alphas, args.batch_size),
        "valid": (corpus.valid, EVAL_ROWS["valid"]),
        "test": (corpus.test, EVAL_ROWS["test"]),
    }


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args, corpus, run, saved = start.begin("search", parser, argv, texts_to_read)
    device = choose_device(args.device, args.deterministic)
    torch.manual_seed(args.seed)
    bptt_rng = torch.Generator().manual_seed(args.seed)
    # (n, B) each; the alphas' text has a cursor of its own
    train, alphas_text, valid, test = (
        batchify(ids, rows).to(device) for ids, rows in texts_to_read(corpus, args).values()
    )
    valid_batches = Cursor(alphas_text)

    rates = Rates(**{name: getattr(args, name) for name in Rates._fields})
    model = RNNModelSearch(len(corpus.words), args.emsize, rates).to(device)
    model = model.using(Engine(args.engine, args.precision))
    weights = model.weights()
    params = sum(w.numel() for w in weights)
    optimizer = torch.optim.SGD(weights, lr=args.lr, weight_decay=args.wdecay)
    # A difference of nearby weights needs every digit, the exact product an engine that differentiates twice.
    precise = model.using(Engine("eager" if args.hessian == "exact" else args.engine))
    parts = {"small_batch_size": args.small_batch_size}
    regularised = {**parts, "alpha": args.alpha, "beta": args.beta}
    valid_loss = partial(small_batch_losses, model, **parts)
    train_loss, product_loss = (partial(small_batch_losses, m, **regularised) for m in (model, precise))
    architect = Architect(
        weights, model.alphas, train_loss, valid_loss, product_loss, clip=args.clip, wdecay=args.wdecay,
        hessian=args.hessian if args.unrolled else None, lr=args.arch_lr, arch_wdecay=args.arch_wdecay,
    )  # fmt: skip

    def step(eta: float, x: Tensor, y: Tensor, hidden: Tensor, xv: Tensor, yv: Tensor, hidden_valid: Tensor):
        """One step of the search (DARTS, algorithm 1): the alphas on validation text, the weights on training text."""
        held = model.draw_masks(args.batch_size)._replace(relu=HeldRelu())  # over every pass
        hidden_valid = architect.step(
            train=Batch(x, y, hidden, held),
            valid=Batch(xv, yv, hidden_valid, model.draw_masks(args.batch_size)),
            eta=eta,
        )
        batch = Batch(x, y, hidden, model.draw_masks(args.batch_size))
        nll, hidden, norm = weight_step(train_loss(batch), weights, optimizer, args.clip)
        return nll, norm, hidden, hidden_valid

    def quick() -> Callable:
        return Graphs(step, device) if precise.engine.name == "fused" else step

    hidden = hidden_valid = model.initial_hidden(args.batch_size)  # (B, H)
    best = float("inf")  # validation loss
    history = []  # [epoch, genotype] at the end of each epoch
    rollbacks, watch = 0, Watch(device, len(corpus.words))
    progress = Progress(run, device, args.epochs, len(train) - 1)
    keeper = checkpoint.Keeper(run.folder, args.checkpoint_minutes)

    def state() -> dict:
        return {
            **start.identity("search", args, corpus), "eval_rows": EVAL_ROWS, "genotype": to_json(model.genotype()),
            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "arch_optimizer": architect.optimizer.state_dict(), "rng": checkpoint.rng_state(device, bptt_rng),
            "progress": progress.state_dict(), "hidden": hidden, "hidden_valid": hidden_valid,
            "valid_position": valid_batches.position, "best": best, "history": history,
            "watch": watch.state_dict(), "rollbacks": rollbacks,
        }  # fmt: skip

    def restore(saved: dict) -> None:
        nonlocal hidden, hidden_valid, best, history, rollbacks
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        architect.load_state_dict(saved["arch_optimizer"])
        hidden, hidden_valid = (saved[name].to(device) for name in ("hidden", "hidden_valid"))
        valid_batches.position, best, history = saved["valid_position"], saved["best"], saved["history"]
        rollbacks = saved["rollbacks"]
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
            form = {**state(), "history": [[1, to_json(model.genotype())]]}
            start.check_state(saved, form, {"optimizer": optimizer, "arch_optimizer": architect.optimizer})
            checkpoint.set_rng_state(saved["rng"], device, bptt_rng)
            restore(saved)
    run.configure(parser.prog, args, device, corpus.sha256, finished=progress.epoch > args.epochs)
    if saved:
        run.log(f"resumed at epoch {progress.epoch}, step {progress.step}")
    else:
        run.log(f"search in {run.folder} on {device}: {params:,} weights, {model.alphas.numel()} alphas,"
                f" {start.describe(corpus)}")  # fmt: skip
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
                    xv, yv, wrapped = valid_batches.take(seq_len)  # (T, B)
                    if wrapped:
                        hidden_valid = model.initial_hidden(args.batch_size)
                    with scaled_lr(optimizer, seq_len / args.bptt) as eta:
                        nll, norm, hidden, hidden_valid = take_step(eta, x, y, hidden, xv, yv, hidden_valid)
                    progress.advance(nll, x.shape, eta)
                    watch.add(nll, norm)

                    if progress.step % args.log_interval == 0:
                        watch.check()
                        genotype = model.genotype()
                        progress.close_interval(eta, genotype=to_json(genotype))
                        run.log(str(genotype))
                    stopping = stop.requested
                    if stopping or keeper.due():
                        judge()
                        keeper.keep(state())
                    if stopping:
                        return run.interrupted(parser.prog)

                judge()
                loss = evaluate(model, valid, args.bptt, "valid")
                epoch, genotype = progress.epoch, model.genotype()
                progress.close_epoch(loss, optimizer.param_groups[0]["lr"], genotype=to_json(genotype))
            except Diverged as fault:
                go_back(fault)
                take_step = quick()  # what was captured holds the optimizer's old state
                continue
            run.log(str(genotype))
            run.write("genotype.json", {
                "genotype": to_json(genotype), "text": str(genotype), "epoch": epoch,
                "probabilities": model.alphas.softmax(-1).tolist(),
            })  # fmt: skip
            history.append([epoch, to_json(genotype)])
            hidden = model.initial_hidden(args.batch_size)
            if loss < best:
                best = loss
                checkpoint.save(state(), run.folder / "best.pt")
            keeper.keep(state())
            if stop.requested:
                return run.interrupted(parser.prog)

    valid_ppl = perplexity(evaluate(model, valid, args.bptt, "valid"))
    test_ppl = perplexity(evaluate(model, test, args.bptt, "test"))
    genotype = model.genotype()
    run.write("result.json", {
        "kind": "search", "epochs": progress.epoch - 1, "steps": progress.step, "seconds": progress.elapsed(),
        "params": params, "valid_ppl": valid_ppl, "test_ppl": test_ppl, "best_valid_ppl": perplexity(best),
        "genotype": to_json(genotype), "stopped_by": "epochs",
    })  # fmt: skip
    run.log(f"relaxed model: valid ppl {valid_ppl:.2f} | test ppl {test_ppl:.2f}")
    run.log(f"found {genotype}")
    run.log(f"retrain it with: python train.py --data {quote(args.data)} --arch {quote(str(run.folder))}")
    return 0


if __name__ == "__main__":
    sys.exit(start.run_script(main))
