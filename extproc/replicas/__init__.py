"""Several sidecars, one queue: one of them leads and runs the core for all, the others forward what headers said.

    store (Valkey, Redis, Leases) ── who is alive ──▶ census ──▶ replica: whom to follow, or to lead
    session ─▶ shared gate ─▶ the core, if we lead; else ─▶ following ══ gRPC stream ══▶ leading ─▶ the leader's core

Rules of this house:
* The store says who is alive and nothing else. It is never on a request's path; gone, it changes nothing.
* Who dispatches is the sidecar that holds the request, and only on a grant of the leader that it follows now.
* A group of M of N sidecars uses M/N of each limit, and no more than its engines themselves show to be free.
* All in here but `links`, `stores` and `member` does no I/O and gets its clock and its network from outside.
"""
