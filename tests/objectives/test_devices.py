import pytest
import torch
from torch import nn

from objectives.devices import on_device, resolve_device
from objectives.errors import DeviceError, OptionError

HAS_GPU = torch.cuda.device_count() > 0


def test_auto_takes_a_gpu_where_there_is_one():
    assert resolve_device("auto") == torch.device("cuda:0" if HAS_GPU else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "name", ["cuda:99", "cuda:-1", "cuda:x", "cuda:", "cuda0", "cuda:0:0", "gpu", "mps", "", "CPU"]
)
def test_other_devices_are_refused_with_those_there_are(name):
    with pytest.raises(DeviceError) as caught:
        resolve_device(name)
    assert isinstance(caught.value, OptionError)
    assert str(caught.value).startswith(f"There is no device {name!r} on this machine; it has cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(HAS_GPU, reason="needs a machine without a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused(name):
    with pytest.raises(DeviceError, match="it has cpu\\."):
        resolve_device(name)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_a_gpu_by_name_and_a_copy_there():
    assert resolve_device("cuda") == resolve_device("cuda:0") == torch.device("cuda", 0)
    network = nn.Linear(2, 2)
    there = on_device(network, torch.device("cuda", 0))
    assert there is not network
    assert there.weight.device.type == "cuda"
    assert network.weight.device.type == "cpu"


def test_a_network_on_its_device_is_itself():
    network = nn.Linear(2, 2)
    assert on_device(network, torch.device("cpu")) is network
    meta = on_device(network, torch.device("meta"))
    assert meta is not network
    assert meta.weight.device.type == "meta"
    assert network.weight.device.type == "cpu"
