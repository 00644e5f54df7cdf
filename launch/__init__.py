"""Commands that start, resume, inspect, compare, evaluate, plan and export runs."""

import trainer as trainer  # as a program, `python -m launch…`, this puts the working directory last on the path
