# The sidecar: `docker build -t extproc-queue:0.1.0 .` tests/unit/test_k8s.py runs these steps without Docker.
# Pin the digest of the base image that you have scanned: PYTHON=3.11-slim-bookworm@sha256:...
ARG PYTHON=3.11-slim-bookworm
# The same Python on the same Debian, with a C compiler: the core is compiled (docs/compiled.md), and nothing else.
ARG COMPILING=3.11-bookworm

FROM python:${COMPILING} AS build
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE NOTICE ./
COPY extproc ./extproc
# No pip in what is shipped. Wheels only for what it depends on. `--build-arg EXTPROC_COMPILE=` makes a pure one.
ARG EXTPROC_COMPILE=1
RUN python -m venv --without-pip /opt/extproc
RUN python -m pip --python /opt/extproc/bin/python install --no-cache-dir --only-binary=:all: ".[uvloop,otel,picker,valkey]"

FROM python:${PYTHON}
# A number, so that `runAsNonRoot` can check it; it needs no name, no home, and nothing it could write to.
USER 65532:65532
COPY --from=build /opt/extproc /opt/extproc
ENV PATH=/opt/extproc/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# As PID 1: it handles SIGTERM (drain) and starts no children, so no init is needed.
# No HEALTHCHECK: Kubernetes ignores it, and only the configuration knows the admin port.
ENTRYPOINT ["extproc"]
CMD ["serve", "--config", "/etc/extproc/sidecar.yaml"]
