"""Search a recurrent cell by gradient descent: weights on the training text, alphas on the validation text.

    python train_search.py --unrolled                                  # published setting; wants a GPU
    python train_search.py --data builtin --emsize 64 --batch_size 32 --epochs 4

The published code took 4 h 21 min on a V100 for the first; the second takes a minute on a CPU. Both
end with a genotype in the run directory; `python train.py --arch RUN` retrains it.
"""

import sys
from functools import partial
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from architect import Architect
from data import Cursor, batchify, get_batch, segments
from engine import Engine
from engine.dropout import HeldRelu, Rates
from engine.matmul import products_in
from experiment import arguments, checkpoint, resume, signals, startup
from experiment.distributed import Ranks
from experiment.divergence import Watch, go_back
from experiment.progress import Progress
from experiment.search_arguments import build_parser, eval_rows, texts_to_read
from experiment.signals import StopSignal
from genotypes import Genotype, from_json, to_json
from model_search import RNNModelSearch
from training.diagnostics import Diagnosis
from training.early_stopping import Patience, check_history, identities, is_stable
from training.evaluation import evaluate, perplexity, told
from training.gradients import clipped_gradient, scaled_lr
from training.losses import Batch, SmallBatches
from training.optimizers import averaged, new_optimizer, velocity
from training.overfit import overfit
from utils import Diverged, choose_device

REASONS = ("patience", "stable", "identity")  # to stop before the last epoch


def main(argv: list[str] | None = None) -> int:
    ranks = Ranks()
    parser = build_parser()
    args, corpus, run, saved = startup.begin("search", parser, argv, texts_to_read, ranks)
    if args.tensorboard and ranks.first:
        from plots.tensorboard import Mirror  # needs more than the scripts do

        run.mirror = Mirror(run.folder, vars(args))
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
    schedule, patience = arguments.schedule(args), Patience(args.patience, args.min_delta)
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
        model, architect_of, hessian, (train, valid_batches.source, valid), rows_at_once, args.bptt, args.seed,
        ranks.seed,
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
            **resume.identity("search", args, corpus, ranks.size), "eval_rows": eval_rows(args.norm),
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
        with resume.restoring(parser, run):
            form = {**state(), "history": [[1, to_json(derived()[0])]]}
            resume.check_state(saved, form, REASONS, {"optimizer": optimizer, "arch_optimizer": architect.optimizer})
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
                f" {startup.describe(corpus, args.limit_tokens)}")  # fmt: skip
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
    sys.exit(signals.run_script(main))
