"""The gradient of the alphas matches brute force in float64, and each error of the published code is avoided."""

from functools import partial

import pytest
import tiny
import torch
from torch.func import functional_call

import train_search
from architect import Architect, WeightUpdate, perturbed
from engine.dropout import FrozenReLU
from training.losses import MicroBatches, clipped_gradient, losses
from training.optimizers import LIKE_SGD, new_optimizer, velocity

ETA, CLIP, WDECAY, AR, TAR = 0.7, 0.25, 1e-2, 0.4, 0.9


class LossModule(torch.nn.Module):
    """Wraps the loss in a module, so that `functional_call` can replace its weights."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, alpha=0.0, beta=0.0):
        return losses(self.model, batch, alpha, beta).total


def parameters(model):
    """Returns the weights by name and the name of the alphas, for `functional_call`."""
    named = {f"model.{name}": p for name, p in model.named_parameters()}
    alphas = next(name for name, p in named.items() if p is model.alphas)
    return {name: p for name, p in named.items() if name != alphas}, alphas


def brute_force(model, train, valid, eta, clip, wdecay, alpha=AR, beta=TAR, limit=float("inf"), velocity=None):
    """Returns d/d alpha L_valid(w - eta (c g(alpha) + wdecay w + velocity), alpha), by differentiating through g.

    The elements of g are clipped to magnitude `limit`.
    """
    module, (weights, alphas_name) = LossModule(model), parameters(model)
    alphas = model.alphas.detach().clone().requires_grad_()
    train_loss = functional_call(module, {**weights, alphas_name: alphas}, (train, alpha, beta))
    g = torch.autograd.grad(train_loss, list(weights.values()), create_graph=True)
    g = [torch.where(g_i.abs() <= limit, g_i, limit * g_i.sign().detach()) for g_i in g]
    norm = torch.cat([g_i.detach().flatten() for g_i in g]).norm()
    c = min(1.0, clip / (norm.item() + 1e-6))
    velocities = velocity or [torch.zeros_like(w) for w in weights.values()]
    stepped = {
        name: w - eta * (c * g_i + wdecay * w + k)
        for (name, w), g_i, k in zip(weights.items(), g, velocities, strict=True)
    }
    valid_loss = functional_call(module, {**stepped, alphas_name: alphas}, (valid,))
    return torch.autograd.grad(valid_loss, alphas)[0]


def architect(
    model, hessian="exact", clip=CLIP, clip_value=0.0, small=tiny.B, train_loss=None, valid_loss=None, **options
):
    valid_loss = valid_loss or partial(MicroBatches, model, micro_batch_size=small)
    train_loss = train_loss or partial(MicroBatches, model, micro_batch_size=small, alpha=AR, beta=TAR)
    return Architect(
        model.weights(),
        model.alphas,
        train_loss,
        valid_loss,
        update=WeightUpdate(clip, clip_value, WDECAY),
        hessian=hessian,
        **options,
    )


def unrolled_gradient(actual):
    direct, implicit, _ = actual
    return direct - implicit


@pytest.fixture
def model():
    return tiny.search_model()


@pytest.fixture
def batches(model):
    return tiny.batch(model, 1), tiny.batch(model, 2)


@pytest.mark.parametrize("clip", [CLIP, 1e6])
def test_unrolled_gradient_matches_brute_force(model, batches, clip):
    """Dropout with fixed masks, AR and TAR are on. The cases are with and without clipping."""
    actual = unrolled_gradient(architect(model, clip=clip).gradient(*batches, ETA))
    expected = brute_force(model, *batches, ETA, clip, WDECAY)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("clip", "limit"), [(0, 0.01), (0.02, 0.01), (1e6, 0.1)])
def test_unrolled_gradient_with_clipped_elements_matches_brute_force(model, batches, clip, limit):
    actual = architect(model, clip=clip, clip_value=limit).gradient(*batches, ETA)
    expected = brute_force(model, *batches, ETA, clip or 1e9, WDECAY, limit=limit)
    torch.testing.assert_close(unrolled_gradient(actual), expected, rtol=1e-9, atol=1e-12)
    free = unrolled_gradient(architect(model, clip=clip).gradient(*batches, ETA))
    assert not torch.allclose(free, expected, rtol=1e-3)


def test_implicit_part_is_zero_when_every_element_is_clipped(model, batches):
    for hessian in ("exact", "finite"):
        _, implicit, _ = architect(model, hessian, clip=0, clip_value=1e-12).gradient(*batches, ETA)
        assert torch.equal(implicit, torch.zeros_like(implicit))


def test_unrolled_gradient_with_momentum_matches_brute_force(model, batches):
    velocity = [torch.randn_like(w) for w in model.weights()]
    actual = architect(model).gradient(*batches, ETA, velocity)
    expected = brute_force(model, *batches, ETA, CLIP, WDECAY, velocity=velocity)
    torch.testing.assert_close(unrolled_gradient(actual), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LIKE_SGD)
@pytest.mark.parametrize(("clip", "limit"), [(CLIP, 0.0), (0.0, 0.01)])
def test_virtual_step_matches_optimizer_step(model, batches, name, clip, limit):
    """The comparison covers three steps, so that momentum and averages are not zero."""
    weights, seen = model.weights(), []
    update = WeightUpdate(clip, limit, WDECAY)
    optimizer = new_optimizer(name, weights, ETA, update)

    def valid_loss(batch):
        seen.append([w.detach().clone() for w in weights])
        return MicroBatches(model, batch, tiny.B)

    unrolled = architect(model, clip=clip, clip_value=limit, valid_loss=valid_loss)
    for train in (batches[0], batches[1], batches[0]):
        unrolled.gradient(train, batches[1], ETA, velocity(optimizer))
        clipped_gradient(MicroBatches(model, train, tiny.B, alpha=AR, beta=TAR), weights, update)
        optimizer.step()
        optimizer.zero_grad()
        # The tolerance allows for ASGD, which stores its rates in fp32.
        torch.testing.assert_close(seen.pop(), [w.detach() for w in weights], rtol=1e-6, atol=1e-7)


def test_unrolled_gradient_matches_central_differences(model, batches):
    """The expected value is a central difference of the whole procedure, without automatic differentiation in alpha."""
    train, valid = batches
    module, (weights, alphas_name) = LossModule(model), parameters(model)

    def gradient_of_weights(alphas):
        loss = functional_call(module, {**weights, alphas_name: alphas}, (train, AR, TAR))
        return torch.autograd.grad(loss, list(weights.values()))

    _, c = WeightUpdate(CLIP).clip_(list(gradient_of_weights(model.alphas.detach())))

    def after_the_step(alphas):
        g = gradient_of_weights(alphas)
        stepped = {n: w - ETA * (c * g_i + WDECAY * w) for (n, w), g_i in zip(weights.items(), g, strict=True)}
        return functional_call(module, {**stepped, alphas_name: alphas}, (valid,)).item()

    actual = unrolled_gradient(architect(model).gradient(train, valid, ETA))
    h = 1e-5
    for index in [(0, 1), (1, 2), (2, 0), (3, 4), (5, 3)]:
        delta = torch.zeros_like(model.alphas)
        delta[index] = h
        slope = (after_the_step(model.alphas + delta) - after_the_step(model.alphas - delta)) / (2 * h)
        assert actual[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_first_order_gradient_is_the_validation_gradient(model, batches):
    direct, implicit, hidden = architect(model, hessian=None).gradient(*batches, ETA)
    loss = losses(model, batches[1])
    assert implicit is None
    torch.testing.assert_close(direct, torch.autograd.grad(loss.total, model.alphas)[0])
    torch.testing.assert_close(hidden, loss.hidden)


def test_finite_product_converges_to_exact_as_radius_shrinks(model, batches):
    exact = architect(model).gradient(*batches, ETA)[1]
    errors = [
        (architect(model, "finite", radius=radius).gradient(*batches, ETA)[1] - exact).norm() / exact.norm()
        for radius in (1e-3, 1e-4, 1e-5)
    ]
    assert errors[2] < 1e-5
    assert errors[0] > errors[1] > errors[2]


def test_finite_difference_error_is_second_order_with_frozen_relu(model, batches):
    """With the active set of relu frozen, the error is of second order in the radius, as for a smooth function."""
    train, valid = batches
    exact = architect(model).gradient(train, valid, ETA)[1]

    def error(relu, radius):
        frozen = train._replace(masks=train.masks._replace(relu=relu))
        actual = architect(model, "finite", radius=radius).gradient(frozen, valid, ETA)[1]
        return ((actual - exact).norm() / exact.norm()).item()

    wide, narrow = (error(FrozenReLU(), radius) for radius in (1e-2, 1e-3))
    assert narrow < 1e-4
    assert 50 < wide / narrow < 200
    assert error(None, 1e-2) > 10 * wide


@pytest.mark.parametrize("small", [tiny.B, tiny.B // 2])
def test_frozen_relu_is_bit_identical_at_unchanged_weights(model, batches, small):
    frozen = batches[0]._replace(masks=batches[0].masks._replace(relu=FrozenReLU()))
    weights = model.weights()
    for _ in range(2):  # the first pass records the active set, and the second one reuses it
        for free, fixed in zip(*(MicroBatches(model, b, small) for b in (batches[0], frozen)), strict=True):
            assert torch.equal(free.total, fixed.total)
            pairs = zip(*(torch.autograd.grad(loss.total, weights) for loss in (free, fixed)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("hessian", ["finite", "exact"])
def test_all_passes_use_the_same_dropout_masks(model, batches, hessian):
    """The published code samples new dropout masks in each pass; here no pass samples any."""
    before = torch.get_rng_state()
    first = unrolled_gradient(architect(model, hessian).gradient(*batches, ETA))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(unrolled_gradient(architect(model, hessian).gradient(*batches, ETA)), first)
    other = batches[0]._replace(masks=model.sample_masks(tiny.B)), batches[1]
    assert not torch.allclose(unrolled_gradient(architect(model, hessian).gradient(*other, ETA)), first)


def test_virtual_step_moves_every_weight(model, batches):
    """The published code leaves out the tied embedding; here the validation pass sees every weight after the step."""
    train, valid = batches
    weights = model.weights()
    before = [w.detach().clone() for w in weights]
    g = torch.autograd.grad(losses(model, train, AR, TAR).total, weights)
    c = min(1.0, CLIP / (torch.cat([g_i.flatten() for g_i in g]).norm().item() + 1e-6))
    seen = []

    def valid_loss(batch):
        seen.extend(w.detach().clone() for w in weights)
        return MicroBatches(model, batch, tiny.B)

    architect(model, valid_loss=valid_loss).gradient(train, valid, ETA)
    assert any(w is model.embedding for w in weights)
    assert len(seen) == len(weights)
    for old, new, g_i in zip(before, seen, g, strict=True):
        torch.testing.assert_close(new, old - ETA * (c * g_i + WDECAY * old), rtol=1e-12, atol=1e-14)
        assert not torch.equal(new, old)


def test_clip_coefficient_is_at_most_one():
    """The published code scales up small gradients. Large gradients are scaled as in the weight step."""
    assert WeightUpdate(0.25).clip_([torch.tensor([1e-3, 0.0])])[1].item() == 1.0
    w = torch.nn.Parameter(torch.zeros(5))
    w.grad = torch.arange(5.0)
    clipped = [w.grad.clone()]
    norm, c = WeightUpdate(0.25).clip_(clipped)
    torch.testing.assert_close(clipped, [w.grad * c])
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_([w], 0.25))
    torch.testing.assert_close(clipped, [w.grad])


def test_virtual_step_loss_includes_tar(model, batches):
    """The published code leaves TAR out of the loss of the virtual step."""
    actual = unrolled_gradient(architect(model).gradient(*batches, ETA))
    without = brute_force(model, *batches, ETA, CLIP, WDECAY, alpha=AR, beta=0.0)
    assert (actual - without).norm() > 1e-3 * actual.norm()


@pytest.mark.parametrize(
    ("flags", "hessian"),
    [("", None), ("--unrolled --precision bf16", "finite"), ("--unrolled --hessian exact", "exact")],
)
def test_search_passes_its_training_loss_to_architect(monkeypatch, tmp_path, flags, hessian):
    """Virtual step and weight step use the same training loss; the validation loss is NLL alone."""
    seen = {}

    class Spy(Architect):
        def __init__(self, weights, alphas, train_loss, valid_loss, precise_loss, **options):
            seen.update(train=train_loss, valid=valid_loss, precise=precise_loss, options=options)
            raise KeyboardInterrupt

    monkeypatch.setattr(train_search, "Architect", Spy)
    flags += " --data builtin --emsize 8 --batch_size 8 --alpha 0.5 --beta 0.25 --clip 0.125 --wdecay 0.01"
    flags += " --arch_lr 0.5 --arch_wdecay 0.25"
    with pytest.raises(KeyboardInterrupt):
        train_search.main([*flags.split(), "--save", str(tmp_path / "run")])
    assert seen["train"].keywords["alpha"] == 0.5
    assert seen["train"].keywords["beta"] == 0.25
    assert seen["precise"].keywords == seen["train"].keywords
    assert not {"alpha", "beta"} & seen["valid"].keywords.keys()
    assert seen["options"]["update"] == WeightUpdate(clip_norm=0.125, weight_decay=0.01)
    assert seen["options"]["hessian"] == hessian
    assert (seen["options"]["lr"], seen["options"]["arch_wdecay"]) == (0.5, 0.25)


def test_vector_in_hessian_product_is_not_clipped(model, batches):
    """The published code clips v. Here the product matches brute force even with a clip far below |v|."""
    clip = 1e-3
    v = torch.autograd.grad(losses(model, batches[1]).total, model.weights())
    assert torch.cat([v_i.flatten() for v_i in v]).norm() > 100 * clip
    actual = unrolled_gradient(architect(model, clip=clip).gradient(*batches, 50.0))
    torch.testing.assert_close(actual, brute_force(model, *batches, 50.0, clip, WDECAY), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("hessian", [None, "finite", "exact"])
def test_alpha_step_leaves_weights_bit_identical(model, batches, hessian):
    """The published code changes buffers in its passes and rebuilds a second model; here all tensors stay the same."""
    model = model.float()
    train, valid = (b._replace(hidden=b.hidden.float(), masks=model.sample_masks(tiny.B)) for b in batches)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    addresses = [(w, w.data_ptr()) for w in model.weights()]
    architect(model, hessian).step(train, valid, ETA)
    after = model.state_dict()
    assert list(model.buffers()) == []
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["cell.alphas"]
    assert all(
        w is old and w.data_ptr() == address for w, (old, address) in zip(model.weights(), addresses, strict=True)
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_perturbed_weights_are_restored_after_an_error(model):
    before = [w.detach().clone() for w in model.weights()]
    with (
        pytest.raises(ZeroDivisionError),
        perturbed(model.weights(), [torch.ones_like(w) for w in model.weights()]),
    ):
        raise ZeroDivisionError
    assert all(torch.equal(w, old) for w, old in zip(model.weights(), before, strict=True))


@pytest.mark.parametrize("hessian", [None, "exact"])
def test_alpha_step_descends_the_whole_gradient(model, batches, hessian):
    """Adam's first step has little but the sign of the gradient, so SGD with a rate of 1 takes its place."""
    velocity = [torch.randn_like(w) for w in model.weights()]
    if hessian:
        expected = brute_force(model, *batches, ETA, CLIP, WDECAY, velocity=velocity)
    else:
        [expected] = torch.autograd.grad(losses(model, batches[1]).total, [model.alphas])
    start, stepping = model.alphas.detach().clone(), architect(model, hessian, lr=0.5, arch_wdecay=0.25)
    [group] = stepping.optimizer.param_groups
    assert type(stepping.optimizer) is torch.optim.Adam and not group["maximize"]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.25, (0.9, 0.999))
    stepping.optimizer = torch.optim.SGD([model.alphas], lr=1.0)
    stepping.step(*batches, ETA, velocity)
    torch.testing.assert_close(start - model.alphas.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("hessian", [None, "finite", "exact"])
def test_micro_batches_take_one_alpha_step_on_the_summed_gradient(model, batches, hessian):
    """The published code takes a step per micro-batch. Both halves of the batch are equal, as are their statistics."""
    train, valid = (
        b._replace(
            x=b.x[:, :3].repeat(1, 2), y=b.y[:, :3].repeat(1, 2), hidden=b.hidden[:3].repeat(2, 1),
            masks=type(b.masks)(b.masks.word, None, *(m[:3].repeat(2, 1) for m in b.masks[2:-1])),
        )
        for b in batches
    )  # fmt: skip
    start = model.alphas.detach().clone()
    ends = []
    for small in (6, 3):
        with torch.no_grad():
            model.alphas.copy_(start)
        stepping = architect(model, hessian, small=small)
        steps = []
        stepping.optimizer = torch.optim.SGD([model.alphas], lr=1.0)  # Unlike Adam's, its step has the gradient's size.
        stepping.optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        stepping.step(train, valid, ETA)
        assert steps == [1]
        ends.append(model.alphas.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)
