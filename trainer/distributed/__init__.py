"""The processes of a run: how they join, agree, shard the model, stop and fail."""
