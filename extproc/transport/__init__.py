"""How streams are carried: listeners, TLS, gRPC."""
