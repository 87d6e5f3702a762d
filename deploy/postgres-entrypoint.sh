#!/usr/bin/env bash
# For the stand-in image that deploy/images.sh makes from Debian's Postgres: the part of the official image's
# entry point that docker-compose.yml uses (POSTGRES_USER, POSTGRES_PASSWORD, POSTGRES_DB, PGDATA).
set -euo pipefail

if [ ! -s "$PGDATA/PG_VERSION" ]; then
  initdb --pgdata="$PGDATA" --username="$POSTGRES_USER" --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD") \
    --auth-local=trust --auth-host=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8 > /dev/null
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
  # On its socket alone until the database is there: nobody can meet a half-made cluster.
  pg_ctl --pgdata="$PGDATA" --wait --silent --options="-c listen_addresses=" start
  psql --username="$POSTGRES_USER" --dbname=postgres --quiet --command="create database \"$POSTGRES_DB\""
  pg_ctl --pgdata="$PGDATA" --wait --silent --mode=fast stop
fi
exec "$@" -c listen_addresses='*'
