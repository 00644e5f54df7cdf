"""Backends, which start the runs of a sweep; `launch=NAME` chooses one."""
