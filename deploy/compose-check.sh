#!/usr/bin/env bash
# Brings docker-compose.yml up for real, on a machine that need have no Docker and can pull no image; lets the profile
# `demo` close the loop there; asks a real Prometheus for what every panel of the dashboard shows; takes it all down.
#
#   sudo deploy/compose-check.sh [--keep-images DIRECTORY]
#
# Debian 12, root. dockerd is started only where none answers, and then ended again. Grafana has no stand-in image:
# it is left out, and its panels' queries are asked directly. After `make setup`, store and bus tests run on the
# same images too. Ends with 0 only if everything held.
set -euo pipefail
cd "$(dirname "$0")/.."

keep=
if [ "${1:-}" = --keep-images ]; then
  keep=$(realpath -m "${2:?a directory}")
elif [ $# -gt 0 ]; then
  sed -n '2,9s/^# \?//p' "$0" >&2
  exit 2
fi
[ "$(id -u)" -eq 0 ] || { echo "root is needed to install packages and to start dockerd" >&2; exit 2; }

began=$SECONDS
work=$(mktemp -d /tmp/ratchet-compose.XXXXXX)
dockerd_pid=
up=
export COMPOSE_PROJECT_NAME=ratchet-check

say() { printf '[%4s s] %s\n' "$((SECONDS - began))" "$*"; }
compose() { "${composer[@]}" --env-file "$work/env" --profile demo "$@"; }

finish() {
  local code=$?
  set +e
  if [ -n "$up" ]; then
    if [ "$code" -ne 0 ]; then
      compose ps --all 2> /dev/null || compose ps
      compose logs --no-color --tail=15
    fi
    compose down --volumes --timeout 20 > "$work/down.log" 2>&1
    say "taken down: $(docker ps --quiet | wc -l) containers left"
  fi
  if [ -n "$dockerd_pid" ]; then
    kill "$dockerd_pid"
    wait "$dockerd_pid" 2> /dev/null
    umount "$work"/run/netns/* 2> /dev/null
    ip link delete docker0 2> /dev/null
    iptables-restore < "$work/iptables"
    echo "$forwarding" > /proc/sys/net/ipv4/ip_forward
    say "the dockerd that this script started has ended; its bridge, its rules and its data are gone"
  fi
  rm -rf "$work"
  [ "$code" -eq 0 ] && say "everything held" || say "FAILED"
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

packages() {
  local missing=()
  command -v dockerd > /dev/null || docker info > /dev/null 2>&1 || missing+=(docker.io)
  command -v iptables > /dev/null || missing+=(iptables)
  command -v ip > /dev/null || missing+=(iproute2)
  docker compose version > /dev/null 2>&1 || command -v docker-compose > /dev/null || missing+=(docker-compose)
  command -v docker-init > /dev/null || missing+=(tini)
  command -v debootstrap > /dev/null || missing+=(debootstrap)
  [ ${#missing[@]} -eq 0 ] && return
  say "installing ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" > "$work/apt.log" 2>&1 \
    || { tail -5 "$work/apt.log"; exit 1; }
}

daemon() {
  if docker info > /dev/null 2>&1; then
    say "a Docker daemon answers already; it is used and left running"
    return
  fi
  local home=${keep:-$work/docker}
  mkdir -p "$home"
  export DOCKER_HOST=unix://$work/docker.sock
  iptables-save > "$work/iptables" 2> /dev/null # what the daemon changes on this machine, put back at the end
  forwarding=$(cat /proc/sys/net/ipv4/ip_forward)
  dockerd --host "$DOCKER_HOST" --data-root "$home/data" --exec-root "$work/run" --pidfile "$work/dockerd.pid" \
    > "$work/dockerd.log" 2>&1 &
  dockerd_pid=$!
  for _ in $(seq 100); do
    docker info > /dev/null 2>&1 && break
    kill -0 "$dockerd_pid" 2> /dev/null || { tail -5 "$work/dockerd.log"; exit 1; }
    sleep 0.3
  done
  say "dockerd $(docker version --format '{{.Server.Version}}') runs, storage $(docker info --format '{{.Driver}}')"
}

free_ports() {
  python3 - <<'PYTHON'
import socket

names = ("NATS", "POSTGRES", "GATEWAY", "ADMIN", "PROMETHEUS", "GRAFANA")
sockets = []
for name in names:
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    sockets.append(held)
    print(f"RATCHET_{name}_PORT={held.getsockname()[1]}")
PYTHON
}

sql() { compose exec -T postgres psql --username ratchet --dbname ratchet --no-align --tuples-only "$@"; }

packages
if docker compose version > /dev/null 2>&1; then composer=(docker compose); else composer=(docker-compose); fi
daemon

say "images that stand in for what a registry would give"
deploy/images.sh "$work/images" 2> "$work/images.log" || { tail -20 "$work/images.log"; exit 1; }

say "docker build"
docker build --network host --tag ratchet:local . > "$work/build.log" 2>&1 || { tail -20 "$work/build.log"; exit 1; }
say "built: $(docker image inspect --format '{{.Size}}' ratchet:local | awk '{ printf "%.2f GB", $1 / 1e9 }')"

# The very files that a user's `make-env.sh --demo` gives, with free ports, in a place of its own.
mkdir -p "$work/checkout/deploy"
cp deploy/make-env.sh "$work/checkout/deploy/"
"$work/checkout/deploy/make-env.sh" --demo > /dev/null
{ grep -v COMPOSE_PROJECT_NAME "$work/checkout/.env.demo"; free_ports; } > "$work/env"
prometheus=http://127.0.0.1:$(sed -n 's/^RATCHET_PROMETHEUS_PORT=//p' "$work/env")

say "compose up, with two scorers"
up=yes
mapfile -t services < <(compose config --services | grep -vx grafana)
compose up --detach --no-build --scale scorer=2 "${services[@]}" > "$work/up.log" 2>&1 || { tail -20 "$work/up.log"; exit 1; }
compose ps

demo=$(compose ps --quiet demo 2> /dev/null || compose ps --all --quiet demo)
say "the demo's agents trade; waiting for its end"
code=$(docker wait "$demo")
docker logs "$demo" 2>&1 | grep '^demo:' || docker logs --tail 20 "$demo"
[ "$code" -eq 0 ] || { say "the demo ended with code $code"; exit 1; }

say "in Postgres:"
for query in \
  "select count(*) || ' windows closed, ' || sum(trajectories) || ' trajectories' from windows where state = 'closed'" \
  "select count(*) || ' groups ' || state from groups group by state order by state" \
  "select count(*) || ' batches ' || state from batches group by state" \
  "select m.version || ' from ' || coalesce(m.parent, 'nothing') || ': ' || coalesce(d.state || ', ' || coalesce(d.reason, 'undecided'), 'registered') from models m left join deployments d using (policy, version) order by m.number"; do
  sql --command "$query" | sed 's/^/         /'
done
closed=$(sql --command "select count(*) from models join deployments using (policy, version)
  where method <> 'base' and state in ('promoted', 'superseded')")
[ "$closed" -gt 0 ] || { say "no trained version was promoted"; exit 1; }

if [ -x .venv/bin/python ]; then
  say "store and bus tests on these images, by testcontainers"
  TESTCONTAINERS_RYUK_DISABLED=true .venv/bin/python -m pytest -q --containers tests/recorder/test_store.py tests/shared/test_bus.py \
    | tail -3
fi

say "healthy containers: $(docker ps --filter health=healthy --quiet | wc -l); not: $(docker ps --filter health=unhealthy --quiet | wc -l)"
[ "$(docker ps --filter health=unhealthy --quiet | wc -l)" -eq 0 ]

say "every panel's query, asked of Prometheus $(curl -fsS "$prometheus/api/v1/status/buildinfo" | sed 's/.*"version":"\([^"]*\)".*/\1/')"
python3 deploy/ask-panels.py "$prometheus" deploy/grafana/dashboards/overview.json
