"""What Envoy must be told, and whether it was."""
