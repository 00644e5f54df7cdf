"""Export of a checkpoint's weights into files that load without this project."""
