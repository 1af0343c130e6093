"""The data pack: trained networks and labelled images that stand beside the repository."""

import os
import sys
from pathlib import Path

__all__ = ["IMAGENETTE", "cifar10", "data_pack", "imagenette"]

# Output indices of tench, English springer, cassette player, chain saw, church, French horn, garbage truck, gas pump,
# golf ball and parachute.
IMAGENETTE = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)


def data_pack() -> Path:
    """Its directory, `HPO_DATA_PACK` or `../shared/data` beside the repository; exits where there is none."""
    pack = Path(os.environ.get("HPO_DATA_PACK", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (pack / "cifar10" / "train_10k.npz").exists():
        sys.exit(f"There is no data pack in {pack}; set HPO_DATA_PACK.")
    return pack


def cifar10(pack: Path) -> str:
    """What `--data` calls its CIFAR-10 images: 10,000 to take references from, 4,943 to measure on."""
    return f"npz:{pack / 'cifar10' / 'train_10k.npz'},{pack / 'cifar10' / 'test_dev.npz'}"


def imagenette(pack: Path) -> str:
    """What `--data` calls its images of ten ImageNet classes: 1,000 to take references from, 245 to measure on."""
    images = pack / "imagenette160"
    return f"npz:{images / 'ref_100_per_class.npz'},{images / 'ilsvrcval490_dev.npz'}"
