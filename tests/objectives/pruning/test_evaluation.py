import pytest
import torch

from objectives.canonization import canonize
from objectives.datasets import LabelledImages
from objectives.memory import Batches
from objectives.pruning.evaluation import Evaluator, News, correct_predictions
from objectives.pruning.masking import masked
from objectives.pruning.slimming import cost, slim
from objectives.repair.repairer import Repairer
from search_spaces.repairs import NO_REPAIR, RepairSpec


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
        with masked(subject.network, subject.canonical.prunable, masks) as network:
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


def test_a_network_that_no_image_reaches_is_run_on_one(prunable, evaluator, monkeypatch):
    subject, labelled = prunable("vgg11_bn"), evaluator[1]
    evaluate = Evaluator(subject.canonical, labelled.to("cpu", torch.float64), Batches("a test", 16), torch.float64)
    monkeypatch.setattr("objectives.pruning.evaluation.correct_predictions", None)  # what runs all images
    everything = {name: torch.zeros(n, dtype=torch.bool) for name, n in subject.canonical.components.items()}
    cut = {**subject.ranking().masks(0), "features.8": everything["features.8"]}
    for masks in (everything, cut):
        measurement = evaluate.measure(masks)
        with masked(subject.network, subject.canonical.prunable, masks) as network:
            expected = network(labelled.images.double()).argmax(1) == labelled.labels
        assert torch.equal(measurement.correct, expected)


