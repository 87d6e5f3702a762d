# One image for every service: `docker run ratchet run recorder`, `docker run ratchet migrate`.
FROM python:3.11-slim-bookworm AS build

# Where pip looks beside its default, for networks with an index, wheels or a certificate of their own.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

RUN python -m venv /opt/ratchet
ENV PATH=/opt/ratchet/bin:$PATH

# The heaviest first and by itself, at the exact release: a range would bring gigabytes of CUDA with it.
# For a small image pass --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU builds>.
RUN pip install torch==2.13.0

# Then what the projects ask for, before their code: a change of code does not install it all again. In a place of
# its own, because setuptools would take a module of this empty build for newer than the real one.
WORKDIR /requirements
COPY pyproject.toml ./
COPY sdk/pyproject.toml sdk/
RUN mkdir -p sdk/ratchet_sdk services shared examples \
    && touch sdk/ratchet_sdk/__init__.py services/__init__.py shared/__init__.py examples/__init__.py \
    && pip install ./sdk ".[train]"

WORKDIR /src
COPY . .
RUN pip install --no-deps --force-reinstall ./sdk .


FROM python:3.11-slim-bookworm

RUN groupadd --gid 10001 ratchet \
    && useradd --uid 10001 --gid ratchet --home-dir /var/lib/ratchet --create-home --shell /usr/sbin/nologin ratchet \
    && install -d -o ratchet -g ratchet /var/lib/ratchet/artifacts /var/lib/ratchet/wandb \
        /var/lib/ratchet/gateway-spool
COPY --from=build /opt/ratchet /opt/ratchet
ENV PATH=/opt/ratchet/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    RATCHET_HTTP_HOST=0.0.0.0 \
    RATCHET_HTTP_PORT=8000 \
    RATCHET_ARTIFACTS_DIR=/var/lib/ratchet/artifacts \
    RATCHET_WANDB_DIR=/var/lib/ratchet/wandb \
    RATCHET_GATEWAY_SPOOL_DIR=/var/lib/ratchet/gateway-spool
USER ratchet
WORKDIR /var/lib/ratchet
EXPOSE 8000
ENTRYPOINT ["python", "-m", "services.cli.main"]
CMD ["--help"]
