"""Commands that start, resume, inspect, compare, evaluate, plan and export runs."""
