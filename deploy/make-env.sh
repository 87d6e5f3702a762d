#!/usr/bin/env bash
# Writes .env (or, with --demo, .env.demo) for docker compose, with passwords made for this machine.
# A file that is there already is left as it is: its passwords are in the volumes.
set -euo pipefail
cd "$(dirname "$0")/.."

file=.env
settings=deploy/settings.env
if [ "${1:-}" = --demo ]; then
  file=.env.demo
  settings=deploy/demo.env
elif [ $# -gt 0 ]; then
  echo "usage: deploy/make-env.sh [--demo]" >&2
  exit 2
fi
if [ -e "$file" ]; then
  echo "$file is there already; remove it, and the volumes that know its passwords, to begin anew" >&2
  exit 0
fi

# A letter first: nats-server would read a value of digits alone, or 12e5, as a number.
secret() { printf 'r%s' "$(od -An -v -tx1 -N24 /dev/urandom | tr -d ' \n')"; }

project=ratchet
[ "$file" = .env ] || project=ratchet-demo # volumes of its own: the demo touches nothing that is kept

umask 077
cat > "$file" <<END
# Passwords of this machine, for docker compose; never commit this file. Settings stand in $settings.
COMPOSE_PROJECT_NAME=$project
RATCHET_SETTINGS_FILE=$settings
$(for user in OPERATOR RECORDER OUTCOME_TRACKER SCORER TRAINER DEPLOYER GATEWAY INFERENCE ADMIN WORLD; do
  echo "RATCHET_NATS_PASSWORD_$user=$(secret)"
done)
RATCHET_POSTGRES_PASSWORD=$(secret)
$(for role in RECORDER OUTCOME_TRACKER SCORER TRAINER DEPLOYER ADMIN READER; do
  echo "RATCHET_POSTGRES_PASSWORD_$role=$(secret)"
done)
RATCHET_ADMIN_TOKEN=$(secret)
RATCHET_GRAFANA_PASSWORD=$(secret)
# For RATCHET_JUDGE=ruler; only the scorer gets it.
RATCHET_JUDGE_API_KEY=
END
echo "$file written; readable by you alone"
