"""From a composite to a sparsity-accuracy curve: models, data, attribution, pruning."""
