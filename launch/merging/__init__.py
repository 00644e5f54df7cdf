"""Merge of checkpoints, of any library, into one set of weights."""
