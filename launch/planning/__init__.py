"""What a run would hold and send, before it is started."""
