import pytest
import torch

from objectives.datasets import LabelledImages
from objectives.memory import Batches
from objectives.pruning.evaluation import Evaluator, correct_predictions
from objectives.pruning.masking import masked
from objectives.pruning.slimming import cost, slim


class Counting(torch.nn.Module):
    """Logits are the images' own values; keeps the sizes of the batches it saw."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return x.flatten(1)


@pytest.mark.parametrize(("batch_size", "batches"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (100, [5])])
def test_every_image_is_counted_once_whatever_the_batches(batch_size, batches):
    images = torch.eye(5)[:, :, None, None]
    network = Counting()
    correct = correct_predictions(
        network, LabelledImages(images, torch.tensor([0, 1, 3, 3, 0])), Batches("a test", batch_size)
    )
    assert correct.tolist() == [True, True, False, True, False]
    assert correct.dtype == torch.bool
    assert network.batches == batches


@pytest.fixture
def evaluator(prunable):
    subject = prunable("cifar_resnet20")
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(40, 3, 32, 32, generator=generator)
    return subject, LabelledImages(images, torch.randint(10, (40,), generator=generator))


def test_counts_equal_those_of_the_masked_network(evaluator):
    subject, labelled = evaluator
    evaluate = Evaluator(subject.canonical, labelled.to("cpu", torch.float64), Batches("a test", 16), torch.float64)
    ranking = subject.ranking()
    for n in (0, 30, 200, 688):
        masks = ranking.masks(n)
        measurement = evaluate.measure(masks)
        with masked(subject.network, subject.canonical.layers, masks) as network:
            expected = network(labelled.images.double()).argmax(1) == labelled.labels
        assert torch.equal(measurement.correct, expected)
        assert measurement.cost == cost(slim(subject.canonical, masks))


def test_equal_masks_are_measured_once_and_others_are_not_confused(evaluator):
    subject, labelled = evaluator
    evaluate = Evaluator(subject.canonical, labelled.to("cpu", torch.float64), Batches("a test", 16), torch.float64)
    ranking = subject.ranking()
    first = evaluate.measure(ranking.masks(100))
    assert evaluate.measure(ranking.masks(100)) is first
    assert evaluate.measure(ranking.masks(101)) is not first
    assert evaluate.measure(subject.ranking(seed=1).masks(100)) is not first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_leave_the_canonical_network_alone(evaluator, dtype):
    subject, labelled = evaluator
    state = {name: tensor.clone() for name, tensor in subject.canonical.module.state_dict().items()}
    evaluate = Evaluator(subject.canonical, labelled.to("cpu", dtype), Batches("a test", 16), dtype)
    measurement = evaluate.measure(subject.ranking().masks(100))
    assert measurement.correct.shape == (40,)
    after = subject.canonical.module.state_dict()
    assert all(torch.equal(after[name], state[name]) and after[name].dtype == torch.float64 for name in state)
