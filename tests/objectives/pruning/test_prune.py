import copy
import json
import logging
import math
import subprocess
from dataclasses import replace

import pytest
import safetensors
import torch

from objectives.canonization import canonize
from objectives.datasets import LabelledImages, load_task
from objectives.errors import OptionError, SlimFileError, UnsupportedNetworkError
from objectives.models import load_model
from objectives.objective import Objective, ObjectiveOptions
from objectives.pruning.masking import masked
from objectives.pruning.prune import PruneAmount, prune
from objectives.pruning.ranking import rank
from objectives.pruning.slim_files import load_coupled, load_slim
from objectives.pruning.slimming import cost, slim
from search_spaces.heuristics import HEURISTICS
from search_spaces.repairs import NO_REPAIR, RepairSpec

COMPOSITE = HEURISTICS["epsilon-abs"]


@pytest.fixture(scope="module")
def document(make_document, digits_model, digits_task):
    return make_document(digits_model, digits_task, COMPOSITE)


@pytest.fixture(scope="module")
def objective(digits_model, digits_task):
    return Objective(digits_model, digits_task, ObjectiveOptions((0.0, 0.5), device="cpu"))


@pytest.fixture(scope="module")
def ranking(objective):
    return rank(objective.scores(COMPOSITE))


@pytest.fixture
def run(digits_model, digits_task, document, tmp_path):
    """Prunes the digits network into `slim`; keywords replace what it is given."""

    def run(kind, value, **changed):
        given = {"model": digits_model, "task": digits_task, "document": document}
        given |= {"amount": PruneAmount(kind, value), "output": tmp_path / "slim", "device": "cpu"}
        given |= {"repair": NO_REPAIR}
        return prune(**(given | changed))

    return run


def _accuracy(network, images):
    with torch.inference_mode():
        return float((network(images.images).argmax(1) == images.labels).double().mean())


def test_a_rate_removes_that_share_and_everything_is_measured(
    run, digits_model, digits_task, objective, ranking, tmp_path
):
    before = copy.deepcopy(digits_model.network.state_dict())
    identity = {name: id(parameter) for name, parameter in digits_model.network.named_parameters()}
    report = run("rate", 0.4)
    assert (report.n_components, report.n_pruned) == (336, 134)
    masks = ranking.masks(134)
    images = digits_task.confirmation
    with masked(digits_model.network, objective.network.prunable, masks) as network:
        accuracy = _accuracy(network, images)
        with torch.inference_mode():
            logits = network(images.images)
    assert report.masked_accuracy == accuracy
    assert report.exact.accuracy == pytest.approx(accuracy, abs=1.5 / len(images))
    assert report.unpruned.accuracy == _accuracy(digits_model.network, images) > report.masked_accuracy
    assert report.images == {"set": "confirmation", "n_images": len(images)}
    module = slim(objective.network, masks)
    size, full = cost(module), cost(objective.network.module)
    assert (report.exact.parameters, report.exact.flops) == (size.parameters, size.flops)
    assert (report.unpruned.parameters, report.unpruned.flops) == (full.parameters, full.flops)
    assert size.parameters < full.parameters
    assert report.exact.size_bytes < report.unpruned.size_bytes
    assert report.exact.size_bytes >= 4 * size.parameters
    assert min(report.exact.latency_ms, report.unpruned.latency_ms) > 0
    assert (report.coupled, report.n_removed_coupled, report.warnings) == (None, None, ())
    # What is on disk is what was measured.
    written = sorted((tmp_path / "slim").iterdir())
    assert [path.name for path in written] == ["report.json", "slim.pt2", "slim.safetensors"]
    assert sorted(report.files) == [str(path) for path in written]
    assert report.composite == COMPOSITE.label == "Epsilon/Epsilon/Epsilon/Epsilon abs"
    assert report.preprocessing == digits_task.preprocessing.to_json()
    assert json.loads((tmp_path / "slim" / "report.json").read_text()) == json.loads(json.dumps(report.to_json()))
    program = torch.export.load(tmp_path / "slim" / "slim.pt2").module()
    for network in (program, load_slim(tmp_path / "slim" / "slim.safetensors")):
        for n in (1, 7, len(images)):
            found = network(images.images[:n])
            torch.testing.assert_close(found, logits[:n], rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
        assert _accuracy(network, images) == report.exact.accuracy
    # The user's network is what it was.
    after = digits_model.network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: id(parameter) for name, parameter in digits_model.network.named_parameters()} == identity


