"""A convolution or dense layer as a linear map of rows: one row a position, one column a weight.

A position is a place of one image: (image, y, x) of a convolution's output, (image, token) of a dense layer's on a
sequence, the image alone of a dense layer's on a vector. Positions are numbered image by image, places in memory's
order. Groups of a convolution are maps of their own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from objectives.network import channel_axis

__all__ = ["Linear", "LinearLayer"]

Linear = nn.Conv2d | nn.Linear

# Patches are gathered pixel by pixel where the images have more than so many times their pixels; else the images are
# laid out channels last.
_SPARSE = 4


@dataclass(frozen=True, slots=True, eq=False)
class LinearLayer:
    """A layer whose rows can be read.

    Attributes:
        module: the layer; it isn't changed.
        output_shape: without the batch dimension.
    """

    module: Linear
    output_shape: tuple[int, ...]

    @property
    def n_places(self) -> int:
        """Positions of one image."""
        return math.prod(self.output_shape) // self.n_outputs

    @property
    def n_outputs(self) -> int:
        """Rows of the weight, over all groups."""
        return int(self.module.weight.shape[0])

    @property
    def n_groups(self) -> int:
        """Groups of the convolution; 1 for others."""
        return self.module.groups if isinstance(self.module, nn.Conv2d) else 1

    @property
    def is_depthwise(self) -> bool:
        """Whether each output reads one input channel, which no other output reads."""
        return 1 < self.n_groups == self.n_outputs == self.n_groups * self.module.weight.shape[1]

    @property
    def takes_some(self) -> bool:
        """Whether its outputs can be computed from some of its input channels, where the others are zero."""
        return self.n_groups == 1 or self.is_depthwise

    @property
    def n_columns(self) -> int:
        """Weights of one output."""
        return self.module.weight[0].numel()

    def weight(self) -> Tensor:
        """(groups, outputs of a group, columns) of the module's weight, columns in the order of `inputs_at`."""
        weight: Tensor = self.module.weight.detach()
        if isinstance(self.module, nn.Conv2d):
            weight = weight.permute(0, 2, 3, 1).contiguous()
        return weight.view(self.n_groups, -1, self.n_columns)

    def bias(self) -> Tensor:
        """(groups, outputs of a group) of the module's bias; zeros where it has none."""
        weight = self.module.weight
        bias: Tensor = weight.new_zeros(len(weight)) if self.module.bias is None else self.module.bias.detach()
        return bias.view(self.n_groups, -1)

    def replaced(self, weight: Tensor, bias: Tensor) -> Linear:
        """The layer with other values, given as `weight` and `bias` return them; they are rounded to its dtype."""
        own = self.module.weight
        weight = weight.flatten(0, 1)
        if isinstance(self.module, nn.Conv2d):
            weight = weight.unflatten(1, (*own.shape[2:], own.shape[1])).permute(0, 3, 1, 2)
        module = copy.copy(self.module)
        module._parameters = {
            name: nn.Parameter(value.to(own).contiguous(), requires_grad=False)
            for name, value in (("weight", weight), ("bias", bias.flatten()))
        }
        return module

    def outputs_at(self, outputs: Tensor, positions: Tensor) -> Tensor:
        """(P, outputs) of a value of the output's shape, (N, *output_shape), at some positions."""
        image, place = positions // self.n_places, positions % self.n_places
        if isinstance(self.module, nn.Conv2d):
            return outputs.flatten(2)[image, :, place]
        return outputs.reshape(len(outputs), self.n_places, -1)[image, place]

    def silenced(self, module: Linear, kept: Tensor) -> Linear:
        """A layer of this form whose pruned outputs are zero; `kept` is (outputs,) of bool."""
        own = LinearLayer(module, self.output_shape)
        by_group = kept.view(self.n_groups, -1)
        return self.replaced(
            torch.where(by_group[:, :, None], own.weight(), 0.0), torch.where(by_group, own.bias(), 0.0)
        )

    @property
    def axis(self) -> int:
        """Of the channels, in inputs and outputs, the batch dimension included."""
        return channel_axis(self.output_shape)

    def input_extremes(self, inputs: Tensor) -> Tensor:
        """(2, inputs): the least and the largest value of each input channel; NaN of one that has any."""
        axes = [axis for axis in range(inputs.ndim) if axis != self.axis]
        return torch.stack([inputs.amin(dim=axes), inputs.amax(dim=axes)])

    def between(self, module: Linear, rows: Tensor | None, columns: Tensor | None) -> Callable[[Tensor], Tensor]:
        """What a layer of this form computes of some outputs from some inputs, where its other inputs are zero.

        Args:
            module: its values; of a layer that takes some of its inputs.
            rows: (outputs,) indices, ascending, at least one; all by default.
            columns: (inputs,) indices; likewise.

        Returns:
            Inputs with these channels -> outputs with those.
        """
        if isinstance(module, nn.Conv2d) and self.is_depthwise:
            return self._between_depthwise(module, rows, columns)
        weight: Tensor = module.weight if rows is None else module.weight[rows]
        weight = weight if columns is None else weight[:, columns]
        bias = module.bias if module.bias is None or rows is None else module.bias[rows]
        if weight.shape[1] == 0:
            return self._constant(weight.new_zeros(len(weight)) if bias is None else bias)
        if isinstance(module, nn.Conv2d):
            stride, padding, dilation = module.stride, module.padding, module.dilation
            return lambda inputs: nn.functional.conv2d(inputs, weight, bias, stride, padding, dilation)
        return lambda inputs: nn.functional.linear(inputs, weight, bias)

    def _between_depthwise(
        self, module: nn.Conv2d, rows: Tensor | None, columns: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        """See `between`; what is kept without its input is constant."""
        every = torch.arange(self.n_outputs, device=module.weight.device)
        rows, columns = every if rows is None else rows, every if columns is None else columns
        biases = LinearLayer(module, self.output_shape).bias().flatten()
        constant = self._constant(biases[rows])
        places = torch.isin(rows, columns).nonzero().flatten()
        if len(places) == 0:
            return constant
        varying = rows[places]
        sources, weight, bias = torch.searchsorted(columns, varying), module.weight[varying], biases[varying]
        stride, padding, dilation = module.stride, module.padding, module.dilation

        def compute(inputs: Tensor) -> Tensor:
            read = inputs if len(sources) == len(columns) else inputs.index_select(1, sources)
            outputs = nn.functional.conv2d(read, weight, bias, stride, padding, dilation, len(varying))
            return outputs if len(places) == len(rows) else constant(inputs).index_copy(1, places, outputs)

        return compute

    def _constant(self, bias: Tensor) -> Callable[[Tensor], Tensor]:
        """What a layer computes that reads nothing: (outputs,) for any number of images."""
        shape = list(self.output_shape)
        shape[self.axis - 1] = len(bias)
        if isinstance(self.module, nn.Conv2d):
            bias = bias[:, None, None]
        return lambda inputs: bias.expand(len(inputs), *shape)

    def columns_of(self, channels: Tensor) -> Tensor:
        """(columns,) of bool: the columns of some input channels, of a layer without groups."""
        return channels.repeat(self.n_columns // len(channels))

    def inputs_of(self, groups: Tensor) -> Tensor:
        """(inputs,) of bool: the input channels of some groups, (groups,) of bool."""
        return groups.repeat_interleave(self.module.weight.shape[1])

    def inputs_at(self, inputs: Tensor, positions: Tensor, channels: Tensor | None = None) -> Tensor:
        """(groups, P, columns) in float64: what the weights are multiplied with at some positions.

        Args:
            inputs: (N, *input_shape); of a layer that takes some channels, some give their columns.
            positions: (P,), ascending.
            channels: (inputs,) of bool, of a layer with groups: whole groups of these inputs to give alone.
        """
        image, place = positions // self.n_places, positions % self.n_places
        if isinstance(self.module, nn.Linear):
            return inputs.reshape(len(inputs), self.n_places, -1)[image, place].double()[None]
        first, end = int(image[0]), int(image[-1]) + 1
        patches = self._patches(inputs[first:end], image - first, place, channels)
        if self.n_groups == 1:
            return patches.view(1, len(positions), -1).double()
        grouped: Tensor = patches.unflatten(2, (-1, int(self.module.weight.shape[1])))
        return grouped.permute(2, 0, 1, 3).flatten(2).double()

    def _patches(self, inputs: Tensor, image: Tensor, place: Tensor, channels: Tensor | None) -> Tensor:
        """(P, pixels of a patch, channels) of (N, inputs, H, W), with zeros beyond its edges."""
        assert isinstance(self.module, nn.Conv2d), "a dense layer has no patches"
        left, right, top, bottom = _padding(self.module)
        n_images, _, height, width = inputs.shape
        down, across = (
            torch.arange(size, device=inputs.device) * dilation
            for size, dilation in zip(self.module.kernel_size, self.module.dilation, strict=True)
        )
        steps, n_across = self.module.stride, self.output_shape[2]
        # (P, pixels), in the padded image.
        y = (place // n_across * steps[0])[:, None] + down.repeat_interleave(len(across))
        x = (place % n_across * steps[1])[:, None] + across.repeat(len(down))
        if _SPARSE * y.numel() < n_images * height * width:
            y, x = y - top, x - left
            is_inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            pixel = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
            values: Tensor = inputs.flatten(2)[image[:, None], :, pixel]
            return torch.where(is_inside[:, :, None], values if channels is None else values[:, :, channels], 0.0)
        inputs = inputs if channels is None else inputs[:, channels]
        height, width = height + top + bottom, width + left + right
        pixels = inputs.new_zeros(n_images, height, width, inputs.shape[1])
        pixels[:, top : height - bottom, left : width - right] = inputs.movedim(1, -1)
        patches = pixels.flatten(0, 2).index_select(0, ((image[:, None] * height + y) * width + x).flatten())
        return patches.view(*y.shape, -1)


def _padding(convolution: nn.Conv2d) -> list[int]:
    """Of zeros: left, right, top, bottom."""
    padding: list[int] = []
    for axis in (1, 0):
        if convolution.padding == "valid":
            padding += [0, 0]
        elif isinstance(convolution.padding, str):  # "same"
            total = convolution.dilation[axis] * (convolution.kernel_size[axis] - 1)
            padding += [total // 2, total - total // 2]
        else:
            padding += [int(convolution.padding[axis])] * 2
    return padding
