"""Training: the one way in which the product fits weights to labelled images by gradients.

It trains the small network of `digits`, fine-tunes pruned networks between two steps of a procedure and adapts them to
new data; networks are torch modules of any kind, canonical and slim ones included, and images are in memory. Weights
can be frozen one by one by masks of their gradients (prune-and-grow: the core stays, what returns is trained).

With a `checkpoint` the training can be killed at any time: the same call goes on after the last whole epoch and ends
with the same weights, bit for bit, on the same kind of device and number of threads where its kernels are deterministic
(a CPU's are). The file is safetensors: weights, the best weights so far, the optimizer's state and the state of the
random order as tensors, everything else as JSON in its metadata. Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from objectives.attribution.operations import plain_gradients
from objectives.datasets import LabelledImages
from objectives.errors import OptionError, OutOfMemoryError, TrainingError
from objectives.fingerprints import state_fingerprint
from objectives.memory import Batches, lacks_memory
from objectives.pruning.evaluation import correct_predictions
from search_spaces.files import write_atomically
from search_spaces.reasons import message_of
from search_spaces.suggestions import did_you_mean

__all__ = [
    "Augmentation",
    "Epoch",
    "GRADIENT_NORM",
    "Optimizer",
    "Schedule",
    "TrainingOptions",
    "TrainingResult",
    "train",
]

Optimizer = Literal["sgd", "adamw"]
"""SGD with momentum, or Adam with decoupled weight decay (with a decay of 0 it is Adam)."""

Schedule = Literal["constant", "cosine", "one-cycle"]
"""How the learning rate goes from step to step: as it is; to 0 along half a cosine; or up to it for 30 % of the steps
and down to nearly 0, while momentum goes the other way (Smith and Topin 2019)."""

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""Images (N, C, H, W) and a generator on the CPU -> images as the network sees them."""

GRADIENT_NORM = 10.0
"""To which gradients of networks are cut whose batch norm is folded: without it SGD goes astray in many of them.

Accuracy of CIFAR ResNet-20 without half of its filters after two epochs of SGD at 0.001 on 5,000 images: 0.64 with it
and 0.27 without; where it is refitted before, 0.74, and without it the training diverges. A norm of 2 gives 0.50 and
0.73.
"""

_FORMAT = "pruning-hpo/training/1"

_UNREACHED = "The network can't be trained: no parameter reaches its logits. Prune less of it."

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How a network is trained.

    Attributes:
        n_epochs: passes over the images, at least 1.
        batch_size: images a step, at most; all steps of an epoch take equally many, up to one.
        learning_rate: positive; the largest of the schedule.
        optimizer: of `Optimizer`.
        momentum: of SGD, in [0, 1); `one-cycle` sets it itself.
        weight_decay: at least 0; of all parameters that are trained.
        schedule: of `Schedule`.
        max_gradient_norm: above 0; the gradient of all that is trained is scaled down to this l2 norm where it is
            larger. None leaves it.
        label_smoothing: share of each label that is spread over all classes, in [0, 1).
        patience: with validation images, epochs without a higher accuracy than before after which training ends; never
            by default.
        seed: of the images' order, of augmentation and of the network's own random steps (dropout).

    Raises:
        OptionError: a value is out of its range.
    """

    n_epochs: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    max_gradient_norm: float | None = None
    label_smoothing: float = 0.0
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("optimizer", get_args(Optimizer)), ("schedule", get_args(Schedule))):
            value = getattr(self, name)
            if value not in known:
                raise OptionError(f"Unknown {name} of a training {value!r}.{did_you_mean(str(value), known)}")
        ranges = {
            "n_epochs": ("at least 1", self.n_epochs >= 1),
            "batch_size": ("at least 1", self.batch_size >= 1),
            "learning_rate": ("positive and finite", 0 < self.learning_rate < math.inf),
            "momentum": ("in [0, 1)", 0 <= self.momentum < 1),
            "weight_decay": ("at least 0 and finite", 0 <= self.weight_decay < math.inf),
            "max_gradient_norm": (
                "positive and finite",
                self.max_gradient_norm is None or 0 < self.max_gradient_norm < math.inf,
            ),
            "label_smoothing": ("in [0, 1)", 0 <= self.label_smoothing < 1),
            "patience": ("at least 1", self.patience is None or self.patience >= 1),
            "seed": ("at least 0", self.seed >= 0),
        }
        for name, (wanted, is_so) in ranges.items():
            if not is_so:
                raise OptionError(f"`{name}` of a training must be {wanted}, but got {getattr(self, name)!r}.")


@dataclass(frozen=True, slots=True)
class Epoch:
    """What is known after an epoch.

    Attributes:
        number: from 1.
        n_epochs: that there will be at most.
        loss: mean over the epoch's images of the loss before their step.
        accuracy: on the validation images; None without any.
        seconds: that it took, validation included.
    """

    number: int
    n_epochs: int
    loss: float
    accuracy: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a training went.

    Attributes:
        epochs: all of them, also those before it was taken up again.
        kept: number of the epoch whose weights the network has: with validation images the first of those with the
            highest accuracy, otherwise the last.
    """

    epochs: tuple[Epoch, ...]
    kept: int


