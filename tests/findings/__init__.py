"""Published findings about averages of weights, reproduced at small size by this project's own commands."""
