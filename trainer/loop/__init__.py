"""The training loop and what takes part in it: metrics of a step, teachers, the user's callbacks, its errors."""
