import pickle
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from torch import nn

from objectives.checkpoints import load_weights, read_checkpoint
from objectives.errors import CheckpointMismatchError, ModelError


def network() -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), fc=nn.Linear(4, 2)))


@pytest.fixture
def state():
    torch.manual_seed(0)
    return network().state_dict()


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_torch_file_may_nest_and_prefix_its_state_dict(tmp_path, state, key, prefix):
    content = OrderedDict((prefix + name, value) for name, value in state.items())
    path = tmp_path / "weights.pt"
    torch.save(content if key is None else {"epoch": 3, key: content}, path)
    assert_same(read_checkpoint(path), state)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_safetensors_are_known_by_content(tmp_path, state, name):
    safetensors.torch.save_file(dict(state), tmp_path / name)
    assert_same(read_checkpoint(str(tmp_path / name)), state)


def test_only_a_prefix_of_all_keys_is_removed(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "weights.pt")
    assert read_checkpoint(tmp_path / "weights.pt").keys() == {"module.a", "b"}


class Payload:
    ran = False

    def __reduce__(self):
        return exec, (f"import {__name__.split('.')[0]}; raise SystemExit('code of a pickle ran')",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": Payload()}, path)
    with pytest.raises(ModelError, match=r"evil\.pt' isn't a file of weights \(Weights only load failed.*state_dict"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ModelError, match=r"isn't a file of weights"):
        read_checkpoint(path)


def test_a_whole_network_is_refused(tmp_path):
    torch.save(network(), tmp_path / "network.pt")
    with pytest.raises(ModelError, match=r"isn't a file of weights.*torch\.save\(model\.state_dict\(\), FILE\)"):
        read_checkpoint(tmp_path / "network.pt")


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pth"])
@pytest.mark.parametrize("content", [b"", b"not weights", bytes(range(256))])
def test_a_file_of_something_else_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name}' isn't a file of weights") as caught:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"state_dict": {}}, "holds nothing, not weights by name"),
        ([torch.ones(1)], "holds a list, not weights by name"),
        ({"weight": torch.ones(1), "epoch": 3}, "its entry 'epoch' is a int, not a tensor"),
    ],
)
def test_content_that_is_no_state_dict_is_refused(tmp_path, content, problem):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=problem):
        read_checkpoint(tmp_path / "weights.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"none\.pt' can't be read \(No such file or directory\); pass --checkpoint"):
        read_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast(state, dtype):
    target = network()
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    load_weights(target, cast, "weights.pt")
    assert target.conv.weight.dtype == torch.float32
    assert torch.equal(target.conv.weight, cast["conv.weight"].float())


def test_num_batches_tracked_may_be_absent(state):
    del state["bn.num_batches_tracked"]
    target = network()
    load_weights(target, state, "weights.pt")
    assert torch.equal(target.fc.weight, state["fc.weight"])


def test_a_mismatch_names_the_first_keys_and_changes_nothing(state):
    target = network()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    state["head.weight"] = state.pop("fc.weight")
    state["conv.weight"] = torch.zeros(4, 1, 3, 3)
    state["fc.bias"] = torch.zeros(2, dtype=torch.int8)
    with pytest.raises(CheckpointMismatchError) as caught:
        load_weights(target, state, "dir/weights.pt")
    assert str(caught.value) == (
        "The checkpoint 'dir/weights.pt' doesn't fit the network Sequential: missing keys: 'fc.weight'; "
        "unexpected keys: 'head.weight'; other shapes: 'conv.weight' is (4, 1, 3, 3), not (4, 3, 3, 3); "
        "other types: 'fc.bias' is torch.int8, not torch.float32. "
        "Pass the --model, with its --model-option, that the checkpoint was saved from."
    )
    assert_same(target.state_dict(), before)


def test_of_many_keys_three_are_named():
    with pytest.raises(
        CheckpointMismatchError, match=r"missing keys: 'conv\.weight', 'conv\.bias', 'bn\.weight' and 5 more"
    ):
        load_weights(network(), {"x": torch.ones(1)}, "weights.pt")
