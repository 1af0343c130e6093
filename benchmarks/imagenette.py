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

from data_pack import data_pack
from studies import run

# Output indices of tench, English springer, cassette player, chain saw, church, French horn, garbage truck, gas pump,
# golf ball and parachute.
CLASSES = "0,217,482,491,497,566,569,571,574,701"
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
    images = pack / "imagenette160"
    weights, network = NETWORKS[name]
    network = [*network, "--checkpoint", str(pack / "weights" / f"{weights}.safetensors"), "--classes", CLASSES]
    # The images' shorter side becomes 256 pixels, of which the middle 224 are kept.
    data = f"npz:{images / 'ref_100_per_class.npz'},{images / 'ilsvrcval490_dev.npz'}"
    network += ["--crop", "0.875", "--data", data]
    search = ["--sampler", "tpe", "--n-trials", "100", "--pruner", "race", "--baselines", "--dtype", "bf16"]
    run(f"imagenette_{name.replace('-', '_')}", search, network)


if __name__ == "__main__":
    given = sys.argv[1:]
    if len(given) != 1 or given[0] not in NETWORKS:
        sys.exit(f"Usage: python {Path(__file__).name} {'|'.join(NETWORKS)}")
    main(given[0])
