"""Chunks against the whole value."""

import pytest
import torch

from objectives.repair.chunks import Chunks


@pytest.mark.parametrize("n_images", [1, 2, 4, 9])
def test_rows_are_those_of_the_whole(n_images):
    whole = torch.arange(7 * 3).view(7, 3)
    chunks = Chunks.of(whole, n_images)
    assert torch.equal(torch.cat(list(chunks)), whole)
    assert chunks.firsts[-1] == 7
    for positions in (torch.arange(21), torch.tensor([0, 8, 9, 20]), torch.tensor([13])):
        rows = chunks.read(positions, 3, lambda part, at: part.flatten()[at])
        assert torch.equal(rows, positions)
    doubled = chunks.map(lambda index: 2 * chunks.parts[index])
    assert torch.equal(torch.cat(list(doubled)), 2 * whole)
    assert doubled.firsts == chunks.firsts
