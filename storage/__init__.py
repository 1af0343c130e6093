"""The study store: studies, trials, curves and artifacts in any database that Optuna takes."""
