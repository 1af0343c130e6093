"""From scores to smaller networks: rates, ranking, masking, slimming, curves."""
