"""The built-in tasks, one file each: how a model is called, its loss and its metrics. `conf/task` selects one."""
