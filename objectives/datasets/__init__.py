"""Data: labelled images from files, scikit-learn, timm's readers or the user's own code, split for one study.

`load_task` is the entry point; each source of images has a module of its own and registers itself by name.
"""

from objectives.datasets import digits, folder, npz, timm_readers  # noqa: F401 (each registers its source)
from objectives.datasets.sources import SOURCES, ImageSource, SourcePair
from objectives.datasets.tasks import LabelledImages, Task, known_classes, load_task

__all__ = ["ImageSource", "LabelledImages", "SOURCES", "SourcePair", "Task", "known_classes", "load_task"]
