"""Data sets, one file each: a callable that returns `trainer.protocols.Splits`. `conf/data` names them.

A new one is one such file and one YAML file; every argument is annotated, because configs are checked against
it.
"""
