import logging
import math
import os

import pytest
import safetensors
import torch
from torch import nn

from objectives.canonization import canonize
from objectives.datasets import LabelledImages
from objectives.errors import OptionError, TrainingError
from objectives.training import TrainingOptions, train


class StoppedError(Exception):
    """Stands for a kill between two epochs."""


class Unread(nn.Module):
    """Has parameters, but always gives the same answer."""

    def __init__(self):
        super().__init__()
        self.unread = nn.Linear(2, 2)

    def forward(self, x):
        return torch.zeros(len(x), 3)


def network(seed=0, *, batch_norm=True, dtype=torch.float32):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
    layers = [nn.Conv2d(1, 6, 3), norm, nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(24, 3)]
    return nn.Sequential(*layers).to(dtype).eval()


def images(n, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 1, 4, 4, generator=generator, dtype=dtype)
    return LabelledImages(pixels, pixels.flatten(1)[:, :3].argmax(1))


def noise(batch, generator):
    return batch + 0.1 * torch.randn(batch.shape, generator=generator)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


OPTIONS = {
    "sgd": TrainingOptions(5, 8, 0.05, weight_decay=0.01, schedule="cosine"),
    "sgd without momentum": TrainingOptions(5, 8, 0.05, momentum=0, schedule="one-cycle"),
    "adamw": TrainingOptions(5, 8, 0.01, optimizer="adamw", weight_decay=0.1, schedule="one-cycle"),
    "patience": TrainingOptions(5, 8, 0.05, patience=4),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_killed_training_ends_with_the_same_weights(name, tmp_path):
    options, path = OPTIONS[name], tmp_path / "checkpoint.safetensors"
    arguments = {"validation": images(20, seed=2), "augment": noise, "gradient_masks": {"0.weight": torch.tensor(True)}}
    whole = network()
    expected = train(whole, images(30), options, **arguments)

    def kill(epoch):
        raise StoppedError

    n_kills = 0
    for _ in range(options.n_epochs):
        killed = network()
        with pytest.raises(StoppedError):
            train(killed, images(30), options, checkpoint=path, on_epoch=kill, **arguments)
        n_kills += 1
    after = network()
    result = train(after, images(30), options, checkpoint=path, on_epoch=kill, **arguments)
    assert n_kills == 5
    assert_same(state(after), state(whole))
    assert result.kept == expected.kept
    assert [(e.loss, e.accuracy) for e in result.epochs] == [(e.loss, e.accuracy) for e in expected.epochs]
    assert os.listdir(tmp_path) == [path.name]


def test_one_step_is_that_of_sgd_with_momentum_and_decay():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    weight = linear[1].weight.detach().clone()
    data = images(10, dtype=torch.float64)
    bias = linear[1].bias.detach().clone()
    velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    for _ in range(3):
        rows = data.images.flatten(1)
        difference = torch.softmax(rows @ weight.T + bias, 1) - nn.functional.one_hot(data.labels, 3)
        gradient = difference.T @ rows / 10 + 0.05 * weight
        velocity = 0.9 * velocity + gradient
        bias_velocity = 0.9 * bias_velocity + difference.mean(0) + 0.05 * bias
        weight, bias = weight - 0.2 * velocity, bias - 0.2 * bias_velocity
    train(linear, data, TrainingOptions(3, 10, 0.2, weight_decay=0.05))
    assert torch.allclose(linear[1].weight, weight, rtol=0, atol=1e-12)
    assert torch.allclose(linear[1].bias, bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_a_gradient_mask_freezes_stays_bit_for_bit(optimizer):
    module = network()
    before = state(module)
    rows = torch.tensor([True, False, True, False, False, True])
    masks = {"0.weight": rows[:, None, None, None], "0.bias": rows, "5.weight": torch.rand(3, 24) < 0.5}
    masks["5.bias"] = torch.tensor(False)
    options = TrainingOptions(3, 8, 0.05, optimizer=optimizer, weight_decay=0.1)
    train(module, images(30), options, gradient_masks=masks)
    for name, mask in masks.items():
        mask = mask.expand(before[name].shape)
        after = module.state_dict()[name]
        assert torch.equal(after[~mask], before[name][~mask]), name
        assert bool((after[mask] != before[name][mask]).all()), name
    assert not torch.equal(module.state_dict()["1.weight"], before["1.weight"])


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"no.weight": torch.tensor(True)}, "name 'no.weight', which is no parameter"),
        ({"0.bias": torch.ones(6)}, r"'0.bias'\]` must be bool .* to \(6,\), but got torch.float32 of \(6,\)"),
        ({"0.bias": torch.ones(2, 6, dtype=torch.bool)}, r"but got torch.bool of \(2, 6\)"),
    ],
)
def test_a_mask_that_fits_no_parameter_is_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        train(network(), images(8), TrainingOptions(1), gradient_masks=masks)


