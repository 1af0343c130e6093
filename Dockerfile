# Targets `cpu` and `cuda`; both run as the user `hpo`, and write to /artifacts, /cache, /data and /tmp only.
#   docker build --target cpu -t pruning-hpo:cpu .
#   docker run --rm -v studies:/data pruning-hpo:cpu launch
FROM python:3.12.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TZ=UTC PATH=/opt/hpo/bin:$PATH

FROM base AS build
RUN python -m venv /opt/hpo

# Torch, the largest, is installed before the source is there: a change of the source doesn't install it again.
FROM build AS build-cpu
# Empty, the image holds CUDA's libraries as well and works all the same. `--index-url URL`, with the URL that PyTorch's
# installation page names for CPUs, leaves them out.
ARG TORCH_INDEX_OPTION=
# hadolint ignore=SC2086
RUN pip install --no-cache-dir $TORCH_INDEX_OPTION torch torchvision

FROM build AS build-cuda
# On Linux, the builds of the package index are those for CUDA, and bring its libraries.
RUN pip install --no-cache-dir torch torchvision

FROM build-cpu AS install-cpu
COPY . /src
RUN pip install --no-cache-dir "/src[postgresql,s3]"

FROM build-cuda AS install-cuda
COPY . /src
RUN pip install --no-cache-dir "/src[postgresql,s3]"

FROM base AS runtime
RUN useradd --create-home --uid 10001 hpo && install -d -o hpo -g hpo /artifacts /cache /data
# Matplotlib and others look for a place of their own, and the root may be read-only.
ENV XDG_CACHE_HOME=/tmp/cache XDG_CONFIG_HOME=/tmp/config XDG_DATA_HOME=/tmp/data \
    HPO_STORAGE=sqlite:////data/studies.db
USER 10001
WORKDIR /data
ENTRYPOINT ["hpo"]
CMD ["--help"]

FROM runtime AS cpu
COPY --from=install-cpu /opt/hpo /opt/hpo

FROM runtime AS cuda
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=install-cuda /opt/hpo /opt/hpo
