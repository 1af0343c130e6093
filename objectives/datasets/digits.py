"""The handwritten digits inside scikit-learn: `--data digits`."""

from objectives.datasets.labels import LabelSet
from objectives.datasets.sources import ArraySource, SourcePair, register_source
from objectives.digits import digits_data
from objectives.errors import DataError

__all__ = ["open_digits"]


@register_source("digits")
def open_digits(argument: str, labels: LabelSet) -> SourcePair:
    """The 1,000 training and 797 evaluation images of `digits_data`."""
    if argument:
        raise DataError(f"The data `digits` takes no argument, but got {argument!r}; write --data digits.")
    data = digits_data()
    return SourcePair(
        ArraySource(data.train_images, data.train_labels, "digits/train"),
        ArraySource(data.evaluation_images, data.evaluation_labels, "digits/evaluation"),
        {digit: str(digit) for digit in range(10)},
    )