def test_a_network_is_repaired_by_default(run, digits_model, digits_task, document, objective, ranking, tmp_path):
    before = copy.deepcopy(digits_model.network.state_dict())
    unrepaired = run("rate", 0.6, output=tmp_path / "unrepaired")
    amount, output = PruneAmount("rate", 0.6), tmp_path / "slim"
    report = prune(digits_model, digits_task, document, amount=amount, output=output, device="cpu")
    assert (report.repair.method, report.repair.n_references) == ("refit", 100)
    assert report.repair.strength == objective.repairer.strength(RepairSpec("refit"))
    assert report.repair.accuracy_without == unrepaired.exact.accuracy == unrepaired.repair.accuracy_without
    assert report.repair.agreement_without == unrepaired.repair.agreement
    assert report.exact.accuracy > unrepaired.exact.accuracy + 0.1
    assert report.repair.agreement > report.repair.agreement_without + 0.1
    assert report.masked_accuracy == pytest.approx(report.exact.accuracy, abs=1.5 / report.images["n_images"])
    assert (unrepaired.repair.method, unrepaired.repair.strength) == ("none", None)
    assert (unrepaired.repair.n_references, unrepaired.repair.seconds) == (0, None)
    assert report.repair.seconds > 0
    assert (report.n_pruned, report.exact.flops) == (unrepaired.n_pruned, unrepaired.exact.flops)
    # A document's own repair is what was searched for.
    document = replace(document, repair={"method": "bn", "strength": 0.3})
    own = prune(digits_model, digits_task, document, amount=amount, output=tmp_path / "own", device="cpu").repair
    assert (own.method, own.strength) == ("bn", 0.3)
    # What is on disk is what was measured.
    images = digits_task.confirmation
    masks = ranking.masks(report.n_pruned)
    expected = slim(objective.repairer.repaired(masks, RepairSpec("refit")), masks)
    with torch.inference_mode():
        agrees = expected(images.images).argmax(dim=1) == digits_model.network(images.images).argmax(dim=1)
    assert report.repair.agreement == pytest.approx(float(agrees.double().mean()), abs=1.5 / len(images))
    for network in (torch.export.load(output / "slim.pt2").module(), load_slim(output / "slim.safetensors")):
        assert _accuracy(network, images) == report.exact.accuracy
        torch.testing.assert_close(network(images.images), expected(images.images), rtol=1e-4, atol=1e-3)
    with safetensors.safe_open(output / "slim.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["repair"]) == {"method": "refit", "strength": report.repair.strength}
    assert json.loads((output / "report.json").read_text())["repair"]["agreement"] == report.repair.agreement
    after = digits_model.network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("share", [0.9, 1.0])
def test_kept_accuracy_is_kept_up_to_every_percent(run, digits_model, digits_task, objective, ranking, share, caplog):
    caplog.set_level(logging.INFO)
    report = run("keep_accuracy", share)
    images = digits_task.search

    def accuracy(n):
        with masked(digits_model.network, objective.network.prunable, ranking.masks(n)) as network:
            return _accuracy(network, images)

    steps = [step * 336 // 100 for step in range(100)]
    assert report.n_pruned in steps
    at = steps.index(report.n_pruned)
    bound = share * accuracy(0) - 1e-9
    assert all(accuracy(n) >= bound for n in steps[: at + 1])
    assert accuracy(steps[at + 1]) < bound
    kept, whole = f"{accuracy(report.n_pruned):.4f}", f"{accuracy(0):.4f}"
    assert f"Without {report.n_pruned} of them accuracy is {kept} there, with all {whole}." in caplog.text
    assert report.n_pruned > 0


@pytest.mark.parametrize("kind", ["parameters", "flops"])
@pytest.mark.parametrize("share", [0.5, 0.1, 1.0])
def test_sizes_hold_what_they_promise(run, objective, ranking, kind, share):
    report = run(kind, share)

    def size(n):
        return getattr(cost(slim(objective.network, ranking.masks(n))), kind)

    assert getattr(report.exact, kind) == size(report.n_pruned) <= share * size(0)
    assert report.n_pruned == 0 or size(report.n_pruned - 1) > share * size(0)


def test_a_size_that_cannot_be_reached(run, tmp_path):
    with pytest.raises(
        OptionError, match=r"--params 1e-06 can't be reached: 0\.\d+ is left with one component"
    ) as caught:
        run("parameters", 1e-6)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("rate", 1.0, "--rate must be at least 0 and below 1, but got 1.0"),
        ("rate", -0.1, "--rate must be"),
        ("rate", math.nan, "--rate must be"),
        ("keep_accuracy", 0.0, "--keep-accuracy must be above 0 and at most 1, but got 0.0"),
        ("keep_accuracy", 1.1, "--keep-accuracy must be"),
        ("parameters", 0.0, "--params must be above 0 and at most 1"),
        ("flops", math.inf, "--flops must be above 0 and at most 1"),
    ],
)
def test_amounts_are_shares(kind, value, message):
    with pytest.raises(OptionError) as caught:
        PruneAmount(kind, value)
    assert message in str(caught.value)