def test_batches_are_as_large_as_the_caches_of_a_cpu(evaluator, monkeypatch):
    subject, labelled = evaluator
    images = labelled.to("cpu", torch.float32)
    batches = Batches("a test", 16)
    asked = []
    run = Batches.run
    monkeypatch.setattr(Batches, "run", lambda *arguments: asked.append(arguments[2]) or run(*arguments))
    masks = subject.ranking().masks(0)
    by_caches = Evaluator(subject.canonical, images, batches).measure(masks).correct
    monkeypatch.setattr("objectives.pruning.fusion._BYTES_CACHED", 1)
    one_by_one = Evaluator(subject.canonical, images, batches).measure(masks).correct
    assert torch.equal(by_caches, one_by_one)
    assert asked == [24 * 2**20 // (4 * 3 * 16 * 32 * 32), 1]  # a convolution that is added to a stream


def test_what_is_known_is_taken_over(evaluator):
    subject, labelled = evaluator
    images = labelled.to("cpu", torch.float64)
    ranking = subject.ranking()
    first = Evaluator(subject.canonical, images, Batches("a test", 16), torch.float64)
    measured = [first.measure(ranking.masks(n)) for n in (0, 100, 688, 100)]
    news = first.news()
    assert [len(known.correct) for known in news.measurements] == [5, 5, 5]  # 40 images
    assert (news.n_masks, news.n_known) == (3, 0)
    assert first.news() == News((), 0, 0)
    second = Evaluator(subject.canonical, images, Batches("a test", 16), torch.float64)
    assert second.origin == first.origin
    second.learn(news.measurements)
    for n, expected in zip((0, 100, 688), measured, strict=False):
        again = second.measure(ranking.masks(n))
        assert torch.equal(again.correct, expected.correct)
        assert again.cost == expected.cost
    assert second.news() == News((), 3, 3)
    second.measure(ranking.masks(101))
    assert len(second.news().measurements) == 1


def test_what_smaller_batches_have_measured_is_no_news(evaluator):
    subject, labelled = evaluator
    masks = subject.ranking().masks(10)
    halved = Evaluator(subject.canonical, labelled, Batches("a test", 16))
    halved.batches.size = 8
    halved.measure(masks)
    assert halved.news() == News((), 1, 0)
    halved.measure(masks)
    assert halved.news() == News((), 1, 1)


def test_a_repair_is_part_of_what_is_measured(evaluator):
    subject, labelled = evaluator
    images = labelled.to("cpu", torch.float64)

    def make(references):
        repairer = Repairer(subject.canonical, references, Batches("a test", 16))
        return Evaluator(subject.canonical, images, Batches("a test", 16), torch.float64, repairer)

    first, other = make(subject.images), make(subject.images + 1)
    masks, all_kept = subject.ranking().masks(100), subject.ranking().masks(0)
    repairs = [NO_REPAIR, RepairSpec("bn"), RepairSpec("refit", 0.1), RepairSpec("refit", 1.0)]
    measured = [first.measure(masks, repair=repair) for repair in repairs]
    assert all(first.measure(masks, repair=repair) is known for repair, known in zip(repairs, measured, strict=True))
    assert first.measure(masks, 5, repairs[2]).correct.tolist() == measured[2].correct[:5].tolist()
    # Nothing is repaired where nothing is pruned, so that is measured once.
    assert len({id(first.measure(all_kept, repair=repair)) for repair in repairs}) == 1
    keys = [known.mask for known in first.news().measurements]
    assert len(keys) == len(set(keys)) == len(repairs) + 1
    other.measure(masks, repair=repairs[0])
    other.measure(masks, repair=repairs[2])
    ours, theirs = (known.mask for known in other.news().measurements)
    assert ours in keys  # no repair, no references
    assert theirs not in keys
    assert first.origin == other.origin == Evaluator(subject.canonical, images, Batches("a test", 16)).origin
    with pytest.raises(ValueError, match="repairer"):
        Evaluator(subject.canonical, images, Batches("a test", 16)).measure(masks, repair=repairs[1])


def test_an_origin_is_all_but_the_masks(evaluator, prunable):
    subject, labelled = evaluator
    images = labelled.to("cpu", torch.float64)
    other_labels = LabelledImages(images.images, images.labels.roll(1))
    origins = {
        Evaluator(network.canonical, on, Batches("a test", size)).origin
        for network, on, size in (
            (subject, images, 16),
            (subject, images, 8),
            (subject, labelled.to("cpu", torch.float32), 16),
            (subject, other_labels, 16),
            (prunable("seresnet18"), images, 16),
        )
    }
    assert len(origins) == 5


def test_an_origin_is_of_the_chosen_components(build_transformer):
    canonical = canonize(build_transformer("class-token"), (3, 16, 16))
    images = LabelledImages(torch.zeros(2, 3, 16, 16).double(), torch.tensor([0, 1]))
    origins = {
        Evaluator(canonical.choosing(components), images, Batches("a test", 2)).origin
        for components in ("heads", "mlp", "all")
    }
    assert len(origins) == 3


def test_the_least_recently_used_masks_are_forgotten(evaluator, monkeypatch):
    subject, labelled = evaluator
    monkeypatch.setattr("objectives.pruning.evaluation._BYTES_KEPT", 3 * (40 + 1024))
    evaluate = Evaluator(subject.canonical, labelled.to("cpu", torch.float64), Batches("a test", 40), torch.float64)
    ranking = subject.ranking()
    kept = {n: evaluate.measure(ranking.masks(n)) for n in (0, 600, 650)}
    assert evaluate.measure(ranking.masks(0)) is kept[0]
    evaluate.measure(ranking.masks(660))
    assert evaluate.measure(ranking.masks(0)) is kept[0]
    assert evaluate.measure(ranking.masks(600)) is not kept[600]
    assert [known.n_images for known in evaluate.news().measurements] == [40, 40, 40]  # what was forgotten is no news


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_leave_the_canonical_network_alone(evaluator, dtype):
    subject, labelled = evaluator
    state = {name: tensor.clone() for name, tensor in subject.canonical.module.state_dict().items()}
    evaluate = Evaluator(subject.canonical, labelled.to("cpu", dtype), Batches("a test", 16), dtype)
    measurement = evaluate.measure(subject.ranking().masks(100))
    assert measurement.correct.shape == (40,)
    after = subject.canonical.module.state_dict()
    assert all(torch.equal(after[name], state[name]) and after[name].dtype == torch.float64 for name in state)
