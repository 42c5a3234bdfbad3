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

-- Source freshness asks for the last successful step of a feed.
create index if not exists run_steps__feed_finished on ops.run_steps (feed, finished_at desc);

-- What the models were last built from: see orchestration/standing.py. One row, gone while anybody builds.
create table if not exists ops.standing (
    inputs text not null,
    relations text not null,
    counts jsonb not null,
    built_at timestamptz not null default clock_timestamp()
);

-- The key of the tokens in the marts: see ingestion/tokens.py. One row; whoever reads it can make tokens.
create table if not exists ops.token_key (
    is_only boolean primary key default true check (is_only),
    inner_pad bytea not null,
    outer_pad bytea not null
);
