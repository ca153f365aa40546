"""Where the two parts of an unrolled alpha gradient point, on a model that has learned.

    python train_search.py --data builtin --unrolled --emsize 64 --batch_size 32 --dropout 0.3 --dropoutx 0.3 \\
        --dropouth 0.1 --dropouti 0.1 --dropoute 0 --epochs 3 --save runs/mine
    python benchmarks/direction.py runs/mine                   # a minute on a CPU core

The implicit part is eta c d/d alpha (g . v), for the training gradient g, clipped by the factor c, and the validation
gradient v after the virtual step. It is split along g: that of v which is parallel to g asks for a larger |g|, since
d/d alpha (g . g) / 2 = |g| d/d alpha |g|. Where the clip holds c |g| at its limit, a larger |g| makes no larger step:
c is treated as a constant in the alpha gradient, and this is what that leaves in.

Prints, over a number of batches: the sizes of the parts, the mean cosine of each between batches, and what a step
against the gradient does to the logit of each primitive, in the mean over all edges.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

sys.path.insert(0, str(Path(__file__).parent.parent))

from hessian import Agreement

from experiment import signals
from architect import Architect
from genotypes import PRIMITIVES
from training.diagnostics import cosine


def parts_of(agreement: Agreement) -> tuple[dict[str, Tensor], float, float]:
    """By name the descent directions (N(N+1)/2, K) on the next batches; the cosine of v and g; and the clip's c."""
    train, valid = agreement.batches()
    architect, eta = agreement.kinds["exact"], agreement.flags.lr
    direct, implicit, _ = architect.gradient(train, valid, eta)
    v = architect.v
    g, product = Architect.exact_hvp(architect, train)
    dot, size = sum((a * b).sum() for a, b in zip(g, v, strict=True)), get_total_norm(g)
    _, c = architect.update.clip_([g_i.clone() for g_i in g])
    parallel = eta * c * product([dot / size**2 * g_i for g_i in g])
    directions = {
        "direct": -direct, "implicit": implicit, "of it, along g": parallel, "of it, the rest": implicit - parallel,
        "whole": implicit - direct,
    }  # fmt: skip
    return directions, (dot / size / get_total_norm(v)).item(), c.item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a search run")
    parser.add_argument("--batches", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    agreement = Agreement(args.run, "fp32")
    parts, alike, clips = zip(*(parts_of(agreement) for _ in range(args.batches)), strict=True)
    print(f"cosine of g and v: {sum(alike) / len(alike):.2f}; c: {sum(clips) / len(clips):.2f}")
    print(f"{'part':18}{'norm':>10}{'agreement':>11}  " + "".join(f"{name:>10}" for name in PRIMITIVES))
    for name in parts[0]:
        vectors = [directions[name] for directions in parts]
        norm = sum(v.norm().item() for v in vectors) / len(vectors)
        unit = sum(v.mean(0) / v.norm() for v in vectors) / len(vectors)  # (K,)
        print(f"{name:18}{norm:10.4f}{cosine(vectors):11.2f}  " + "".join(f"{value:10.3f}" for value in unit.tolist()))
    print(f"{'mean probability':39}  " + "".join(f"{p:10.3f}" for p in agreement.model.alphas.softmax(-1).mean(0)))
    return 0


if __name__ == "__main__":
    sys.exit(signals.run_script(main))
