"""The hyperparameter search: Optuna proposes, Ray Tune runs, every trial is recorded."""
