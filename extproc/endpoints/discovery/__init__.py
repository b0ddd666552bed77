"""Endpoints that come and go: who sees them, who follows them, and how Envoy learns of them in time."""
