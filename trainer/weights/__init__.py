"""Weights in files and run directories: choosing, reading and loading them into a model, sharded or not."""
