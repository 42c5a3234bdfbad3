create extension if not exists btree_gist;

create schema if not exists ops;

create table if not exists ops.runs (
    run_id text primary key,
    command text not null,
    trigger text not null,
    started_at timestamptz not null,
    heartbeat_at timestamptz not null,
    finished_at timestamptz,
    outcome text not null check (outcome in ('running', 'success', 'failed')),
    error_class text,
    message text,
    code_version text not null
);

create table if not exists ops.run_steps (
    run_id text not null references ops.runs on delete cascade,
    step text not null,
    feed text not null default '',
    started_at timestamptz not null,
    finished_at timestamptz,
    outcome text not null check (outcome in ('running', 'success', 'failed')),
    error_class text,
    message text,
    rows bigint,
    dead bigint,
    primary key (run_id, step, feed)
);

-- The history is cut off at its old end, and looked at from its new one.
create index if not exists runs__started on ops.runs (started_at);

-- What became of dbt's models and seeds, and of the tests that did not pass; dbt's messages may quote rows and are left
-- out.
create table if not exists ops.run_nodes (
    run_id text not null references ops.runs on delete cascade,
    kind text not null,
    node text not null,
    status text not null,
    finished_at timestamptz not null,
    seconds double precision not null,
    rows bigint,
    failures bigint,
    primary key (run_id, kind, node)
);

-- Source freshness asks for the last successful step of a feed.
create index if not exists run_steps__feed_finished on ops.run_steps (feed, finished_at desc);

-- What the models were last built from: see orchestration/standing.py. One row, gone while anybody builds.
create table if not exists ops.standing (
    inputs text not null,
    relations text not null,
    counts jsonb not null,
    built_at timestamptz not null default clock_timestamp()
);

-- What a dbt build could take in when it began; kept until it ends. See macros/note_folded_loads.sql.
create table if not exists ops.builds_begun (
    invocation_id text not null,
    feed text not null,
    load_id text not null,
    begun_at timestamptz not null default clock_timestamp(),
    primary key (invocation_id, feed)
);

-- Per model the last load of each feed it has surely folded in, by its last build that passed, whoever ran it; '' for
-- none. The age of a table starts here: see orchestration/ages.py.
create table if not exists ops.model_loads (
    model text not null,
    feed text not null,
    load_id text not null,
    built_at timestamptz not null,
    primary key (model, feed)
);

-- The age of each feed and mart at each tick; a tick is one measured_at. `hop`: what holds the table back, a feed or a
-- model.
create table if not exists ops.table_ages (
    measured_at timestamptz not null,
    table_name text not null,
    age interval,
    warn_after interval,
    error_after interval,
    state text not null check (state in ('pass', 'warn', 'error', 'unknown')),
    hop text not null,
    held_by text not null,
    primary key (measured_at, table_name)
);
create index if not exists table_ages__table on ops.table_ages (table_name, measured_at desc);

-- What waits for each feed at each tick: offsets at the broker (null where it was not asked or did not answer) and dead
-- letters open.
create table if not exists ops.queue_depths (
    measured_at timestamptz not null,
    feed text not null,
    lag bigint,
    open_dead_letters bigint not null,
    oldest_dead_letter_at timestamptz,
    primary key (measured_at, feed)
);
create index if not exists queue_depths__feed on ops.queue_depths (feed, measured_at desc);
