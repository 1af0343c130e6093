"""Repair: a pruned network gets its accuracy back from the reference images alone, in closed form."""