def test_large_gradients_are_cut_to_their_norm():
    """By definition: SGD without momentum takes a step of the learning rate times the norm."""
    plain, cut = network(batch_norm=False), network(batch_norm=False)
    for module, norm in ((plain, None), (cut, 1e-3)):
        train(module, images(8), TrainingOptions(1, 8, 0.5, momentum=0, max_gradient_norm=norm))
    before = torch.cat([value.flatten() for value in network(batch_norm=False).state_dict().values()])
    steps = [torch.cat([value.flatten() for value in module.state_dict().values()]) - before for module in (plain, cut)]
    assert float(steps[1].norm()) == pytest.approx(0.5 * 1e-3, rel=1e-3)
    assert float(steps[0].norm()) > 1e-3
    torch.testing.assert_close(steps[1] / steps[1].norm(), steps[0] / steps[0].norm(), rtol=0, atol=1e-3)
    with pytest.raises(OptionError, match="`max_gradient_norm` of a training must be positive and finite, but got 0"):
        TrainingOptions(1, max_gradient_norm=0)


@pytest.mark.parametrize("learning_rate", [1e10, 1e38])
def test_a_training_that_diverges_says_when_and_why(learning_rate):
    message = f"diverged in epoch [12] of 9 .* learning rate of {learning_rate:g}; use a smaller one"
    with pytest.raises(TrainingError, match=message.replace("+", r"\+")):
        train(network(batch_norm=False), images(30), TrainingOptions(9, 8, learning_rate))


def test_weights_that_are_finite_but_give_no_finite_logits_have_diverged():
    with pytest.raises(TrainingError, match=r"diverged in epoch 1 of 1 \(loss [\d.]+\) at a learning rate of 1e\+30"):
        train(network(batch_norm=False), images(8), TrainingOptions(1, 8, 1e30))


def test_a_training_without_progress_ends_and_keeps_the_best_weights():
    module, validation = network(), images(20, seed=2)
    seen = []
    options = TrainingOptions(60, 8, 0.3, patience=3)
    result = train(module, images(30), options, validation=validation, on_epoch=seen.append)
    accuracies = [epoch.accuracy for epoch in result.epochs]
    assert tuple(seen) == result.epochs
    assert result.kept == accuracies.index(max(accuracies)) + 1
    assert len(result.epochs) == result.kept + 3 < 60
    predicted = module(validation.images).argmax(1)
    assert float((predicted == validation.labels).double().mean()) == max(accuracies)


def test_patience_needs_validation_images():
    with pytest.raises(OptionError, match="needs validation images, but got patience=2"):
        train(network(), images(8), TrainingOptions(1, patience=2))


def test_everything_but_the_weights_is_put_back():
    module = network()
    module[0].train()
    module[0].weight.requires_grad_(False)
    torch.manual_seed(7)
    random = torch.get_rng_state()
    train(module, images(20), TrainingOptions(2, 8))
    assert torch.equal(torch.get_rng_state(), random)
    assert [child.training for child in module] == [True, *[False] * 5]
    assert [p.requires_grad for p in module.parameters()] == [False, *[True] * 5]
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_order_depends_on_the_seed_alone():
    states = []
    for seed, global_seed in ((3, 0), (3, 1), (4, 0)):
        module = network()
        torch.manual_seed(global_seed)
        train(module, images(30), TrainingOptions(2, 8, seed=seed))
        states.append(state(module))
    assert_same(states[0], states[1])
    assert not torch.equal(states[0]["0.weight"], states[2]["0.weight"])


