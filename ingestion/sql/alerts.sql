-- What is wrong and who was told: see orchestration/alerts.py. A problem that comes back is another row.
create table if not exists ops.incidents (
    incident_id bigint generated always as identity primary key,
    key text not null,
    kind text not null,
    severity text not null check (severity in ('warning', 'error', 'critical')),
    -- closed: by hand, while the problem still stands; quiet until it is over or happens anew.
    state text not null check (state in ('open', 'closed', 'resolved')),
    summary text not null,
    action text not null,
    details jsonb not null,
    -- What tells this occurrence from the next one, and the parts of it that were told.
    evidence text not null,
    parts jsonb not null,
    opened_at timestamptz not null,
    told_at timestamptz not null,
    resolved_at timestamptz,
    resolved_because text,
    check ((state = 'open') = (resolved_at is null))
);
create unique index if not exists incidents__standing on ops.incidents (key) where state <> 'resolved';
create index if not exists incidents__resolved on ops.incidents (resolved_at desc);

-- The outbox: what a receiver has to be told. Written with the change of the incident, marked after it was sent.
create table if not exists ops.alert_deliveries (
    delivery_id bigint generated always as identity primary key,
    incident_id bigint not null references ops.incidents on delete cascade,
    receiver text not null,
    event text not null check (event in ('opened', 'escalated', 'changed', 'reminded', 'resolved')),
    document jsonb not null,
    created_at timestamptz not null,
    tries integer not null default 0,
    delivered_at timestamptz,
    -- The receiver said that this will never do; tried again once its settings change or a test alert gets through.
    refused_at timestamptz,
    refused_because text
);
create index if not exists alert_deliveries__incident on ops.alert_deliveries (incident_id, receiver);
create index if not exists alert_deliveries__due on ops.alert_deliveries (receiver, delivery_id)
where delivered_at is null and refused_at is null;

-- How each receiver does. Locked by who is sending to it. `configuration` is a digest: neither address nor key is kept.
create table if not exists ops.alert_receivers (
    receiver text primary key,
    configuration text not null,
    failures integer not null default 0,
    hold_until timestamptz,
    problem text,
    problem_at timestamptz,
    is_refusing boolean not null default false,
    delivered_at timestamptz
);

-- The last outcome of each step, and of each command.
do $columns$
begin
    -- Looks first: ALTER TABLE locks readers out even where it does nothing.
    if not exists (
        select from pg_attribute where attrelid = 'ops.run_steps'::regclass and attname = 'offered' and not attisdropped
    ) then
        alter table ops.run_steps add column offered bigint;
    end if;
end
$columns$;
create index if not exists run_steps__step_feed on ops.run_steps (step, feed, finished_at desc);
create index if not exists runs__command on ops.runs (command, started_at desc);
