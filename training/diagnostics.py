"""Measures, while a search runs, whether the gradient that its alphas follow contains a signal.

A measurement samples batches, masks and states of its own and changes nothing in the search: a search with
`--diagnose_every` takes exactly the steps of one without.
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
from engine import Engine
from engine.dropout import FrozenReLU, Masks
from engine.matmul import matmul_precision
from genotypes import PRIMITIVES, Genotype
from model_search import RNNModelSearch
from training.evaluation import evaluate
from training.losses import Batch, MicroBatches
from utils import get_batch

BATCHES = 3  # The alpha gradients of this many pairs of a training and a validation batch are compared.
MAX_BATCH_SIZE = 32  # A batch that is differentiated twice is no larger, since its whole graph is in memory.
SEGMENTS = 20  # The relaxed and the discretised model are compared on this many segments of validation text.
PRODUCTS = 20  # An eigenvalue is computed from at most this many Hessian-vector products.
PROBES = 4  # The sensitivity is estimated from this many random directions.
ONE_HOT_LOGIT = 50.0  # The softmax of this logit, where all others are 0, is 1 to the last digit of float32.


class Signal(NamedTuple):
    """Holds one measurement, in which None stands for a missing implicit part or for a number that is not finite."""

    cosine_direct: float | None  # the mean cosine between the direct parts of the gradients of independent batches
    cosine_implicit: float | None  # the same mean for the implicit parts
    cosine_whole: float | None  # the same mean for direct - implicit, which the alphas follow
    norm_ratio: float | None  # the mean ratio of the norm of the implicit part to that of the direct part
    product_cosine: float | None  # the cosine between the finite and the exact implicit part of one batch
    eigenvalue: float | None  # the eigenvalue of largest magnitude of the Hessian of L_valid in alpha
    sensitivity: float | None  # the root mean square growth of a small change of the state over one segment
    relaxed_loss: float | None  # the loss of the relaxed model in nats per word of validation text
    discrete_loss: float | None  # the same with the genotype in place of the mixture of primitives, at the same weights

    def __str__(self) -> str:
        return "signal: " + " | ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in self._asdict().items() if value is not None
        )


class Diagnosis:
    """Measures the signal of a search at its present weights.

    Args:
        model: the model that is searched, with the engine of the search.
        architect_of: a function of the model with some engine, the size of a micro-batch and the kind of
            Hessian-vector product, which returns an `Architect` with the search's own losses.
        hessian, micro_batch_size, bptt: those of the search; hessian is "finite", "exact", or None in first order.
        texts: the word ids (n, B) of the weights' text and of the alphas' text, both with the batch elements of this
            rank, and of the validation text.
        seed: the seed of everything that is sampled, after the step is added to it.
        seed_masks: a function that seeds the generator of the masks, which differ from rank to rank.
    """

    def __init__(
        self, model: RNNModelSearch, architect_of: Callable[[RNNModelSearch, int, str | None], Architect],
        hessian: str | None, texts: tuple[Tensor, Tensor, Tensor], micro_batch_size: int, bptt: int, seed: int,
        seed_masks: Callable[[int], None],
    ):  # fmt: skip
        self.model, self.hessian, self.bptt, self.seed, self.seed_masks = model, hessian, bptt, seed, seed_masks
        self.train, self.alphas_text, self.valid = texts
        self.batch_size = min(MAX_BATCH_SIZE, micro_batch_size)
        self.architect = architect_of(model, micro_batch_size, hessian)
        precise = model.with_engine(Engine(model.engine.name))  # The compared parts are small and need full precision.
        kinds = ("finite", "exact") if hessian else ()
        self.architect_by_hvp = {kind: architect_of(precise, self.batch_size, kind) for kind in kinds}

    def measure(
        self, step: int, genotype: Genotype, eta: float | Tensor, velocity: list[Tensor] | None = None
    ) -> Signal:
        """Returns the measurement of the alpha step that would follow now, with the arguments `eta` and `velocity` of
        `Architect.step`; `step` seeds what is sampled, `genotype` is that with which the search would end now."""
        cuda = [self.train.device] if self.train.is_cuda else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(self.seed + step)
            self.seed_masks(self.seed + step)
            rng = torch.Generator().manual_seed(self.seed + step)  # It is the same on every rank.
            agreement = self.agreement(rng, eta, velocity)
            with matmul_precision("fp32"):  # turns TF32 off; in bf16, `sensitivity` stays in bf16
                product_cosine = self.product_cosine(rng, eta, velocity)
                eigenvalue = dominant_eigenvalue(self.hessian_product(rng), self.model.alphas)
                change = sensitivity(self.model, self.batch(self.alphas_text, rng, self.batch_size))
            values = Signal(*agreement, product_cosine, eigenvalue, change, *self.relaxed_and_discrete_loss(genotype))
        return Signal(*(value if value is not None and math.isfinite(value) else None for value in values))

    def agreement(self, rng: torch.Generator, eta: float | Tensor, velocity: list[Tensor] | None) -> list[float | None]:
        """Returns the first four numbers of a `Signal`, which compare the alpha gradients of independent batches."""
        gradients = []
        for _ in range(BATCHES):
            train = self.batch(self.train, rng, freeze_relu=self.hessian == "finite")
            valid = self.batch(self.alphas_text, rng)
            gradients.append(self.architect.gradient(train, valid, eta, velocity)[:2])
        directs, implicits = zip(*gradients, strict=True)
        if self.hessian is None:
            return [cosine(directs), None, cosine(directs), None]
        whole = [direct - implicit for direct, implicit in gradients]
        ratio = mean((implicit.norm() / direct.norm()).item() for direct, implicit in gradients)
        return [cosine(directs), cosine(implicits), cosine(whole), ratio]

    def product_cosine(self, rng: torch.Generator, eta: float | Tensor, velocity: list[Tensor] | None) -> float | None:
        """Returns the cosine between two implicit parts of the same batch, one computed by a central difference and the
        other by differentiating twice; None in first order."""
        if self.hessian is None:
            return None
        train = self.batch(self.train, rng, self.batch_size, freeze_relu=True)
        valid = self.batch(self.alphas_text, rng, self.batch_size)
        return cosine(
            [architect.gradient(train, valid, eta, velocity)[1] for architect in self.architect_by_hvp.values()]
        )

    def hessian_product(self, rng: torch.Generator) -> Callable[[Tensor], Tensor]:
        """Returns the function v -> H v, both with the alphas' shape, for the Hessian H of L_valid in alpha on one
        batch without dropout. Its largest eigenvalue grows where a search collapses (Zela et al., ICLR 2020)."""
        batch = self.batch(self.alphas_text, rng, self.batch_size)._replace(masks=Masks())
        eager = self.model.with_engine(Engine("eager"))  # The fused engine has no such second derivative.
        alphas = self.model.alphas
        with requires_grad_only([alphas], of=[*self.model.weights(), alphas]):
            [loss] = MicroBatches(eager, batch, self.batch_size)
        [gradient] = torch.autograd.grad(loss.total, alphas, create_graph=True)
        return lambda v: torch.autograd.grad(gradient, alphas, v, retain_graph=True)[0]

    def relaxed_and_discrete_loss(self, genotype: Genotype) -> tuple[float, float]:
        """Returns the loss (nats per word) of the relaxed model, and its loss with the alphas of a genotype, at the
        same weights and norm, on the beginning of the validation text. (Without a norm, the mean over predecessors
        remains and shrinks the states of the genotype.)"""
        text, alphas = self.valid[: SEGMENTS * self.bptt + 1], self.model.alphas
        relaxed = evaluate(self.model, text, self.bptt, "the relaxed model")
        delta = one_hot_alphas(genotype).to(alphas) - alphas.detach()
        with perturbed([alphas], [delta]):
            return relaxed, evaluate(self.model, text, self.bptt, "the discretised model")

    def batch(
        self, text: Tensor, rng: torch.Generator, batch_size: int | None = None, freeze_relu: bool = False
    ) -> Batch:
        """Returns a random segment of the first `batch_size` columns of a text (n, B), or of all columns for None, with
        new masks and the state in which the segment before it ends. With `freeze_relu`, relu keeps one active set
        (`FrozenReLU`)."""
        text = text[:, :batch_size]
        lead = min(self.bptt, (len(text) - 1) // 2)
        start = int(torch.randint(max(1, len(text) - lead - self.bptt), (), generator=rng))
        hidden = self.model.initial_hidden(text.size(1))
        if lead:
            with torch.no_grad():
                _, hidden = self.model(text[start : start + lead], hidden)
        masks = self.model.sample_masks(text.size(1))
        x, y = get_batch(text, start + lead, self.bptt)
        return Batch(x, y, hidden, masks._replace(relu=FrozenReLU() if freeze_relu else None))


def sensitivity(model: RNNModelSearch, batch: Batch, probes: int = PROBES) -> float:
    """Returns the factor by which a small change of the state before a segment has grown at the end of the segment.

    It is the root mean square of |dh_T / dh_0 r| / |r| over random directions r, which is the Frobenius norm of the
    Jacobian dh_T / dh_0 (BH, BH) over sqrt(BH). It is estimated without dropout, from products of the transposed
    Jacobian with `probes` normally distributed vectors. Far above 1, the recurrence is chaotic (docs/signal.md); far
    below 1, it forgets the initial state.
    """
    hidden = batch.hidden.clone().requires_grad_()
    with requires_grad_only([], of=list(model.parameters())):
        hiddens, _ = model(batch.x, hidden)
        squares = []
        for _ in range(probes):
            [gradient] = torch.autograd.grad(hiddens[-1], hidden, torch.randn_like(hidden), retain_graph=True)
            squares.append(gradient.double().square().mean().item())
    return math.sqrt(mean(squares))


def cosine(gradients: Sequence[Tensor]) -> float:
    """Returns the mean cosine over all pairs of two or more gradients of the same shape."""
    of = partial(torch.cosine_similarity, dim=0)
    return mean(of(a.flatten(), b.flatten()).item() for a, b in combinations(gradients, 2))


def dominant_eigenvalue(product: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Returns the eigenvalue of largest magnitude of a symmetric matrix, given by its products with vectors, which have
    the shape of `like`; nan if a product is not finite. Lanczos's method computes it from at most `PRODUCTS` products,
    as the projection on a Krylov space with an orthonormal basis (Golub & Van Loan, section 10.1)."""
    basis, images = [], []
    image = torch.randn_like(like)
    for _ in range(min(PRODUCTS, like.numel())):
        vector = image.flatten().double()
        size = vector.norm()
        for _ in range(2):  # After the first pass, rounding errors along the basis remain.
            for q in basis:
                vector = vector - (q @ vector) * q
        if not vector.norm() > 1e-6 * size:
            break  # The space is invariant, so that further products would add nothing to it.
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


def one_hot_alphas(genotype: Genotype) -> Tensor:
    """Returns alphas (N(N+1)/2, K) whose softmax is 1 for the genotype's primitive on each of its edges, and for `none`
    on all other edges."""
    choices = []
    for i, (op, predecessor) in enumerate(genotype.recurrent, start=1):
        choices += [PRIMITIVES.index(op if j == predecessor else "none") for j in range(i)]
    return ONE_HOT_LOGIT * torch.nn.functional.one_hot(torch.tensor(choices), len(PRIMITIVES)).float()
