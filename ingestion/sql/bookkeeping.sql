-- The commit point, in the shape dlt gives it. A row here makes a load's rows, dead letters and intervals true together.
create table if not exists raw_schema._dlt_loads (
    load_id varchar not null,
    schema_name varchar,
    status bigint not null,
    inserted_at timestamptz not null,
    schema_version_hash varchar
);
create index if not exists _dlt_loads__load on raw_schema._dlt_loads (load_id);
create index if not exists _dlt_loads__schema on raw_schema._dlt_loads (schema_name, load_id desc);

-- One row per incarnation of a topic or endpoint: a re-created topic starts again at offset 0 and is another stream.
create table if not exists raw_schema._streams (
    stream_id integer generated always as identity primary key,
    feed text not null,
    kind text not null,
    origin text not null,
    name text not null,
    incarnation text not null,
    -- Partition -> offset reading begins at where that is not the start of the log.
    begins_at jsonb not null default '{}',
    first_seen_at timestamptz not null default now(),
    unique (feed, origin, name, incarnation)
);

-- What a source no longer has, or is not any more: a run fails until somebody accepts it by name.
create table if not exists raw_schema._losses (
    loss_id bigint generated always as identity primary key,
    feed text not null,
    kind text not null check (kind in ('retention', 'truncated', 'replaced')),
    stream_id integer not null,
    partition integer not null default 0,
    first_position bigint not null,
    last_position bigint,
    detail text not null,
    successor text not null default '',
    detected_at timestamptz not null default now(),
    accepted_at timestamptz,
    accepted_by text,
    accepted_because text,
    unique (feed, kind, stream_id, partition, first_position, successor)
);

-- Who may commit for a feed. The token grows with every acquisition; the commit point compares it.
create table if not exists raw_schema._writers (
    feed text primary key,
    token bigint not null,
    holder text not null,
    acquired_at timestamptz not null
);

-- Loads noted before their first row: the next writer removes what those left that never committed.
create table if not exists raw_schema._loads_begun (
    load_id text primary key,
    feed text not null,
    writer_token bigint not null,
    begun_at timestamptz not null default now(),
    swept_at timestamptz
);

create index if not exists _ledger__load on raw_schema._ledger (_dlt_load_id);
create index if not exists _ledger__position on raw_schema._ledger (stream_id, partition, last_position desc);
create index if not exists _dead_letters__load on raw_schema._dead_letters (_dlt_load_id);
create index if not exists _dead_letters__feed on raw_schema._dead_letters (feed, failed_at desc);
create index if not exists _dead_letters__id on raw_schema._dead_letters (dead_letter_id);

do $constraints$
begin
    if not exists (
        select from pg_constraint
        where conname = '_ledger__no_overlap' and conrelid = 'raw_schema._ledger'::regclass
    ) then
        alter table raw_schema._ledger
            add constraint _ledger__no_overlap exclude using gist (
                stream_id with =, partition with =, int8range(first_position, last_position, '[]') with &&
            ) where (kind = 'kafka'),
            add constraint _ledger__adds_up check (offered = landed + dead + tombstones + unchanged),
            add constraint _ledger__covers_interval check (
                kind <> 'kafka'
                or last_position - first_position + 1 = landed + dead + tombstones + control + lost
            ),
            add constraint _ledger__has_window check (kind <> 'api' or window_from < window_to);
    end if;
end
$constraints$;

create or replace function raw_schema._guard_commit() returns trigger language plpgsql as $guard$
declare
    feed_name text := tg_table_schema || '.' || new.schema_name;
    writer record;
    broken record;
    counted bigint;
    accounted bigint;
begin
    select token, holder, acquired_at into writer
    from raw_schema._writers where feed = feed_name for update;
    if not found then
        return new;  -- not a declared feed: somebody else's dlt pipeline in this schema
    end if;
    if exists (select from raw_schema._dlt_loads where load_id = new.load_id) then
        return null;  -- dlt repeats the insert after a kill; one row is the truth
    end if;

    select count(*) filter (where writer_token <> writer.token) as fenced, count(*) as intervals into broken
    from raw_schema._ledger where _dlt_load_id = new.load_id;
    if broken.fenced > 0 then
        raise exception 'fenced: % was taken over by % at %', feed_name, writer.holder, writer.acquired_at
            using errcode = 'PW001';
    end if;
    if broken.intervals = 0 then
        raise exception 'unaccounted: load % of % has no interval in the ledger', new.load_id, feed_name
            using errcode = 'PW002';
    end if;

    if exists (
        select from raw_schema._dlt_loads where schema_name = new.schema_name and load_id >= new.load_id
    ) then
        raise exception 'clock: load id % of % is not after the last committed one', new.load_id, feed_name
            using errcode = 'PW003', hint = 'The clock of this machine ran backwards or is behind another writer''s.';
    end if;

    select l.stream_id, l.partition, l.first_position, previous.last_position into broken
    from (
        select
            stream_id, partition, first_position,
            lag(last_position) over (partition by stream_id, partition order by first_position) as last_in_load
        from raw_schema._ledger
        where _dlt_load_id = new.load_id and kind = 'kafka'
    ) as l
    cross join lateral (
        select coalesce(l.last_in_load, (
            select c.last_position from raw_schema._ledger as c
            where
                c.stream_id = l.stream_id and c.partition = l.partition
                and c._dlt_load_id <> new.load_id
                and c._dlt_load_id in (select load_id from raw_schema._dlt_loads)
            order by c.last_position desc limit 1
        )) as last_position
    ) as previous
    where l.first_position <> previous.last_position + 1
    limit 1;
    if found then
        raise exception 'hole: % stream % partition % goes from % to %',
            feed_name, broken.stream_id, broken.partition, broken.last_position, broken.first_position
            using errcode = 'PW002';
    end if;

    select l.stream_id, l.window_from, previous.window_to into broken
    from raw_schema._ledger as l
    cross join lateral (
        select max(c.window_to) as window_to from raw_schema._ledger as c
        where
            c.stream_id = l.stream_id
            and c._dlt_load_id <> new.load_id
            and c._dlt_load_id in (select load_id from raw_schema._dlt_loads)
    ) as previous
    where l._dlt_load_id = new.load_id and l.kind = 'api' and l.window_from > previous.window_to
    limit 1;
    if found then
        raise exception 'hole: % goes from % to %', feed_name, broken.window_to, broken.window_from
            using errcode = 'PW002';
    end if;

    execute format('select count(*) from %I.%I where _dlt_load_id = $1', tg_table_schema, new.schema_name)
        into counted using new.load_id;
    select sum(landed) into accounted from raw_schema._ledger where _dlt_load_id = new.load_id;
    if counted <> accounted then
        raise exception 'unaccounted: load % of % copied % rows, its ledger says %',
            new.load_id, feed_name, counted, accounted using errcode = 'PW002';
    end if;
    select count(*) into counted from raw_schema._dead_letters where _dlt_load_id = new.load_id;
    select sum(dead) into accounted from raw_schema._ledger where _dlt_load_id = new.load_id;
    if counted <> accounted then
        raise exception 'unaccounted: load % of % copied % dead letters, its ledger says %',
            new.load_id, feed_name, counted, accounted using errcode = 'PW002';
    end if;
    return new;
end
$guard$;

create or replace trigger _guard_commit before insert on raw_schema._dlt_loads
for each row execute function raw_schema._guard_commit();
