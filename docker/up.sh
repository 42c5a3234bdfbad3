#!/usr/bin/env bash
# Bring up the real stack and return when it can be used: services healthy, topics and buckets there.
# May be run again at any time: what exists stays as it is.
#
#   docker/up.sh                       everything
#   docker/up.sh --without-dagster     servers only, for work with `warehouse run` on this machine; neither what
#                                      watches them
#
# Topics are those that the feeds declare (models/staging/*/_*__sources.yml); a test compares the two.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
env_file="$root/.env"
wait_seconds=300

servers=(kafka schema-registry postgres minio)
dagster=(dagster-code dagster-webserver dagster-daemon)
watching=(metrics prometheus grafana)
topics=(payments_transaction_created user_events)
partitions=6
buckets=(warehouse-landing warehouse-archive)

fail() {
    printf 'error: %s\n' "$1" >&2
    printf 'next:  %s\n' "$2" >&2
    exit 1
}

compose() {
    docker compose --env-file "$env_file" --file "$root/docker/compose.yml" "$@"
}

start() {
    compose up --detach --wait --wait-timeout "$wait_seconds" "$@" || {
        compose ps --all >&2
        fail "not every service became healthy within $wait_seconds s" \
            "docker compose --env-file .env -f docker/compose.yml logs SERVICE"
    }
}

create_topic() {
    compose exec -T kafka /opt/kafka/bin/kafka-topics.sh --bootstrap-server kafka:19092 \
        --create --if-not-exists --topic "$1" --partitions "$partitions" --replication-factor 1
}

create_buckets() {
    # The credentials are in the container's environment: they appear in no argument list on this machine.
    # shellcheck disable=SC2016
    compose exec -T minio sh -ceu '
        mc alias set stack http://127.0.0.1:9000 "$MINIO_ROOT_USER" "$MINIO_ROOT_PASSWORD" >/dev/null
        for bucket in "$@"; do mc mb --ignore-existing "stack/$bucket"; done
    ' create-buckets "$@"
}

with_dagster=yes
for argument in "$@"; do
    case "$argument" in
        --without-dagster) with_dagster=no ;;
        *) fail "unknown argument $argument" "docker/up.sh [--without-dagster]" ;;
    esac
done

command -v docker >/dev/null || fail "there is no docker on PATH" "install Docker Engine with the compose plugin"
docker compose version >/dev/null 2>&1 || fail "docker has no compose plugin" "install docker-compose-plugin"
docker info >/dev/null 2>&1 || fail "the Docker daemon does not answer" "start it, or add this user to the group docker"
[[ -f "$env_file" ]] || fail "there is no $env_file" "cp .env.example .env"

start "${servers[@]}"
for topic in "${topics[@]}"; do
    create_topic "$topic"
done
create_buckets "${buckets[@]}"

if [[ "$with_dagster" == yes ]]; then
    revision="$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null || echo unknown)"
    compose build --build-arg WAREHOUSE_CODE_VERSION="$revision" dagster-code
    start "${dagster[@]}"
    start "${watching[@]}"
fi

printf '\nThe stack is up:\n'
printf '  %-16s %s\n' \
    Kafka "$(compose port kafka 9092)" \
    'Schema registry' "http://$(compose port schema-registry 8081)" \
    Postgres "$(compose port postgres 5432), database warehouse, role warehouse" \
    MinIO "http://$(compose port minio 9000), console http://$(compose port minio 9001)"
if [[ "$with_dagster" == yes ]]; then
    printf '  %-16s %s\n' \
        Dagster "http://$(compose port dagster-webserver 3000)" \
        Prometheus "http://$(compose port prometheus 9090)" \
        Grafana "http://$(compose port grafana 3000), user admin, password STACK_GRAFANA_PASSWORD of .env"
fi
printf 'To use it from this machine, uncomment WAREHOUSE_DSN and KAFKA_BOOTSTRAP_SERVERS in .env.\n'
