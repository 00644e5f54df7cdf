"""What a run can be made of: one group of YAML files per kind of choice. Values live in `trainer.config.schema`."""
