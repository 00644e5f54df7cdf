"""Computation of a run's memory and network traffic before it starts."""
