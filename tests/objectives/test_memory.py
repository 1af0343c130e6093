"""Out of memory: batches are halved until they fit, what they compute stays the same, and the user hears of it."""

import resource
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from objectives.datasets import LabelledImages
from objectives.errors import OutOfMemoryError
from objectives.memory import Batches, lacks_memory
from objectives.pruning.evaluation import correct_predictions


class Roomy(nn.Module):
    """A network on a device with room for so many images."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError(f"Tried to allocate {len(x)} GiB.")
        return x.flatten(1)


IMAGES = LabelledImages(torch.eye(10)[:, :, None, None], torch.arange(10).roll(1).clamp(max=5))


def test_batches_are_halved_until_they_fit_and_stay_so():
    batches, network = Batches("evaluation", 9), Roomy(3)
    expected = correct_predictions(Roomy(10), IMAGES, Batches("evaluation", 10))
    assert torch.equal(correct_predictions(network, IMAGES, batches), expected)
    assert network.batches == [9, 4, 2, 2, 2, 2, 2]
    assert torch.equal(correct_predictions(network, IMAGES, batches), expected)
    assert network.batches[7:] == [2] * 5
    assert batches.remark == "Out of memory: batches in evaluation were halved from 9 to 2 images."


def test_what_fits_is_not_remarked_on():
    batches = Batches("evaluation", 4)
    correct_predictions(Roomy(4), IMAGES, batches)
    assert batches.remark is None


def test_where_no_image_fits_the_error_names_the_sizes():
    with pytest.raises(OutOfMemoryError, match=r"evaluation with batches of 6 images, halved down to 1: .* 1 GiB"):
        correct_predictions(Roomy(0), IMAGES, Batches("evaluation", 6))


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("memory"), KeyError("x")])
def test_other_errors_pass(error):
    def compute(size: int) -> None:
        raise error

    batches = Batches("evaluation", 8)
    with pytest.raises(type(error)):
        batches.run(compute)
    assert batches.size == 8


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    ],
)
def test_what_cuda_and_its_libraries_cannot_allocate_is_out_of_memory(message):
    """On a share of a GPU these are usual; `torch.AcceleratorError` is a RuntimeError, too."""
    assert lacks_memory(RuntimeError(message))
    assert lacks_memory(torch.AcceleratorError(message))
    assert not lacks_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_batch_has_an_image():
    with pytest.raises(ValueError, match="at least 1"):
        Batches("evaluation", 0)


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS") or sys.platform != "linux", reason="needs Linux's limits")
def test_a_machine_that_really_has_too_little_memory_halves_batches():
    """A process whose address space has room for 64 images of 16 MiB, but not for 256."""
    script = """
        import resource
        import torch
        from objectives.memory import Batches, lacks_memory

        torch.set_num_threads(1)
        torch.empty(1)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        room = 3 * 2**29  # for 96 images, whatever the interpreter itself still takes or gives back
        resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
        batches = Batches("evaluation", 256)
        print(batches.run(lambda size: len(torch.empty(size, 2**22))), batches.size)
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    n_computed, size = map(int, done.stdout.split())
    assert n_computed == size == 64


def test_a_cpu_allocator_that_fails_is_out_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.int8)
    assert lacks_memory(raised.value)