def test_the_coupled_network_is_reported_apart(run, digits_model, digits_task, tmp_path):
    report = run("rate", 0.4, coupled=True)
    assert 0.9 * 134 < report.n_removed_coupled <= 134
    images = digits_task.confirmation
    directory = tmp_path / "slim"
    assert sorted(path.name for path in directory.iterdir()) == [
        "coupled.pt2",
        "coupled.safetensors",
        "report.json",
        "slim.pt2",
        "slim.safetensors",
    ]
    program = torch.export.load(directory / "coupled.pt2").module()
    loaded = load_coupled(directory / "coupled.safetensors", load_model("digits_cnn").network)
    for n in (1, 7):
        torch.testing.assert_close(program(images.images[:n]), loaded(images.images[:n]), rtol=1e-5, atol=1e-5)
    assert _accuracy(loaded, images) == report.coupled.accuracy
    assert report.coupled.accuracy != report.exact.accuracy
    canonical = canonize(loaded, (1, 8, 8))
    assert report.n_components - sum(canonical.components.values()) == report.n_removed_coupled
    size = cost(canonical.module)
    assert (report.coupled.parameters, report.coupled.flops) == (size.parameters, size.flops)
    assert report.coupled.parameters < report.unpruned.parameters


def test_some_classes_only_are_repaired(run, digits_model, make_document):
    task = load_task("digits", digits_model, classes=[7, 2, 5])
    before = copy.deepcopy(digits_model.network.state_dict())
    document = make_document(digits_model, task, COMPOSITE)
    report = run("rate", 0.7, task=task, document=document, repair=RepairSpec("refit"))
    assert report.masked_accuracy == pytest.approx(report.exact.accuracy, abs=1.5 / report.images["n_images"])
    assert report.repair.n_references == 30
    assert report.repair.agreement >= report.repair.agreement_without
    after = digits_model.network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_some_classes_only(run, digits_model, make_document, tmp_path):
    task = load_task("digits", digits_model, classes=[7, 2, 5])
    document = make_document(digits_model, task, COMPOSITE)
    report = run("rate", 0.5, task=task, document=document, coupled=True)
    assert report.warnings == ()
    images = task.confirmation
    program = torch.export.load(tmp_path / "slim" / "slim.pt2").module()
    assert program(images.images[:7]).shape == (7, 3)
    assert _accuracy(program, images) == report.exact.accuracy
    loaded = load_slim(tmp_path / "slim" / "slim.safetensors")
    torch.testing.assert_close(loaded(images.images[:7]), program(images.images[:7]), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        own = digits_model.network(images.images)[:, list(task.classes)].argmax(1) == images.labels
    assert report.unpruned.accuracy == float(own.double().mean())
    coupled = torch.export.load(tmp_path / "slim" / "coupled.pt2").module()
    assert coupled(images.images[:1]).shape == (1, 3)
    full = load_coupled(tmp_path / "slim" / "coupled.safetensors", load_model("digits_cnn").network)
    torch.testing.assert_close(
        coupled(images.images[:7]), full(images.images[:7])[:, list(task.classes)], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("classes", [None, [7, 2, 5]])
def test_networks_are_counted_alike(run, digits_model, make_document, classes):
    """Where nothing is pruned, all of a report's networks have one size."""
    task = load_task("digits", digits_model, classes=classes)
    document = make_document(digits_model, task, COMPOSITE)
    report = run("rate", 0.0, task=task, document=document, coupled=True)
    sizes = {(row.parameters, row.flops, row.size_bytes) for row in (report.unpruned, report.exact, report.coupled)}
    assert len(sizes) == 1


def test_without_confirmation_images_the_search_images_are_used(run, digits_task):
    empty = LabelledImages(digits_task.confirmation.images[:0], digits_task.confirmation.labels[:0])
    report = run("rate", 0.1, task=replace(digits_task, confirmation=empty))
    assert report.images == {"set": "search", "n_images": 200}


def test_what_differs_from_the_document_is_said(run, digits_model, digits_task, caplog, tmp_path):
    assert run("rate", 0.1).warnings == ()
    other = load_model("digits_cnn").network
    with torch.no_grad():
        other.fc.bias += 0.01
    preprocessing = replace(digits_task.preprocessing, mean=(0.3,))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="objectives.pruning.prune"):
        report = run(
            "rate",
            0.1,
            model=replace(digits_model, network=other, fingerprint="other"),
            task=replace(digits_task, fingerprint="other", preprocessing=preprocessing),
            output=tmp_path / "other",
        )
    assert [warning.split(".")[0] for warning in report.warnings] == [
        "The weights aren't those that the document was made for",
        "The images aren't those that the document was made for",
        "The preprocessing isn't the document's",
    ]
    logged = [record.getMessage() for record in caplog.records if record.name == "objectives.pruning.prune"]
    assert logged == list(report.warnings)
    assert json.loads((tmp_path / "other" / "report.json").read_text())["warnings"] == list(report.warnings)


def test_a_network_that_ignores_its_images_is_said(run):
    report = run("rate", 0.99)
    assert any("always gives the same answer" in warning for warning in report.warnings)


def test_another_networks_document_is_refused(run, digits_model, document, tmp_path):
    widths = dict(document.model["component_widths"])
    for changed, message in (
        (widths | {"layer1.0.conv1": 17}, "layer 'layer1.0.conv1' has 17 components; this one has 16"),
        (widths | {"layer9.conv": 3}, "layer 'layer9.conv' has 3 components; this one has no such layer"),
        ({name: n for name, n in widths.items() if name != "conv1"}, "without the layer 'conv1'"),
    ):
        other = replace(document, model=document.model | {"component_widths": changed})
        with pytest.raises(UnsupportedNetworkError, match=message) as caught:
            run("rate", 0.4, document=other)
        assert "\n" not in str(caught.value)
    other = replace(document, model=document.model | {"num_classes": 7})
    with pytest.raises(UnsupportedNetworkError, match="layer 'fc' has 7 outputs; this one has 10"):
        run("rate", 0.4, document=other)
    assert list(tmp_path.iterdir()) == []


def test_the_documents_own_settings_count(run, make_document, digits_model, digits_task, tmp_path):
    """Composite, groups and scope of abs decide what is pruned."""

    def kept(name, **changed):
        composite = changed.pop("composite", COMPOSITE)
        document = make_document(digits_model, digits_task, composite, **changed)
        run("rate", 0.5, document=document, output=tmp_path / name)
        with safetensors.safe_open(tmp_path / name / "slim.safetensors", framework="pt") as file:
            return file.metadata()["kept"]

    groups = Objective(digits_model, digits_task, ObjectiveOptions((0.0, 0.5))).layer_groups
    results = [
        kept("same"),
        kept("composite", composite=HEURISTICS["epsilon-plus-abs"]),
        kept("element", abs_scope="element"),
        kept("logit", output_relevance="logit"),
        kept("groups", composite=HEURISTICS["epsilon-plus-abs"], layer_groups=dict.fromkeys(groups, "FCL")),
    ]
    assert results[4] == results[0]  # all layers in the one group whose rule is Epsilon
    assert len({results[0], results[1], results[2], results[3]}) == 4


def test_an_output_that_exists_is_refused_before_any_work(run, tmp_path):
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim" / "mine").write_text("x")
    with pytest.raises(SlimFileError, match=r"slim' already exists; choose another directory or remove it\."):
        run("rate", 0.4)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "slim"]


def test_a_full_disk_leaves_nothing(run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    try:
        with pytest.raises(SlimFileError, match=r"slim' can't be written \(No space left on device\); make room"):
            run("rate", 0.1, output=disk / "slim")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_network_that_cannot_be_coupled_leaves_nothing(run, make_document, data_pack, tmp_path):
    model = load_model("cifar_resnet20", checkpoint=str(data_pack / "weights" / "cifar10_resnet20.safetensors"))
    source = f"npz:{data_pack}/cifar10/train_10k.npz,{data_pack}/cifar10/test_dev.npz"
    task = load_task(source, model, references_per_class=1, evaluation_images=100, confirmation_share=0.02)
    document = make_document(model, task, COMPOSITE)
    with pytest.raises(UnsupportedNetworkError, match="torch-pruning doesn't follow every coupling of CifarResNet"):
        run("rate", 0.6, model=model, task=task, document=document, coupled=True)
    assert list(tmp_path.iterdir()) == []
