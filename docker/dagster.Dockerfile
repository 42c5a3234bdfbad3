# One image for the code server, the webserver and the daemon of Dagster; built from the repository's root.
FROM python:3.11.14-slim-bookworm

ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    DAGSTER_HOME=/opt/dagster \
    WAREHOUSE_PROJECT_DIR=/opt/warehouse \
    WAREHOUSE_HOME=/var/lib/warehouse

WORKDIR /opt/warehouse

# The requirements alone first: a change of code then rebuilds in seconds. --no-deps, because dbt-core names a
# package that cannot be built offline; the two files are complete without a resolver.
COPY requirements.txt /tmp/requirements/project.txt
COPY docker/dagster/requirements.txt /tmp/requirements/dagster.txt
RUN pip install --no-deps --require-hashes -r /tmp/requirements/project.txt -r /tmp/requirements/dagster.txt \
    && rm -r /tmp/requirements

COPY . .
COPY docker/dagster/base.yaml docker/dagster/workspace.yaml /opt/dagster/

# dbt and the loaders write beside the project and into the two volumes, never as root.
RUN pip install --no-deps --editable . \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin warehouse \
    && mkdir -p /var/lib/warehouse /var/lib/dagster \
    && chown -R warehouse:warehouse /opt/warehouse /opt/dagster /var/lib/warehouse /var/lib/dagster

# Stands in the run history, where a checkout has its git revision. Last, because it changes with every build.
ARG WAREHOUSE_CODE_VERSION=unknown
ENV WAREHOUSE_CODE_VERSION=${WAREHOUSE_CODE_VERSION}

USER warehouse
ENTRYPOINT ["/opt/warehouse/docker/dagster/start.sh"]
