"""TPE on ten ImageNet classes with DeiT-tiny and with MobileNetV2: has a transformer more to prune than a CNN?

    python benchmarks/imagenette.py [deit-mlp|deit-heads|mobilenetv2]

The ten classes of Imagenette; 10 references a class, 122 images searched on and 123 to confirm, of ImageNet's
validation set. Trials race; every heuristic and baseline is measured wholly. A resumable study through the command
line: stop it and start it again as you like. It needs the data pack (`HPO_DATA_PACK`, by default `../shared/data`
beside the repository) and about an hour of one core; the search evaluates in bfloat16, confirmation in float32. Writes
`benchmarks/results/imagenette_NAME.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from data_pack import IMAGENETTE, data_pack, imagenette
from studies import run

DEIT = ["--model", "deit_tiny_patch16_224"]
MOBILENET = ["--model", "mobilenetv2_100", "--model-option", "pad_type=same", "--mean", "0.5,0.5,0.5"]
NETWORKS = {
    "deit-mlp": ("imagenet_deit_tiny_patch16_224", [*DEIT, "--components", "mlp"]),
    "deit-heads": ("imagenet_deit_tiny_patch16_224", [*DEIT, "--components", "heads"]),
    "mobilenetv2": ("imagenet_mobilenetv2_100_qat", [*MOBILENET, "--std", "0.5,0.5,0.5"]),
}


def main(name: str) -> None:
    """Runs the study, or what is left of it, and prints its results."""
    pack = data_pack()
    classes = ",".join(map(str, IMAGENETTE))
    weights, network = NETWORKS[name]
    network = [*network, "--checkpoint", str(pack / "weights" / f"{weights}.safetensors"), "--classes", classes]
    # The images' shorter side becomes 256 pixels, of which the middle 224 are kept.
    network += ["--crop", "0.875", "--data", imagenette(pack)]
    search = ["--sampler", "tpe", "--n-trials", "100", "--pruner", "race", "--baselines", "--dtype", "bf16"]
    run(f"imagenette_{name.replace('-', '_')}", search, network)


if __name__ == "__main__":
    given = sys.argv[1:]
    if len(given) != 1 or given[0] not in NETWORKS:
        sys.exit(f"Usage: python {Path(__file__).name} {'|'.join(NETWORKS)}")
    main(given[0])
