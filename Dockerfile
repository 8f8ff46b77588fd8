# One image per process: `docker build --target ingest|worker|archive|trainer|judge .`
# Compilers are in the build stages only; a process runs as no root, with the rooms it imports.

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN groupadd --system --gid 10001 eddyline \
 && useradd --system --uid 10001 --gid eddyline --home-dir /app --shell /usr/sbin/nologin eddyline \
 && install -d -o eddyline -g root -m 775 /app /var/lib/eddyline /var/lib/eddyline/generations \
    /var/lib/eddyline/archive /var/lib/eddyline/snapshots /var/lib/eddyline/judge

# The packages of the extra, at the versions and with the hashes of requirements.lock. What builds
# and installs them, pip 26.3 included, has its hashes in requirements-build.lock and stays in
# /opt/build. (pip 24.0 of this Python image refuses hashes from a constraints file; 26.3 does not.)
FROM python:3.11-slim-bookworm AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
# hnswlib has no wheel; without this it is built for the CPU of the machine that builds the image.
ENV HNSWLIB_NO_NATIVE=1
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ONLY_BINARY=:all:
WORKDIR /build
COPY pyproject.toml requirements.lock requirements-build.lock ./
RUN python -m venv /opt/build \
 && /opt/build/bin/pip install --require-hashes --no-deps --requirement requirements-build.lock \
 && python -m venv --without-pip /opt/venv
ENV PATH=/opt/build/bin:$PATH PIP_PYTHON=/opt/venv/bin/python
# ingest.txt, worker.txt, …: what the project and one of its extras ask for, one requirement a line.
RUN python -c 'import pathlib, tomllib; \
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text(encoding="utf-8"))["project"]; \
[pathlib.Path(f"{extra}.txt").write_text("\n".join([*project["dependencies"], *wanted])) \
 for extra, wanted in project["optional-dependencies"].items()]'

FROM build AS build-ingest
RUN pip install --require-hashes --constraint requirements.lock --requirement ingest.txt

# hnswlib is built from its hashed source by the tools in /opt/build.
FROM build AS build-worker
RUN PIP_PYTHON=/opt/build/bin/python pip wheel --no-build-isolation --no-deps \
    --no-binary hnswlib --wheel-dir /wheels --require-hashes --constraint requirements.lock \
    "$(grep '^hnswlib==' worker.txt)" \
 && pip install --no-deps --no-index /wheels/*.whl \
 && pip install --require-hashes --constraint requirements.lock --requirement worker.txt

FROM build AS build-archive
RUN pip install --require-hashes --constraint requirements.lock --requirement archive.txt

FROM build AS build-trainer
# If given, torch comes from this index first, its hashes unchecked: a CPU-only build saves 4 GB.
ARG TORCH_INDEX_URL=""
RUN if [ -n "$TORCH_INDEX_URL" ]; then \
      pip install --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' trainer.txt)"; \
    fi \
 && pip install --require-hashes --constraint requirements.lock --requirement trainer.txt

# With the worker's packages, as hnswlib is built for them.
FROM build-worker AS build-judge
RUN pip install --require-hashes --constraint requirements.lock --requirement judge.txt

FROM base AS runtime
# gRPC's C core writes lines of its own format. A process under another uid has no home folder.
ENV PATH=/opt/venv/bin:$PATH EDDYLINE_DATA_DIR=/var/lib/eddyline GRPC_VERBOSITY=NONE HOME=/tmp
WORKDIR /app

# Packages first: a change of code copies nothing but code.
FROM runtime AS ingest
COPY --from=build-ingest /opt/venv /opt/venv
COPY cli cli
COPY eddyline eddyline
COPY embeddings embeddings
COPY streams streams
USER eddyline
CMD ["python", "-m", "streams"]

FROM runtime AS worker
COPY --from=build-worker /opt/venv /opt/venv
COPY cli cli
COPY eddyline eddyline
COPY embeddings embeddings
COPY index index
COPY serving serving
USER eddyline
EXPOSE 50051
CMD ["python", "-m", "serving"]

FROM runtime AS archive
COPY --from=build-archive /opt/venv /opt/venv
COPY cli cli
COPY eddyline eddyline
COPY embeddings embeddings
COPY streams streams
USER eddyline
CMD ["python", "-m", "streams.archive"]

FROM runtime AS judge
COPY --from=build-judge /opt/venv /opt/venv
COPY cli cli
COPY eddyline eddyline
COPY embeddings embeddings
COPY evaluation evaluation
COPY index index
COPY serving serving
COPY streams streams
USER eddyline
CMD ["python", "-m", "evaluation.judge"]

FROM runtime AS trainer
COPY --from=build-trainer /opt/venv /opt/venv
COPY cli cli
COPY eddyline eddyline
COPY embeddings embeddings
USER eddyline
CMD ["python", "-m", "embeddings.training"]
