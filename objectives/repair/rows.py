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

    def outputs_by_position(self, outputs: Tensor) -> Tensor:
        """(positions, outputs) of a value of the output's shape, at all of them."""
        if isinstance(self.module, nn.Conv2d):
            outputs = outputs.movedim(1, -1)
        return outputs.reshape(-1, self.n_outputs)

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
            module: its values; of a layer without groups.
            rows: (outputs,) indices, at least one; all by default.
            columns: (inputs,) indices; likewise.

        Returns:
            Inputs with these channels -> outputs with those.
        """
        weight: Tensor = module.weight if rows is None else module.weight[rows]
        weight = weight if columns is None else weight[:, columns]
        bias = module.bias if module.bias is None or rows is None else module.bias[rows]
        if weight.shape[1] == 0:
            return self._constant(weight.new_zeros(len(weight)) if bias is None else bias)
        if isinstance(module, nn.Conv2d):
            stride, padding, dilation = module.stride, module.padding, module.dilation
            return lambda inputs: nn.functional.conv2d(inputs, weight, bias, stride, padding, dilation)
        return lambda inputs: nn.functional.linear(inputs, weight, bias)

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
            inputs: (N, *input_shape); of a layer without groups some channels give their columns.
            positions: (P,), ascending.
            channels: (inputs,) of bool, of a layer with groups: whole groups to give alone.
        """
        image, place = positions // self.n_places, positions % self.n_places
        if isinstance(self.module, nn.Linear):
            return inputs.reshape(len(inputs), self.n_places, -1)[image, place].double()[None]
        first, end = int(image[0]), int(image[-1]) + 1
        part = inputs[first:end] if channels is None else inputs[first:end, channels]
        n_inputs = part.shape[1]
        # Channels last: of each pixel they are read together.
        left, right, top, bottom = _padding(self.module)
        height, width = part.shape[2] + top + bottom, part.shape[3] + left + right
        pixels = part.new_zeros(len(part), height, width, n_inputs)
        pixels[:, top : height - bottom, left : width - right] = part.movedim(1, -1)
        steps, row = self.module.stride, self.output_shape[2]
        corners = ((image - first) * height + place // row * steps[0]) * width + place % row * steps[1]
        down, across = (
            torch.arange(size, device=inputs.device) * dilation
            for size, dilation in zip(self.module.kernel_size, self.module.dilation, strict=True)
        )
        offsets = (down[:, None] * width + across).flatten()
        patches = pixels.flatten(0, 2).index_select(0, (corners[:, None] + offsets).flatten())
        if self.n_groups == 1:
            return patches.view(1, len(positions), -1).double()
        grouped = patches.view(len(positions), len(offsets), -1, int(self.module.weight.shape[1]))
        return grouped.permute(2, 0, 1, 3).flatten(2).double()


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
