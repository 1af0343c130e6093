"""Studies over composites: configuration, drivers, executors and the command line."""
