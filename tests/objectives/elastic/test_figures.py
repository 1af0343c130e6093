import itertools

import torch

from objectives.datasets import LabelledImages
from objectives.elastic.figures import figures
from objectives.elastic.model import ElasticModel
from objectives.memory import Batches
from objectives.pruning.masking import masked
from objectives.pruning.slimming import cost, slim


def test_figures_of_each_level(elastic):
    subject = elastic("cifar_resnet20")
    model = ElasticModel(subject.canonical, subject.masks)
    images = LabelledImages(subject.images, subject.network(subject.images).argmax(1))
    model.set_level(2)
    rows = figures(model, images, Batches("evaluation", 3))
    assert model.level == 2
    assert [row.level for row in rows] == [0, 1, 2, 3]
    assert rows[0].accuracy == 1
    for row, masks in zip(rows, subject.masks, strict=True):
        with masked(subject.network, subject.canonical.prunable, masks):
            correct = subject.network(subject.images).argmax(1) == images.labels
        assert row.accuracy == float(correct.double().mean())
        size = cost(slim(subject.canonical, masks))
        assert (row.parameters, row.flops) == (size.parameters, size.flops)
        assert row.n_components == sum(int(mask.sum()) for mask in masks.values())
        assert min(row.latency_ms, row.latency_after_switch_ms, row.switch_ms) > 0
        assert row.switch_ms < row.latency_ms
    for larger, smaller in itertools.pairwise(rows):
        assert smaller.parameters < larger.parameters
        assert smaller.flops < larger.flops


def test_the_only_level_is_measured_too(elastic):
    subject = elastic("branches", (0.0,))
    model = ElasticModel(subject.canonical, subject.masks)
    images = LabelledImages(subject.images, torch.zeros(len(subject.images), dtype=torch.int64))
    (row,) = figures(model, images, Batches("evaluation", 10))
    assert row.n_components == sum(subject.canonical.components.values())
