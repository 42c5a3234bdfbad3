#!/usr/bin/env bash
# Roles and databases of the stack; the image runs it once, when the data folder is empty. Neither role is a
# superuser, and neither can open the other's database. Passwords come through the environment: on a command line
# every process list would show them. After a change of a password in .env: `alter role ... password ...`, or
# `docker compose ... down --volumes` for an empty start.
set -euo pipefail

psql --no-psqlrc --set=ON_ERROR_STOP=1 --username="$POSTGRES_USER" --dbname=postgres <<'SQL'
\getenv warehouse_password WAREHOUSE_ROLE_PASSWORD
\getenv dagster_password DAGSTER_ROLE_PASSWORD

create role warehouse login password :'warehouse_password';
create database warehouse owner warehouse;
revoke all on database warehouse from public;

create role dagster login password :'dagster_password';
create database dagster owner dagster;
revoke all on database dagster from public;
SQL
