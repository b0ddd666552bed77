"""End-to-end tests: the real sidecar behind the real Envoy, real sockets on both sides. No fakes live here."""
