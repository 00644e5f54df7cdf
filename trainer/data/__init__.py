"""The built-in data sets, one file each with a function that returns `trainer.protocols.Splits`.

`conf/data` selects one. A new data set is one such file and one YAML file. Its arguments must have type annotations,
because configurations are checked against them.
"""
