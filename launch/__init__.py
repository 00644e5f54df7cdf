"""Runs seen from outside."""
