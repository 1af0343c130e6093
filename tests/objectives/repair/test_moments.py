"""Moments of values that are added one after the other."""

import pytest
import torch

from objectives.repair.original import MomentSums


@pytest.mark.parametrize(("shape", "axis"), [((7, 3, 4, 5), 1), ((7, 4, 3), 2), ((7, 3), 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("n_images", [1, 3, 7])
def test_moments_of_parts_are_those_of_the_whole(shape, axis, dtype, tolerance, n_images):
    """Also where the mean is a thousand times the standard deviation, of which sums of squares would lose all."""
    torch.manual_seed(0)
    whole = (torch.randn(shape, dtype=torch.float64) + 1000).to(dtype)
    sums = MomentSums()
    for part in whole.split(n_images):
        sums.add(part, axis)
    variance, mean = torch.var_mean(whole.double().movedim(axis, 0).flatten(1), dim=1, correction=0)
    torch.testing.assert_close(sums.moments().mean, mean, rtol=tolerance, atol=0)
    torch.testing.assert_close(sums.moments().variance, variance, rtol=100 * tolerance, atol=0)