def test_steps_take_every_image_once_and_equally_many():
    sizes, seen = [], []

    def record(batch, generator):
        sizes.append(len(batch))
        seen.append(batch)
        return batch

    data = images(33)
    train(network(), data, TrainingOptions(1, 16), augment=record)
    assert sizes == [11, 11, 11]
    assert sorted(torch.cat(seen).sum((1, 2, 3)).tolist()) == sorted(data.images.sum((1, 2, 3)).tolist())


def test_a_canonical_network_is_trained_by_gradients():
    module = network(batch_norm=False, dtype=torch.float64)
    module[4].p = 0.0
    canonical = canonize(module, (1, 4, 4)).module
    for each in (module, canonical):
        train(each, images(30, dtype=torch.float64), TrainingOptions(3, 8, 0.1))
    for name, value in module.named_parameters():
        assert torch.allclose(value, canonical.get_parameter(name), rtol=0, atol=1e-12)
        assert not canonical.get_parameter(name).requires_grad


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_a_damaged_checkpoint_is_begun_anew(tmp_path, caplog, content):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(content)
    expected, module = network(), network()
    train(expected, images(20), TrainingOptions(2, 8))
    train(module, images(20), TrainingOptions(2, 8), checkpoint=path)
    assert "can't be read" in caplog.text
    assert_same(state(module), state(expected))


@pytest.mark.parametrize("other", ["network", "images", "options", "masks", "validation"])
def test_another_trainings_checkpoint_is_not_gone_on_from(tmp_path, caplog, other):
    path = tmp_path / "checkpoint.safetensors"
    masks = {"0.bias": torch.tensor(False)} if other == "masks" else None
    validation = images(9, seed=5) if other == "validation" else None
    train(
        network(seed=1 if other == "network" else 0),
        images(20, seed=3 if other == "images" else 1),
        TrainingOptions(3 if other == "options" else 2, 8),
        gradient_masks=masks,
        validation=validation,
        checkpoint=path,
    )
    assert not caplog.text
    expected, module, seen = network(), network(), []
    train(expected, images(20), TrainingOptions(2, 8))
    train(module, images(20), TrainingOptions(2, 8), checkpoint=path, on_epoch=seen.append)
    assert "is another training's: beginning anew" in caplog.text
    assert len(seen) == 2
    assert_same(state(module), state(expected))


def test_a_checkpoint_holds_no_pickle_and_is_never_missing(tmp_path):
    path = tmp_path / "checkpoint.safetensors"

    def look(epoch):
        with safetensors.safe_open(path, framework="pt") as file:
            names = set(file.keys())
        assert {"network.0.weight", "optimizer.0.momentum_buffer", "generator"} <= names
        assert os.listdir(tmp_path) == [path.name]

    train(network(), images(20), TrainingOptions(3, 8), checkpoint=path, on_epoch=look)


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    caplog.set_level(logging.WARNING)
    result = train(network(), images(20), TrainingOptions(2, 8), checkpoint=tmp_path / "no directory" / "file")
    assert len(result.epochs) == 2
    assert caplog.text.count("can't be written") == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("learning_rate", math.nan),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("label_smoothing", 1.0),
        ("patience", 0),
        ("seed", -1),
    ],
)
def test_options_out_of_range_are_refused_with_their_value(name, value):
    with pytest.raises(OptionError, match=f"`{name}` of a training must be .*, but got {value!r}"):
        TrainingOptions(**{"n_epochs": 1, name: value})


def test_unknown_names_list_the_known_ones():
    with pytest.raises(OptionError, match=r"Unknown schedule of a training 'cosin'.*cosine"):
        TrainingOptions(1, schedule="cosin")
    with pytest.raises(OptionError, match="Unknown optimizer of a training 'lion'"):
        TrainingOptions(1, optimizer="lion")


def test_a_network_without_anything_to_train_is_refused():
    with pytest.raises(TrainingError, match="no parameter reaches its logits"):
        train(nn.Flatten(), images(8), TrainingOptions(1))
    with pytest.raises(TrainingError, match="no parameter reaches its logits"):
        train(Unread(), images(8), TrainingOptions(1))


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="on no `images`"):
        train(network(), images(0), TrainingOptions(1))
