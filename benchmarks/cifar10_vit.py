"""The whole grid on CIFAR-10 with a vision transformer: 1,536 composites, 10 references a class, 1,000 images.

    python benchmarks/cifar10_vit.py [mlp|heads]

The network is the data pack's: 4 blocks of 4 heads, 128 channels, 1,536 neurons in its MLPs. Trials race against the
best one so far at a risk of 5 %; confirmation is exact, of the ten best and of every heuristic and baseline. A
resumable study through the command line: stop it and start it again as you like. It needs the data pack
(`HPO_DATA_PACK`, by default `../shared/data` beside the repository) and three hours of one core for `mlp`, half an hour
for `heads`; the search evaluates in bfloat16, confirmation in float32. Writes
`benchmarks/results/cifar10_vit_mlp.json` or `..._heads.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from data_pack import cifar10, data_pack
from studies import run

NETWORK = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2,
    "num_classes": 10,
}
COMPONENTS = ("mlp", "heads")


def main(components: str) -> None:
    """Runs the study, or what is left of it, and prints its results."""
    pack = data_pack()
    space = str(Path(__file__).with_suffix(".toml"))
    network = ["--model", "vit_tiny_patch16_224"]
    network += [part for key, value in NETWORK.items() for part in ("--model-option", f"{key}={value}")]
    network += ["--checkpoint", str(pack / "weights" / "cifar10_vit_p4_d128_l4_h4.safetensors")]
    network += ["--size", "32", "--crop", "1", "--mean", "0.4914,0.4822,0.4465", "--std", "0.2470,0.2435,0.2616"]
    network += ["--data", cifar10(pack)]
    search = ["--sampler", "grid", "--pruner", "race", "--space", space, "--baselines", "--dtype", "bf16"]
    search += ["--components", components, "--trials-per-batch", "64", "--race-risk", "0.05"]
    run(f"cifar10_vit_{components}", search, network, confirm_best=True)


if __name__ == "__main__":
    given = sys.argv[1:] or COMPONENTS[:1]
    if len(given) != 1 or given[0] not in COMPONENTS:
        sys.exit(f"Usage: python {Path(__file__).name} [{'|'.join(COMPONENTS)}]")
    main(given[0])
