"""The data pack: trained networks and labelled images that stand beside the repository."""

import os
import sys
from pathlib import Path

__all__ = ["data_pack"]


def data_pack() -> Path:
    """Its directory, `HPO_DATA_PACK` or `../shared/data` beside the repository; exits where there is none."""
    pack = Path(os.environ.get("HPO_DATA_PACK", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (pack / "cifar10" / "train_10k.npz").exists():
        sys.exit(f"There is no data pack in {pack}; set HPO_DATA_PACK.")
    return pack
