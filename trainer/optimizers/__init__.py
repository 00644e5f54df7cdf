"""Optimizers of this project that torch lacks, for `optimizer._target_`."""
