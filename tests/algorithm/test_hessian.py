"""Both Hessian products of the unrolled step agree with the definition, in fp32, on a trained model."""

from statistics import median

import pytest
import torch
from helpers import ROOT

import train_search
from architect import RADIUS
from benchmarks.hessian import Agreement

PENN = [
    folder for folder in (ROOT / "corpora" / "penn", ROOT.parent / "shared" / "corpora" / "penn") if folder.is_dir()
]


def agreement(folder, flags, batches):
    assert train_search.main([*flags.split(), "--save", str(folder), "--device", "cpu"]) == 0
    torch.manual_seed(0)
    return Agreement(folder).cosines(batches, [RADIUS])[0]


def check(cosines, rounded=False):
    """Asserts that the exact product and the finite difference at the default radius have cosines near 1.

    The difference is computed in fp32 in every precision. With `rounded`, single exact products may be far off.
    """
    assert set(cosines) == {"exact", RADIUS}
    for kind, values in cosines.items():
        assert median(values) >= 0.999
        assert min(values) >= 0.99 or (rounded and kind == "exact")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--engine eager", "--precision fp32", "--precision bf16"])
def test_hessian_products_match_definition_on_builtin_text(tmp_path, mode):
    """engine/test_inductor.py tests that the difference does not use tf32, which only CUDA has."""
    flags = f"--data builtin --emsize 32 --batch_size 32 --lr 5 --epochs 1 --limit_tokens 33000 {mode}"
    check(agreement(tmp_path / "run", flags, batches=5), rounded="bf16" in mode)


@pytest.mark.slow
@pytest.mark.skipif(not PENN, reason="Penn Treebank lies neither in corpora/ nor in ../shared/corpora/")
def test_hessian_products_match_definition_after_penn_epoch(tmp_path):
    """The epoch has 415 steps of the unrolled search."""
    flags = f"--data {PENN[0]} --unrolled --emsize 100 --batch_size 64 --lr 5 --epochs 1"
    check(agreement(tmp_path / "run", flags, batches=20))
