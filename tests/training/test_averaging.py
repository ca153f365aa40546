"""NT-ASGD and averaged Adam have the right trigger, averages and step sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from architect import AveragedAdam, keep_capturable
from training.optimizers import ASGD, NonMonotonicTrigger, averaged, saved_average, scaled_lr


@given(losses=st.lists(st.floats(0, 10), max_size=30), nonmono=st.integers(1, 6))
def test_trigger_matches_its_definition(losses, nonmono):
    trigger = NonMonotonicTrigger(nonmono)
    for n, loss in enumerate(losses):
        expected = n > nonmono and any(loss > losses[i] for i in range(n - nonmono))
        assert trigger.step(loss) == expected
    assert trigger.losses == losses


def test_trigger_needs_more_than_nonmono_losses():
    trigger = NonMonotonicTrigger(2)
    assert [trigger.step(loss) for loss in (5.0, 6.0, 7.0, 8.0)] == [False, False, False, True]


def descend(optimizer, w, gradients, scales):
    for gradient, scale in zip(gradients, scales, strict=True):
        w.grad = gradient.clone()
        with scaled_lr(optimizer, scale):
            optimizer.step()
        yield w.detach().clone()


def test_asgd_steps_match_sgd_with_scaled_lr():
    """The expected weights are those of plain SGD, since torch's own ASGD applies a new rate one step late."""
    gradients = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).unbind()
    scales = [1.0, 0.5, 1.3, 0.2, 1.0, 0.7]
    raw = torch.arange(3.0)
    w = torch.nn.Parameter(raw.clone())
    optimizer = ASGD([w], lr=0.5, weight_decay=0.1)
    for actual, gradient, scale in zip(descend(optimizer, w, gradients, scales), gradients, scales, strict=True):
        raw = raw - 0.5 * scale * (gradient + 0.1 * raw)
        torch.testing.assert_close(actual, raw)


def test_averaged_weights_are_swapped_in_and_restored():
    gradients = torch.randn(9, 3, generator=torch.Generator().manual_seed(1)).unbind()
    w = torch.nn.Parameter(torch.zeros(3))
    optimizer = ASGD([w], lr=0.5)
    path = torch.stack(list(descend(optimizer, w, gradients, [1.0] * 9)))
    mean = path[1:].mean(0)  # torch's average leaves out the first iterate
    with pytest.raises(ZeroDivisionError), averaged(optimizer):
        torch.testing.assert_close(w.detach(), mean)
        raise ZeroDivisionError
    assert torch.equal(w.detach(), path[-1])
    torch.testing.assert_close(saved_average(optimizer.state_dict())[0], mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_asgd_equals_that_of_torch_at_a_constant_rate(dtype):
    gradients = torch.randn(200, 5, 3, generator=torch.Generator().manual_seed(2), dtype=dtype).unbind()
    ours, theirs = (torch.nn.Parameter(torch.ones(5, 3, dtype=dtype)) for _ in range(2))
    ours_optimizer = ASGD([ours], lr=0.3, weight_decay=0.01)
    theirs_optimizer = torch.optim.ASGD([theirs], lr=0.3, t0=0, lambd=0, weight_decay=0.01)
    for _ in zip(
        descend(ours_optimizer, ours, gradients, [1.0] * 200),
        descend(theirs_optimizer, theirs, gradients, [1.0] * 200), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)
        means = [optimizer.state[w]["ax"] for optimizer, w in ((ours_optimizer, ours), (theirs_optimizer, theirs))]
        torch.testing.assert_close(*means, rtol=1e-6 if dtype == torch.float32 else 1e-7, atol=1e-7)


def test_asgd_continues_from_its_saved_state():
    gradients = torch.randn(9, 3, generator=torch.Generator().manual_seed(3)).unbind()
    w = torch.nn.Parameter(torch.zeros(3))
    optimizer = ASGD([w], lr=0.5)
    list(descend(optimizer, w, gradients[:4], [1.0] * 4))
    other = torch.nn.Parameter(w.detach().clone())
    resumed = ASGD([other], lr=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    ends = [list(descend(o, p, gradients[4:], [1.0] * 5))[-1] for o, p in ((optimizer, w), (resumed, other))]
    assert torch.equal(*ends)
    assert torch.equal(optimizer.state[w]["ax"], resumed.state[other]["ax"])


def test_capturable_state_of_a_gpu_run_resumes_on_cpu():
    """On a GPU torch keeps the step counters of Adam on the device ("capturable"), which is not allowed on a CPU."""
    ends = []
    for capturable in (False, True):
        w = torch.nn.Parameter(torch.ones(2))
        optimizer = AveragedAdam([w], lr=0.5)
        list(descend(optimizer, w, torch.ones(3, 2).unbind(), [1.0] * 3))
        state = optimizer.state_dict()
        state["param_groups"][0]["capturable"] = capturable
        other = AveragedAdam([w], lr=0.5)
        other.register_load_state_dict_pre_hook(keep_capturable)
        other.load_state_dict(state)
        ends.append(list(descend(other, w, torch.ones(3, 2).unbind(), [1.0] * 3))[-1])
        assert other.state[w]["step"] == 6
    assert torch.equal(*ends)


def test_plain_sgd_has_no_average():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=1.0)
    w.grad = torch.ones(2)
    optimizer.step()
    with averaged(optimizer):
        assert torch.equal(w.detach(), torch.zeros(2))
    assert saved_average(optimizer.state_dict()) is None


def test_averaged_adam_matches_adam_and_averages_by_polynomial_decay():
    """The iterate of step t has weight t (t + 1) (t + 2), the closed form of polynomial-decay averaging at DECAY 3."""
    torch.manual_seed(0)
    plain, weight = (torch.nn.Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2))
    adam = torch.optim.Adam([plain], lr=0.1, weight_decay=0.01)
    averaging = AveragedAdam([weight], lr=0.1, weight_decay=0.01)
    with averaged(averaging):
        assert torch.equal(weight, plain)  # before the first step the average equals the weights
    total, weights = torch.zeros(2, 3), 0
    for t in range(1, 8):
        plain.grad = torch.randn(2, 3)
        weight.grad = plain.grad.clone()
        adam.step()
        averaging.step()
        total, weights = total + t * (t + 1) * (t + 2) * plain.detach(), weights + t * (t + 1) * (t + 2)
        if t == 4:  # the optimizer is resumed from its state
            state = averaging.state_dict()
            averaging = AveragedAdam([weight], lr=0.1, weight_decay=0.01)
            averaging.load_state_dict(state)
        with averaged(averaging):
            torch.testing.assert_close(weight.detach(), total / weights)
        assert torch.equal(weight, plain)
