"""Counting: which evaluation images a pruned network still classifies correctly."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn

from objectives.datasets import LabelledImages
from objectives.fingerprints import state_fingerprint
from objectives.memory import Batches
from objectives.network import CanonicalNetwork
from objectives.pruning.fusion import fused, images_cached
from objectives.pruning.masking import kept_outputs
from objectives.pruning.program import Program
from objectives.pruning.ranking import Masks
from objectives.pruning.slimming import Cost, Draft, cost, depends_on_images, draft
from objectives.pruning.stacking import StackedNetwork
from objectives.pruning.trained import TrainedWeights
from objectives.repair.repairer import Repairer
from search_spaces.repairs import NO_REPAIR, RepairSpec

__all__ = ["Evaluator", "KnownMeasurement", "Measurement", "News", "correct_predictions"]

_BYTES_KEPT = 128 * 2**20
# Of a measurement, beyond its images: Python's objects.
_BYTES_BESIDE = 1024
# Multiply-adds that a slim network must save to be worth its making, which takes some 25 ms: what a CPU's core does in
# that time (measured with AVX-512 and AMX). In other dtypes slim networks are always made.
_WORTH_MAKING = {torch.float32: 10**9, torch.bfloat16: 3 * 10**9}
# Multiply-adds of a mask on all its images up to which a GPU runs the unpruned network under several masks at once:
# what it does while its host makes a slim network, reckoned from 20 ms and 10 trillion a second.
_STACKED_FLOPS = 2 * 10**11
# Of the ways in which masks are measured: another number wherever they come to round differently.
_FORM = 2
# Images times masks of such a pass, at most, and what its largest step may take.
_STACKED_IMAGES = 4096
_STACKED_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """One pruned network, measured.

    Attributes:
        correct: (N,) of bool, on the evaluator's device: whether each image it was measured on is classified correctly.
        count: counts `cost`.
    """

    correct: Tensor
    count: Callable[[], Cost]

    @property
    def cost(self) -> Cost:
        """Size of the exact slim network."""
        return self.count()


@dataclass(frozen=True, slots=True)
class KnownMeasurement:
    """A measurement in the form in which it is sent and stored.

    Attributes:
        mask: hexadecimal digest of the masks, and of the repair and trained weights where there are any.
        n_images: evaluation images.
        correct: one bit an image, the first in the highest bit of the first byte.
        cost: size of the exact slim network.
    """

    mask: str
    n_images: int
    correct: bytes
    cost: Cost

    @classmethod
    def of(cls, mask: str, measurement: Measurement) -> KnownMeasurement:
        """The compact form of a measurement."""
        bits = np.packbits(measurement.correct.cpu().numpy())
        return cls(mask, len(measurement.correct), bits.tobytes(), measurement.cost)

    def measurement(self, device: torch.device) -> Measurement:
        """The measurement itself."""
        bits = np.unpackbits(np.frombuffer(self.correct, np.uint8), count=self.n_images)
        return Measurement(torch.from_numpy(bits.astype(bool)).to(device), lambda: self.cost)


@dataclass(frozen=True, slots=True)
class News:
    """What an evaluator was asked for, and has found.

    Attributes:
        measurements: of masks that nothing was known of, for `Evaluator.learn` elsewhere; without those that were
            measured in parts or in halved batches, which may differ by rounding.
        n_masks: distinct masks asked for.
        n_known: those of which the measurement was known.
    """

    measurements: tuple[KnownMeasurement, ...]
    n_masks: int
    n_known: int


def correct_predictions(
    network: Callable[[Tensor], Tensor], images: LabelledImages, batches: Batches, at_most: int | None = None
) -> Tensor:
    """(N,) of bool, on the labels' device: whether the largest logit is the label's.

    Args:
        network: maps images to logits.
        images: to classify.
        batches: images a pass.
        at_most: images a pass beyond which larger batches gain nothing.

    Raises:
        OutOfMemoryError: not even a single image fits on the device.
    """
    return batches.run(partial(_judged, network, images, _is_correct), at_most)


def _judged(
    network: Callable[[Tensor], Tensor],
    images: LabelledImages,
    judge: Callable[[Tensor, Tensor], Tensor],
    batch_size: int,
) -> Tensor:
    """(..., N) on the labels' device: what `judge` makes of logits (..., n, classes) and labels (n,) of every batch."""
    with torch.inference_mode():
        parts = [
            judge(network(batch.to(labels.device)), labels)
            for batch, labels in zip(images.images.split(batch_size), images.labels.split(batch_size), strict=True)
        ]
        return torch.cat(parts, dim=-1)


