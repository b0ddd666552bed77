"""Who is there and how they fare: discovery, health checks, telemetry."""
