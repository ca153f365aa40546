"""Is there a signal? What a search can be asked about the gradient that its alphas follow, while it runs.

A measurement draws batches, masks and states of its own and leaves no trace: a search with `--diagnose_every` takes
the very steps of one without.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor

from architect import Architect, perturbed, requires_grad_only
from data import get_batch
from engine import Engine
from engine.dropout import FrozenReLU, Masks
from engine.matmul import matmul_precision
from genotypes import PRIMITIVES, Genotype
from model_search import RNNModelSearch
from training.evaluation import evaluate
from training.losses import Batch, MicroBatches

BATCHES = 3  # pairs of a training and a validation batch whose alpha gradients are compared
ROWS = 32  # of a batch for what is differentiated twice, which holds its whole graph
SEGMENTS = 20  # of validation text for the gap between the relaxed and the discretised model
PRODUCTS = 20  # Hessian-vector products for an eigenvalue
PROBES = 4  # random directions for the sensitivity
ONE_HOT_LOGIT = 50.0  # a logit that softmax makes 1 of, to the last digit of float32


class Signal(NamedTuple):
    """One measurement; None where there is no such part, or no finite number."""

    cosine_direct: float | None  # mean cosine between the alpha gradients of independent batches
    cosine_implicit: float | None
    cosine_whole: float | None  # of direct - implicit, what the alphas follow
    norm_ratio: float | None  # implicit to direct
    product_cosine: float | None  # of the finite to the exact implicit part, on one batch
    eigenvalue: float | None  # of the Hessian of L_valid in alpha, the largest in magnitude
    sensitivity: float | None  # root mean square growth of a small change of the state over one segment
    relaxed_loss: float | None  # nats per word of validation text
    discrete_loss: float | None  # with the genotype in the place of the mixture, same weights

    def __str__(self) -> str:
        return "signal: " + " | ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in self._asdict().items() if value is not None
        )


class Diagnosis:
    """Measures a search at its present weights.

    Args:
        model: behind the engine that searches.
        architect_of: the model behind some engine, rows of a batch at a time and kind of product (None in first order)
            -> an Architect on its weights and alphas with the search's own losses.
        hessian: the kind that the search takes.
        texts: word ids of the weights' and the alphas' text, (n, B) with the rows of this rank, and of validation.
        rows_at_once: of a batch, as the search takes them.
        bptt: length of every segment.
        seed: of what is drawn, with the step.
        seed_masks: seeds the generator of the masks, which are other ones on every rank.
    """

    def __init__(
        self,
        model: RNNModelSearch,
        architect_of: Callable[[RNNModelSearch, int, str | None], Architect],
        hessian: str | None,
        texts: tuple[Tensor, Tensor, Tensor],
        micro_batch_size: int,
        bptt: int,
        seed: int,
        seed_masks: Callable[[int], None],
    ):
        self.model, self.hessian, self.bptt, self.seed, self.seed_masks = model, hessian, bptt, seed, seed_masks
        self.train, self.alphas_text, self.valid = texts
        self.rows = min(ROWS, micro_batch_size)
        self.architect = architect_of(model, micro_batch_size, hessian)
        precise = model.with_engine(Engine(model.engine.name))  # what is compared is small
        kinds = ("finite", "exact") if hessian else ()
        self.by_product = {kind: architect_of(precise, self.rows, kind) for kind in kinds}

    def measure(
        self, step: int, genotype: Genotype, eta: float | Tensor, velocity: list[Tensor] | None = None
    ) -> Signal:
        """At the alpha step that would follow now; `step` seeds what is drawn, `genotype` is what the search would end
        with, eta and velocity as in `Architect`."""
        cuda = [self.train.device] if self.train.is_cuda else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(self.seed + step)
            self.seed_masks(self.seed + step)
            rng = torch.Generator().manual_seed(self.seed + step)  # the same on every rank
            agreement = self.agreement(rng, eta, velocity)
            with matmul_precision("fp32"):  # whatever the search takes
                product_cosine = self.product_cosine(rng, eta, velocity)
                eigenvalue = dominant_eigenvalue(self.hessian_product(rng), self.model.alphas)
                change = sensitivity(self.model, self.batch(self.alphas_text, rng, self.rows))
            found = Signal(*agreement, product_cosine, eigenvalue, change, *self.discretization_gap(genotype))
        return Signal(*(value if value is not None and math.isfinite(value) else None for value in found))

    def agreement(self, rng: torch.Generator, eta: float | Tensor, velocity: list[Tensor] | None) -> list[float | None]:
        """How alike the alpha gradients of independent batches are: the first four of a `Signal`."""
        found = []
        for _ in range(BATCHES):
            train = self.batch(self.train, rng, held=self.hessian == "finite")
            valid = self.batch(self.alphas_text, rng)
            found.append(self.architect.gradient(train, valid, eta, velocity)[:2])
        directs, implicits = zip(*found, strict=True)
        if self.hessian is None:
            return [cosine(directs), None, cosine(directs), None]
        whole = [direct - implicit for direct, implicit in found]
        ratio = mean((implicit.norm() / direct.norm()).item() for direct, implicit in found)
        return [cosine(directs), cosine(implicits), cosine(whole), ratio]

    def product_cosine(self, rng: torch.Generator, eta: float | Tensor, velocity: list[Tensor] | None) -> float | None:
        """Of the implicit part by a central difference to the one by differentiating twice, on the same batch."""
        if self.hessian is None:
            return None
        train = self.batch(self.train, rng, self.rows, held=True)
        valid = self.batch(self.alphas_text, rng, self.rows)
        return cosine([architect.gradient(train, valid, eta, velocity)[1] for architect in self.by_product.values()])

    def hessian_product(self, rng: torch.Generator) -> Callable[[Tensor], Tensor]:
        """v -> H v, both with the alphas' shape, for H the Hessian of L_valid in alpha on one batch without dropout
        (whose largest eigenvalue grows where a search collapses: Zela et al., ICLR 2020)."""
        batch = self.batch(self.alphas_text, rng, self.rows)._replace(masks=Masks())
        eager = self.model.with_engine(Engine("eager"))  # the engine that differentiates twice
        alphas = self.model.alphas
        with requires_grad_only([alphas], of=[*self.model.weights(), alphas]):
            [loss] = MicroBatches(eager, batch, self.rows)
        [gradient] = torch.autograd.grad(loss.total, alphas, create_graph=True)
        return lambda v: torch.autograd.grad(gradient, alphas, v, retain_graph=True)[0]

    def discretization_gap(self, genotype: Genotype) -> tuple[float, float]:
        """Loss (nats per word) of the relaxed model and of the one that a genotype makes of it, with the same weights
        and norm, over the beginning of the validation text. (Without a norm the mean over predecessors is left in, and
        shrinks the genotype's states.)"""
        text, alphas = self.valid[: SEGMENTS * self.bptt + 1], self.model.alphas
        relaxed = evaluate(self.model, text, self.bptt, "the relaxed model")
        certain = logits(genotype).to(alphas) - alphas.detach()
        with perturbed([alphas], [certain]):
            return relaxed, evaluate(self.model, text, self.bptt, "the discretised model")

    def batch(self, text: Tensor, rng: torch.Generator, rows: int | None = None, held: bool = False) -> Batch:
        """A segment from anywhere in a text (n, B), its first `rows` columns, with fresh masks and the state in which
        the segment before it ends; `held` for relu's active set."""
        text = text[:, :rows]
        lead = min(self.bptt, (len(text) - 1) // 2)
        start = int(torch.randint(max(1, len(text) - lead - self.bptt), (), generator=rng))
        hidden = self.model.initial_hidden(text.size(1))
        if lead:
            with torch.no_grad():
                _, hidden = self.model(text[start : start + lead], hidden)
        masks = self.model.sample_masks(text.size(1))
        x, y = get_batch(text, start + lead, self.bptt)
        return Batch(x, y, hidden, masks._replace(relu=FrozenReLU() if held else None))


def sensitivity(model: RNNModelSearch, batch: Batch, probes: int = PROBES) -> float:
    """How a small change of the state before a segment has grown at its end: the root of the mean square of
    |dh_T / dh_0 r| / |r| over random directions r, which is the Frobenius norm of that Jacobian (BH, BH) over sqrt(BH).

    Estimated without dropout by products of its transpose with `probes` normally distributed vectors. Above 1 by orders
    of magnitude, the recurrence is chaotic: what it computes depends on how it began, and a gradient through it on the
    batch at hand. Far below 1 it forgets.
    """
    hidden = batch.hidden.clone().requires_grad_()
    with requires_grad_only([], of=list(model.parameters())):
        hiddens, _ = model(batch.x, hidden)
        squares = []
        for _ in range(probes):
            [found] = torch.autograd.grad(hiddens[-1], hidden, torch.randn_like(hidden), retain_graph=True)
            squares.append(found.double().square().mean().item())
    return math.sqrt(mean(squares))


def cosine(gradients: Sequence[Tensor]) -> float:
    """Mean over all pairs."""
    of = partial(torch.cosine_similarity, dim=0)
    return mean(of(a.flatten(), b.flatten()).item() for a, b in combinations(gradients, 2))


def dominant_eigenvalue(product: Callable[[Tensor], Tensor], like: Tensor, steps: int = PRODUCTS) -> float:
    """The eigenvalue of largest magnitude of a symmetric matrix that is known by its products with vectors of the shape
    of `like`: Lanczos's method, as the projection on a Krylov space with an orthonormal basis (Golub & Van Loan,
    section 10.1)."""
    basis, images = [], []
    image = torch.randn_like(like)
    for _ in range(min(steps, like.numel())):
        vector = image.flatten().double()
        size = vector.norm()
        for _ in range(2):  # once leaves what rounding made of it
            for q in basis:
                vector = vector - (q @ vector) * q
        if not vector.norm() > 1e-6 * size:
            break  # the space is invariant: nothing more is in it
        basis.append(vector / vector.norm())
        image = product(basis[-1].to(like).view_as(like))
        images.append(image.flatten().double())
    if not basis:
        return 0.0
    projected = torch.stack(basis) @ torch.stack(images).T
    if not projected.isfinite().all():
        return math.nan
    values = torch.linalg.eigvalsh((projected + projected.T) / 2)
    return values[values.abs().argmax()].item()


def logits(genotype: Genotype) -> Tensor:
    """Alphas (N(N+1)/2, K) whose softmax is the genotype: its primitive on each of its edges, `none` on all others."""
    rows = []
    for i, (op, predecessor) in enumerate(genotype.recurrent, start=1):
        rows += [PRIMITIVES.index(op if j == predecessor else "none") for j in range(i)]
    return ONE_HOT_LOGIT * torch.nn.functional.one_hot(torch.tensor(rows), len(PRIMITIVES)).float()