def _is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=-1) == labels


class Evaluator:
    """Measures masks of one network on fixed images, each distinct mask and repair on each image once.

    Accuracy is counted on the exact slim network, or on the masked one, which equals it. All composites share what is
    measured of the unpruned network and of the one without components; the least recently used masks are forgotten
    where there are many. A network whose logits no image reaches is run on a single image. Nothing here waits for the
    device.

    Where a device computes the unpruned network sooner than a slim one is made, that one runs, with zeros in place of
    what is pruned: on CPUs small ones on few images, on GPUs larger ones, and several masks at once.

    Not thread-safe.

    Args:
        network: canonical.
        images: kept in memory in the dtype of evaluation; labels are on the network's device, and so are the images
            where it has room for them.
        batches: images a forward pass, at most; on a CPU fewer where its caches hold fewer.
        dtype: of weights and images.
        repairer: of this network; needed to measure repaired networks only.
        stacks: whether small networks are measured under several masks at once; by default on GPUs.
    """

    def __init__(
        self,
        network: CanonicalNetwork,
        images: LabelledImages,
        batches: Batches,
        dtype: torch.dtype = torch.float32,
        repairer: Repairer | None = None,
        *,
        stacks: bool | None = None,
    ) -> None:
        self.network = network
        self.images = images
        self.batches = batches
        self.dtype = dtype
        self.repairer = repairer
        self._stacks = images.labels.is_cuda if stacks is None else stacks
        self._masks_a_pass = Batches("the evaluation of several masks", _STACKED_IMAGES)
        self._measured: OrderedDict[str, Measurement] = OrderedDict()
        self._learnt: dict[str, KnownMeasurement] = {}
        self._new: list[str] = []
        self._asked: dict[str, bool] = {}  # whether it was known then

    @cached_property
    def origin(self) -> str:
        """Hexadecimal digest of everything that a measurement depends on, rounding included.

        But for the masks, the repair and the references that it is made with, and trained weights, which stand in each
        measurement's key; and for how many masks a pass on a GPU had, which may choose other kernels.
        """
        module, images = self.network.module, self.images
        content = [
            module.code,
            str(module),
            state_fingerprint(module.state_dict()),
            state_fingerprint({"images": images.images, "labels": images.labels}),
            torch.__version__,
            _FORM,
            _processor(images.labels.device),
            torch.get_num_threads(),
            self.batches.asked,
            # Masks don't say whose they are.
            *([] if self.network.choice == "all" else [self.network.choice]),
            *(["stacks"] if self._stacks else []),
        ]
        return hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()

    def measure(
        self,
        masks: Masks,
        n_images: int | None = None,
        repair: RepairSpec = NO_REPAIR,
        weights: TrainedWeights | None = None,
        *,
        ahead: Iterable[Masks] = (),
    ) -> Measurement:
        """Accuracy and size under masks.

        Args:
            masks: of components that are kept.
            n_images: how many images to measure on, the first ones; all by default.
            repair: of the pruned network, unless it has weights of its own.
            weights: of the pruned network, which were repaired before they were trained; by default the unpruned one's.
            ahead: masks of which the same is likely to be asked next, and which may be measured with these; neither
                repaired nor of other weights.

        Raises:
            RepairError: the pruned network can't be repaired.
            OutOfMemoryError: not even a single image fits on the device.
        """
        wanted = len(self.images) if n_images is None else n_images
        repair = repair if weights is None else NO_REPAIR
        mask = self._key(masks, repair, weights)
        n_known = self._n_known(mask)
        self._asked.setdefault(mask, n_known >= wanted)
        if n_known < wanted:
            part = slice(n_known, wanted)
            images = LabelledImages(self.images.images[part], self.images.labels[part])
            if repair or weights is not None:
                self._add(mask, self._measure(self._draft(masks, repair, weights), images), repair)
            elif self._stacks_on(images):
                self._measure_stacked(mask, masks, ahead, images)
            elif self._is_worth_making(masks, images):
                self._add(mask, self._measure(draft(self.network, masks), images))
            else:
                self._add(mask, self._measure_silenced(masks, images))
        measured = self._measured[mask]
        return measured if len(measured.correct) == wanted else Measurement(measured.correct[:wanted], measured.count)

    def loss(self, masks: Masks, repair: RepairSpec = NO_REPAIR, weights: TrainedWeights | None = None) -> float:
        """Mean cross entropy of the true class under masks, on all images; computed anew each time.

        Args:
            masks: see `measure`.
            repair: likewise.
            weights: likewise.

        Raises:
            RepairError: the pruned network can't be repaired.
            OutOfMemoryError: not even a single image fits on the device.
        """
        program = fused(self._prepared(self._draft(masks, repair, weights)))
        at_most = images_cached(program.graph, self.dtype, self.images.labels.device)
        losses = self.batches.run(partial(_judged, program, self.images, _cross_entropy), at_most)
        return float(losses.mean())

    def learn(self, measurements: Iterable[KnownMeasurement]) -> None:
        """Takes over what is known of this `origin` from elsewhere; all of it is kept."""
        self._learnt.update((known.mask, known) for known in measurements)

    def news(self) -> News:
        """What there is to say since this was last asked for."""
        measurements = tuple(
            KnownMeasurement.of(mask, self._measured[mask])
            for mask in dict.fromkeys(self._new)
            if mask in self._measured
        )
        news = News(measurements, len(self._asked), sum(self._asked.values()))
        self._new, self._asked = [], {}
        return news

    def _key(self, masks: Masks, repair: RepairSpec, weights: TrainedWeights | None) -> str:
        content = self._packed(masks)
        # A repair changes nothing where nothing is pruned.
        if repair and not all(bool(mask.all()) for mask in masks.values()):
            content += f"{repair} {self._repairer.fingerprint}".encode()
        if weights is not None:
            content += f"trained {weights.fingerprint}".encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def _packed(self, masks: Masks) -> bytes:
        """One bit a component, in the network's order."""
        return np.packbits(torch.cat([masks[name].cpu() for name in self.network.components]).numpy()).tobytes()

    @property
    def _repairer(self) -> Repairer:
        if self.repairer is None:
            raise ValueError("An evaluator without a `repairer` measures no repaired networks.")
        return self.repairer

    def _n_known(self, mask: str) -> int:
        """Images that a mask has been measured on; it counts as used."""
        known = self._measured.get(mask)
        if known is None and (learnt := self._learnt.get(mask)) is not None:
            known = learnt.measurement(self.images.labels.device)
        if known is None:
            return 0
        self._keep(mask, known)
        return len(known.correct)

    def _add(self, mask: str, new: Measurement, repair: RepairSpec = NO_REPAIR) -> None:
        """A measurement on further images."""
        known = self._measured.get(mask)
        self._keep(mask, new if known is None else Measurement(torch.cat([known.correct, new.correct]), new.count))
        # Other batches round in another way, and elsewhere it would be measured at once.
        batches = [self.batches, *([self._repairer.batches] if repair else [])]
        as_asked = all(each.size == each.asked for each in batches)
        if known is None and len(new.correct) == len(self.images) and as_asked:
            self._new.append(mask)

    def _keep(self, mask: str, measurement: Measurement) -> None:
        self._measured[mask] = measurement
        self._measured.move_to_end(mask)
        if len(self._measured) * (len(self.images) + _BYTES_BESIDE) > _BYTES_KEPT:
            self._measured.popitem(last=False)

    def _draft(self, masks: Masks, repair: RepairSpec, weights: TrainedWeights | None) -> Draft:
        if weights is not None:
            return draft(weights.on(self.network), masks)
        return draft(self._repairer.repaired(masks, repair) if repair else self.network, masks)

    def _prepared(self, exact: Draft) -> Draft:
        """In the dtype and memory format of evaluation."""
        return exact.to(self.dtype).to(memory_format=torch.channels_last)

    def _measure(self, exact: Draft, images: LabelledImages) -> Measurement:
        size, is_alive = cost(exact), depends_on_images(exact)
        program = fused(self._prepared(exact))
        if is_alive:
            return Measurement(self._correct(program, images), lambda: size)
        one = images.images[:1].to(images.labels.device)
        with torch.inference_mode():
            return Measurement(_is_correct(program(one), images.labels), lambda: size)

    def _correct(self, program: Program, images: LabelledImages) -> Tensor:
        at_most = images_cached(program.graph, self.dtype, images.labels.device)
        return correct_predictions(program, images, self.batches, at_most)

    # On the unpruned network.

    @cached_property
    def _unpruned_flops(self) -> int:
        return cost(self.network.module).flops

    @cached_property
    def _unpruned(self) -> Program:
        return fused(self._prepared(draft(self.network, {})), moves=False)

    @cached_property
    def _prunable_flops(self) -> int:
        nothing = {name: torch.zeros(width, dtype=torch.bool) for name, width in self.network.components.items()}
        return self._unpruned_flops - cost(draft(self.network, nothing)).flops

    def _is_worth_making(self, masks: Masks, images: LabelledImages) -> bool:
        """Whether the slim network of these masks is made for these images: on a CPU if it saves time.

        That of all components is measured once, and no second network kept for it.
        """
        n_pruned = sum(int((~mask).sum()) for mask in masks.values())
        if self.images.labels.is_cuda or n_pruned == 0 or self.dtype not in _WORTH_MAKING:
            return True
        share = n_pruned / sum(map(len, masks.values()))
        saved = share * self._prunable_flops * len(images)
        return bool(saved > _WORTH_MAKING[self.dtype] * torch.get_num_threads())

    def _measure_silenced(self, masks: Masks, images: LabelledImages) -> Measurement:
        program = self._unpruned.silenced(kept_outputs(self.network.prunable, masks))
        return Measurement(self._correct(program, images), self._cost_of(masks))

    def _cost_of(self, masks: Masks) -> Callable[[], Cost]:
        """Counts the slim network's size when it is first asked for; until then it keeps the masks' bits alone."""
        network, packed = self.network, self._packed(masks)

        @cache
        def count() -> Cost:
            widths = network.components
            bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=sum(widths.values()))
            parts = torch.from_numpy(bits.astype(bool)).split(list(widths.values()))
            return cost(draft(network, dict(zip(widths, parts, strict=True))))

        return count

    # Several masks at once.

    @cached_property
    def _stacked(self) -> StackedNetwork:
        return StackedNetwork(self.network, self.dtype)

    def _stacks_on(self, images: LabelledImages) -> bool:
        """Whether masks are measured together on these images."""
        return self._stacks and self._unpruned_flops * len(images) <= _STACKED_FLOPS

    def _measure_stacked(self, mask: str, masks: Masks, ahead: Iterable[Masks], images: LabelledImages) -> None:
        """Measures masks on further images, and as many of those ahead that lack the same ones as a pass has room for.

        Args:
            mask: key of the masks.
            masks: to measure.
            ahead: others.
            images: those that follow the ones that the masks have been measured on.

        Raises:
            OutOfMemoryError: not even a single image under a single mask fits on the device.
        """
        n_known = self._n_known(mask)
        per_image = self._stacked.largest_step * self.dtype.itemsize
        n_images = min(_STACKED_IMAGES, _STACKED_BYTES // per_image)
        n_kept = _BYTES_KEPT // (len(self.images) + _BYTES_BESIDE)
        n_masks = min(n_images // min(self.batches.asked, len(images)), self._masks_a_pass.size, n_kept)
        chosen = {mask: masks}
        others = iter(ahead)
        while len(chosen) < n_masks and (other := next(others, None)) is not None:
            key = self._key(other, NO_REPAIR, None)
            known = self._measured.get(key)
            if key not in self._learnt and (0 if known is None else len(known.correct)) == n_known:
                chosen[key] = other
        stack = list(chosen.values())

        def together(n_masks: int) -> Tensor:
            parts = [stack[start : start + n_masks] for start in range(0, len(stack), n_masks)]
            return torch.cat([self._correct_under(each, images) for each in parts])

        correct = self._masks_a_pass.run(together, len(stack))
        for (key, each), row in zip(chosen.items(), correct, strict=True):
            self._asked.setdefault(key, False)
            self._add(key, Measurement(row, self._cost_of(each)))

    def _correct_under(self, masks: Sequence[Masks], images: LabelledImages) -> Tensor:
        """(M, N) of bool; where memory runs out under a single mask, batches are halved."""
        network = partial(self._stacked, factors=self._stacked.factors(masks, images.labels.device))
        if len(masks) == 1:
            return correct_predictions(network, images, self.batches)
        return _judged(network, images, _is_correct, self.batches.size)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.double(), labels, reduction="none")


def _processor(device: torch.device) -> str:
    """What computes, as far as it decides which kernels do."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
