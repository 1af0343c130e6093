import pytest
import timm
import torch
from safetensors.torch import load_file

from objectives.cifar_resnets import CIFAR10_CLASSES, CifarResNet
from objectives.datasets import load_task
from objectives.models import load_model


@pytest.mark.parametrize(("depth", "n_parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_registered_networks_have_the_published_sizes(depth, n_parameters):
    network = timm.create_model(f"cifar_resnet{depth}")
    assert isinstance(network, CifarResNet)
    # He et al. 2016, table 6 (0.27, 0.46, 0.66 and 0.85 M); option A has no parameters.
    assert sum(parameter.numel() for parameter in network.parameters()) == n_parameters
    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == depth - 1


def test_resnet20_has_688_filters():
    network = timm.create_model("cifar_resnet20")
    assert sum(module.out_channels for module in network.modules() if isinstance(module, torch.nn.Conv2d)) == 688


def test_shortcut_is_option_a():
    shortcut = timm.create_model("cifar_resnet20").layer2[0].downsample
    x = torch.randn(2, 16, 8, 8)
    y = shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_timm_can_change_the_classifier_and_the_input():
    network = timm.create_model("cifar_resnet20", num_classes=5, in_chans=1).eval()
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    network.reset_classifier(3)
    assert network.get_classifier().out_features == network.num_classes == 3
    network.reset_classifier(0, "max")
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 64)


def test_state_dict_keys_are_the_checkpoints(data_pack):
    state = load_file(data_pack / "weights" / "cifar10_resnet20.safetensors")
    own = {key for key in timm.create_model("cifar_resnet20").state_dict() if not key.endswith("num_batches_tracked")}
    assert own == {key for key in state if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("depth", "n_images", "accuracy", "tolerance"), [(20, 4943, 0.9136, 5e-5), (56, 1000, 0.929, 0.0011)]
)
def test_real_networks_reach_their_accuracy(data_pack, depth, n_images, accuracy, tolerance):
    """Measured on these images; of all 4,943 ResNet-56 classifies 0.9324."""
    model = load_model(f"cifar_resnet{depth}", checkpoint=data_pack / "weights" / f"cifar10_resnet{depth}.safetensors")
    assert model.label_names == CIFAR10_CLASSES
    assert model.preprocessing.size == (32, 32)
    assert model.preprocessing.mean == (0.485, 0.456, 0.406)
    files = f"{data_pack / 'cifar10' / 'train_10k.npz'},{data_pack / 'cifar10' / 'test_dev.npz'}"
    task = load_task(f"npz:{files}", model, confirmation_share=0, evaluation_images=n_images, references_per_class=1)
    with torch.inference_mode():
        predicted = torch.cat([model.network(batch).argmax(1) for batch in task.search.images.split(500)])
    assert (predicted == task.search.labels).double().mean().item() == pytest.approx(accuracy, abs=tolerance)
