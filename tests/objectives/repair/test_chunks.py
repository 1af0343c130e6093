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


@pytest.mark.parametrize("axis", [1, 2])
def test_some_channels_stand_for_all(axis):
    whole = torch.randn(5, 4, 4)
    whole.index_fill_(axis, torch.tensor([0, 2]), 0)
    chunks = Chunks.of(whole, 2)
    few = chunks.narrowed(torch.tensor([False, True, True, True]), axis)
    assert [part.shape[axis] for part in few] == [3, 3, 3]
    fewer = few.narrowed(torch.tensor([True, False, True]), axis)
    assert fewer.stored.among_all(torch.tensor([True, False])).tolist() == [False, True, False, False]
    other = Chunks.of(torch.randn(5, 4, 4), 2)
    for part in (few, fewer):
        assert torch.equal(torch.cat(list(part.full())), whole)
        assert part.full().stored is None
        for total in (part.plus(other), other.plus(part)):
            assert torch.equal(torch.cat(list(total)), whole + torch.cat(list(other)))
        assert torch.equal(torch.cat(list(part.plus(fewer))), 2 * whole)
    assert chunks.narrowed(torch.ones(4, dtype=torch.bool), axis) is chunks
