"""One HTTP request: its messages, its state, its decision."""