def train(
    network: nn.Module,
    images: LabelledImages,
    options: TrainingOptions,
    *,
    validation: LabelledImages | None = None,
    gradient_masks: Mapping[str, Tensor] | None = None,
    augment: Augmentation | None = None,
    generator: torch.Generator | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> TrainingResult:
    """Trains a network by cross entropy, in place.

    All parameters are trained, whatever `requires_grad` says, but for what `gradient_masks` freeze; buffers such as
    batch-norm statistics follow the images unless the network has folded them. Modes and `requires_grad` of all modules
    and parameters are put back at the end, and the global random state is left as it was.

    Args:
        network: maps images (N, C, H, W) to logits (N, classes); all of it is on one device.
        images: that it is trained on; on the network's device or the CPU, labels included.
        options: how.
        validation: images on which each epoch's weights are judged; the best are kept.
        gradient_masks: parameter name -> bool of the parameter's shape or one that broadcasts to it: true where it is
            trained. What is false stays bit for bit what it is; parameters that aren't named are trained wholly.
        augment: changes the images of every step.
        generator: of the order and of augmentation; its state is advanced. By default a new one, of the options' seed.
        checkpoint: a file in a directory that exists, written after each epoch. One that belongs to this training (the
            same initial weights, images, options and masks; augmentation isn't known) is gone on from; another is
            replaced with a warning. It isn't removed at the end.
        on_epoch: called after each epoch that is computed now, when its checkpoint is there.

    Returns:
        How it went.

    Raises:
        TrainingError: the loss or a weight isn't finite after an epoch, or the weights are too large to compute with at
            the end (the network is left with such weights), or no parameter reaches the logits.
        OptionError: `options.patience` without validation images.
        OutOfMemoryError: the device has no room for a batch.
    """
    if options.patience is not None and validation is None:
        raise OptionError(f"`patience` of a training needs validation images, but got patience={options.patience}.")
    if not any(True for _ in network.parameters()):
        raise TrainingError(_UNREACHED)
    if len(images) == 0:
        raise ValueError("A network can't be trained on no `images`.")
    masks = _checked_masks(network, gradient_masks or {})
    with _trainable(network), torch.enable_grad():
        run = _Run(network, images, options, validation, masks, augment, generator, checkpoint)
        run.restore()
        while not run.is_over:
            epoch = run.epoch()
            run.save()
            if on_epoch is not None:
                on_epoch(epoch)
        return run.result()


def _checked_masks(network: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the parameters' shapes, on their devices."""
    parameters = dict(network.named_parameters())
    checked = {}
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"`gradient_masks` name {name!r}, which is no parameter of the network.")
        shape = parameters[name].shape
        if mask.dtype != torch.bool or torch.broadcast_shapes(mask.shape, shape) != shape:
            raise ValueError(
                f"`gradient_masks[{name!r}]` must be bool of a shape that broadcasts to {tuple(shape)}, but got "
                f"{mask.dtype} of {tuple(mask.shape)}."
            )
        checked[name] = mask.to(parameters[name].device).expand(shape)
    return checked


@contextmanager
def _trainable(network: nn.Module) -> Iterator[None]:
    """Has all parameters require gradients and all modules in training mode while the block lasts."""
    modes = [(module, module.training) for module in network.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        network.requires_grad_(True)
        with plain_gradients(network):  # a canonical network's backward pass would be relevance
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


class _Run:
    """One training, from its beginning or a checkpoint to its end."""

    def __init__(
        self,
        network: nn.Module,
        images: LabelledImages,
        options: TrainingOptions,
        validation: LabelledImages | None,
        masks: dict[str, Tensor],
        augment: Augmentation | None,
        generator: torch.Generator | None,
        checkpoint: Path | None,
    ) -> None:
        self.network = network
        self.images = images
        self.options = options
        self.validation = validation
        self.augment = augment
        self.checkpoint = checkpoint
        self.generator = generator or torch.Generator().manual_seed(options.seed)
        self.parameters = dict(network.named_parameters())
        self.device = next(iter(self.parameters.values())).device
        self.frozen = {name: (mask, self.parameters[name].detach().clone()) for name, mask in masks.items()}
        self.n_batches = math.ceil(len(images) / options.batch_size)
        self.optimizer = _optimizer(list(self.parameters.values()), options)
        self.schedule = _schedule(self.optimizer, options, options.n_epochs * self.n_batches)
        self.epochs: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        # Before the first step: afterwards nothing tells what the training began with.
        self.fingerprint = "" if checkpoint is None else self._fingerprint()

    @property
    def kept(self) -> int:
        """Number of the epoch whose weights are kept, of those that there are."""
        if self.validation is None:
            return len(self.epochs)
        return max(self.epochs, key=lambda epoch: (epoch.accuracy or 0.0, -epoch.number)).number

    @property
    def is_over(self) -> bool:
        """Whether there are no more epochs."""
        n_epochs, patience = len(self.epochs), self.options.patience
        out_of_patience = patience is not None and n_epochs > 0 and n_epochs - self.kept >= patience
        return n_epochs == self.options.n_epochs or out_of_patience

    def result(self) -> TrainingResult:
        """Puts the weights that are kept into the network."""
        if self.best:
            self.network.load_state_dict(self.best)
        if not self._gives_finite_logits():
            raise self._diverged(self.kept, self.epochs[self.kept - 1].loss)
        return TrainingResult(tuple(self.epochs), self.kept)

    def _diverged(self, number: int, loss: float) -> TrainingError:
        return TrainingError(
            f"The training diverged in epoch {number} of {self.options.n_epochs} (loss {loss:.4g}) at a learning rate "
            f"of {self.options.learning_rate:g}; use a smaller one."
        )

    # An epoch.

    def epoch(self) -> Epoch:
        """Computes the next epoch."""
        start = time.perf_counter()
        number = len(self.epochs) + 1
        losses = self._steps(number)
        loss = float(losses.sum()) / len(self.images)
        state = self.network.state_dict().values()
        if not (math.isfinite(loss) and all(bool(value.isfinite().all()) for value in state)):
            raise self._diverged(number, loss)
        accuracy = self._accuracy()
        epoch = Epoch(number, self.options.n_epochs, loss, accuracy, time.perf_counter() - start)
        self.epochs.append(epoch)
        if self.validation is not None and self.kept == number:
            self.best = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        return epoch

    def _steps(self, number: int) -> Tensor:
        """All steps of an epoch; the loss of each, summed over its images."""
        self.network.train()
        order = torch.randperm(len(self.images), generator=self.generator)
        losses = []
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            # What the network itself draws must not depend on the epochs that were computed before a restart.
            seed = int(np.random.SeedSequence([self.options.seed, number]).generate_state(1)[0])
            for generator in [torch.default_generator, *(torch.cuda.default_generators[d.index] for d in devices)]:
                generator.manual_seed(seed)  # `torch.manual_seed` would seed devices that aren't forked, too
            for batch in order.tensor_split(self.n_batches):
                try:
                    losses.append(self._step(batch))
                except Exception as error:
                    if not lacks_memory(error):
                        raise
                    raise OutOfMemoryError(
                        f"Out of memory in training with batches of {len(batch)} images: {message_of(error)} Use a "
                        "smaller batch size of the training, or another --device."
                    ) from error
        return torch.stack(losses)

    def _step(self, batch: Tensor) -> Tensor:
        rows = batch.to(self.images.images.device)
        images = self.images.images[rows]
        if self.augment is not None:
            images = self.augment(images, self.generator)
        labels = self.images.labels[batch.to(self.images.labels.device)].to(self.device)
        logits = self.network(images.to(self.device))
        if not logits.requires_grad:
            raise TrainingError(_UNREACHED)
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=self.options.label_smoothing)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        for name, (mask, _) in self.frozen.items():
            if (gradient := self.parameters[name].grad) is not None:
                gradient.masked_fill_(~mask, 0)
        if self.options.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.options.max_gradient_norm)
        self.optimizer.step()
        with torch.no_grad():
            for name, (mask, value) in self.frozen.items():  # weight decay moves them without a gradient
                self.parameters[name].copy_(torch.where(mask, self.parameters[name], value))
        self.schedule.step()
        return loss.detach() * len(batch)

    def _gives_finite_logits(self) -> bool:
        """Whether it does on one batch: finite weights may be too large to compute with."""
        self.network.eval()
        with torch.no_grad():
            logits: Tensor = self.network(self.images.images[: self.options.batch_size].to(self.device))
        return bool(logits.isfinite().all())

    def _accuracy(self) -> float | None:
        if self.validation is None:
            return None
        self.network.eval()
        validation = LabelledImages(self.validation.images, self.validation.labels.to(self.device))
        batches = Batches("validation", self.options.batch_size)
        return float(correct_predictions(self.network, validation, batches).double().mean())

    # Checkpoints.

    def _fingerprint(self) -> str:
        """Of all that decides how the training goes, but for augmentation and the machine."""
        parts = [self.images] if self.validation is None else [self.images, self.validation]
        tensors = {f"initial.{name}": value for name, value in self.network.state_dict().items()}
        for index, part in enumerate(parts):
            tensors |= {f"images.{index}": part.images, f"labels.{index}": part.labels}
        tensors |= {f"mask.{name}": mask for name, (mask, _) in self.frozen.items()}
        tensors["generator"] = self.generator.get_state()
        return f"{json.dumps(asdict(self.options), sort_keys=True)} {state_fingerprint(tensors)}"

    def save(self) -> None:
        """Writes the checkpoint, if there is one; where it can't be written, training goes on without."""
        if self.checkpoint is None:
            return
        optimizer = self.optimizer.state_dict()
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {
            f"optimizer.{index}.{name}": value
            for index, state in optimizer["state"].items()
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        tensors["generator"] = self.generator.get_state()
        metadata = {
            "format": _FORMAT,
            "training": self.fingerprint,
            "epochs": json.dumps([asdict(epoch) for epoch in self.epochs]),
            "groups": json.dumps(optimizer["param_groups"]),
            "schedule": json.dumps(self.schedule.state_dict()),
        }
        owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            write_atomically(self.checkpoint, safetensors.torch.save(owned, metadata=metadata))
        except OSError as error:
            _log.warning("the training's checkpoint %s can't be written (%s)", self.checkpoint, error)

    def restore(self) -> None:
        """Goes on from the checkpoint, if there is one and it is this training's."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        try:
            with safetensors.safe_open(self.checkpoint, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it isn't a mapping)
        except (OSError, safetensors.SafetensorError) as error:
            _log.warning("the training's checkpoint %s can't be read (%s): beginning anew", self.checkpoint, error)
            return
        if metadata.get("format") != _FORMAT or metadata.get("training") != self.fingerprint:
            _log.warning("the checkpoint %s is another training's: beginning anew", self.checkpoint)
            return
        self.network.load_state_dict(_below("network.", tensors))
        self.best = {name: value.to(self.device) for name, value in _below("best.", tensors).items()}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _below("optimizer.", tensors).items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": json.loads(metadata["groups"])})
        self.schedule.load_state_dict(json.loads(metadata["schedule"]))
        self.generator.set_state(tensors["generator"])
        self.epochs = [Epoch(**epoch) for epoch in json.loads(metadata["epochs"])]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _optimizer(parameters: list[nn.Parameter], options: TrainingOptions) -> torch.optim.Optimizer:
    rate, decay = options.learning_rate, options.weight_decay
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=options.momentum, weight_decay=decay)


def _schedule(
    optimizer: torch.optim.Optimizer, options: TrainingOptions, n_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    match options.schedule:
        case "constant":
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        case "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=n_steps)
        case "one-cycle":
            cycles_momentum = options.optimizer == "adamw" or options.momentum > 0
            return torch.optim.lr_scheduler.OneCycleLR(
                optimizer, options.learning_rate, total_steps=n_steps, cycle_momentum=cycles_momentum
            )
