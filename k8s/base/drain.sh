# Envoy's preStop hook: returns when all requests are answered, or after DRAIN_S seconds. Then Envoy gets SIGTERM and
# ends at once, with whatever still runs. The sidecar is alive all that time: a native sidecar is stopped after Envoy.
set -u
here=$(dirname "${BASH_SOURCE[0]}")
# From now on /ready says no, and answers tell clients to close: HTTP/1.1 by `connection: close`, HTTP/2 by GOAWAY.
bash "$here/admin.sh" POST /healthcheck/fail >/dev/null || echo "drain: Envoy's admin interface does not answer" >&2
# Until every node has taken the pod out of the Service, new requests still come in, and are served.
sleep "$PROPAGATION_S"
end=$((SECONDS + DRAIN_S))
while ((SECONDS < end)); do
  active=$(bash "$here/admin.sh" GET '/stats?filter=^http\.ingress\.downstream_rq_active$') || exit 0
  [[ $active == *"downstream_rq_active: 0"* ]] && exit 0
  sleep 1
done
echo "drain: requests are left after ${DRAIN_S} s" >&2
