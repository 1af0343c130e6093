# Targets: `cpu` and `cuda`; both run as an unprivileged user.
#   docker build --target cpu -t pruning-hpo:cpu .
FROM python:3.12.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md ./
COPY hpo hpo
COPY objectives objectives
COPY search_spaces search_spaces
COPY storage storage

FROM build AS build-cpu
# Without an index of CPU builds, the image holds CUDA's packages as well; it works all the same.
ARG TORCH_INDEX_OPTION=
RUN python -m venv /opt/hpo && /opt/hpo/bin/pip install --no-cache-dir $TORCH_INDEX_OPTION torch torchvision .

FROM build AS build-cuda
RUN python -m venv /opt/hpo && /opt/hpo/bin/pip install --no-cache-dir torch torchvision .

FROM python:3.12.11-slim-bookworm AS base
RUN useradd --create-home --uid 10001 hpo && install -d -o hpo -g hpo /data
ENV PATH=/opt/hpo/bin:$PATH HPO_STORAGE=sqlite:////data/studies.db PYTHONUNBUFFERED=1 TZ=UTC
USER hpo
WORKDIR /home/hpo
VOLUME /data
ENTRYPOINT ["hpo"]
CMD ["--help"]

FROM base AS cpu
COPY --from=build-cpu /opt/hpo /opt/hpo

FROM base AS cuda
COPY --from=build-cuda /opt/hpo /opt/hpo
