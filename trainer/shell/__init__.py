"""What the user sees and pastes: printed commands, and text from files that is safe for a terminal."""
