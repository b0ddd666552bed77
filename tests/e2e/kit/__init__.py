"""The parts of an end-to-end test: child processes, Envoy, scripted upstreams, clients that misbehave.

All are real (processes, sockets, HTTP) and none knows the inside of the sidecar. Each is a context manager that leaves
nothing behind, and each wait has a deadline and a message that says what did not happen.
"""
