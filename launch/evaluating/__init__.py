"""A checkpoint evaluated again, in any number of processes."""
