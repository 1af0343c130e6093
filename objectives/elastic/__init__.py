"""Elastic networks: nested levels of one network on one set of weights, switched at run time."""
