"""What starts the runs of a sweep, chosen by `launch=NAME`."""
