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

-- Files read, by the position they were given: one is read again when its bytes are others than at last. Rows count when
-- their load is committed.
create table if not exists raw_schema._files (
    stream_id integer not null,
    position bigint not null,
    path bytea not null,
    size bigint not null,
    sha256 bytea not null,
    _dlt_load_id text not null,
    primary key (stream_id, position)
);
-- By hash: a path may be longer than an index entry.
create index if not exists _files__path on raw_schema._files (stream_id, sha256(path));
create index if not exists _files__load on raw_schema._files (_dlt_load_id);

-- Loads noted before their first row: the next writer removes what those left that never committed.
create table if not exists raw_schema._loads_begun (
    load_id text primary key,
    feed text not null,
    writer_token bigint not null,
    begun_at timestamptz not null default now(),
    swept_at timestamptz,
    -- What it was reading, in case it dies of it: see ingestion/poison.py.
    phase text not null default 'reading' check (phase in ('reading', 'read', 'excused')),
    batch text,
    noted text
);

create index if not exists _ledger__load on raw_schema._ledger (_dlt_load_id);
create index if not exists _ledger__position on raw_schema._ledger (stream_id, partition, last_position desc);
create index if not exists _dead_letters__load on raw_schema._dead_letters (_dlt_load_id);
create index if not exists _dead_letters__feed on raw_schema._dead_letters (feed, failed_at desc);
create index if not exists _dead_letters__id on raw_schema._dead_letters (dead_letter_id);
create index if not exists _dead_letters__place on raw_schema._dead_letters (
    _stream_id, _kafka_partition, _kafka_offset
);
create index if not exists _dead_letters__replay on raw_schema._dead_letters (replay_load_id)
where replay_load_id is not null;

-- Who did what with a dead letter. Rows are added and never changed; one with a load counts when that load is committed.
create table if not exists raw_schema._dead_letter_events (
    event_id bigint generated always as identity primary key,
    dead_letter_id text not null,
    feed text not null,
    action text not null check (action in ('replayed', 'failed_again', 'discarded')),
    acted_at timestamptz not null default clock_timestamp(),
    acted_by text not null,
    because text,
    load_id text,
    contract_version text not null,
    loader_version text not null,
    -- Why it failed again; coordinates and rules, never the record.
    reason text,
    path text,
    message text,
    check ((action = 'replayed') = (load_id is not null)),
    check ((action = 'failed_again') = (reason is not null)),
    check (action <> 'discarded' or because <> '')
);
create index if not exists _dead_letter_events__letter on raw_schema._dead_letter_events (dead_letter_id);

do $constraints$
begin
    if not exists (
        select from pg_constraint
        where
            conname = '_ledger__no_overlap' and conrelid = 'raw_schema._ledger'::regclass
            and pg_get_constraintdef(oid) like '%files%'
    ) then
        alter table raw_schema._ledger
            drop constraint if exists _ledger__no_overlap,
            drop constraint if exists _ledger__adds_up,
            drop constraint if exists _ledger__covers_interval,
            drop constraint if exists _ledger__has_window,
            add constraint _ledger__no_overlap exclude using gist (
                stream_id with =, partition with =, int8range(first_position, last_position, '[]') with &&
            ) where (kind in ('kafka', 'files')),
            add constraint _ledger__adds_up check (offered = landed + dead + tombstones + unchanged),
            add constraint _ledger__covers_interval check (
                kind not in ('kafka', 'files')
                or last_position - first_position + 1 = landed + dead + tombstones + control + lost
            ),
            add constraint _ledger__has_window check (kind <> 'api' or window_from < window_to);
    end if;
    if not exists (
        select from pg_constraint
        where conname = '_ledger__replays_dead_letters' and conrelid = 'raw_schema._ledger'::regclass
    ) then
        -- A replay offers nothing new: what it lands, it takes from the dead.
        alter table raw_schema._ledger
            add constraint _ledger__replays_dead_letters check (
                kind <> 'replay' or (offered = 0 and landed >= 0 and dead = -landed and first_position is null)
            ),
            add constraint _ledger__only_replays_restore check (
                kind = 'replay' or (dead >= 0 and restored = 0)
            );
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
    -- The heir's sweep takes the load's ledger rows away: then the note of its beginning tells whose it was.
    if broken.fenced > 0 or exists (
        select from raw_schema._loads_begun where load_id = new.load_id and writer_token <> writer.token
    ) then
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
        where _dlt_load_id = new.load_id and kind in ('kafka', 'files')
    ) as l
    cross join lateral (
        select coalesce(l.last_in_load, (
            select c.last_position from raw_schema._ledger as c
            where
                c.stream_id = l.stream_id and c.partition = l.partition
                and c._dlt_load_id <> new.load_id
                and c._dlt_load_id in (select load_id from raw_schema._dlt_loads)
                and c.last_position is not null
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
    select sum(landed + restored) into accounted from raw_schema._ledger where _dlt_load_id = new.load_id;
    if counted <> accounted then
        raise exception 'unaccounted: load % of % copied % rows, its ledger says %',
            new.load_id, feed_name, counted, accounted using errcode = 'PW002';
    end if;
    select count(*) into counted from raw_schema._dead_letters where _dlt_load_id = new.load_id;
    select coalesce(sum(dead) filter (where kind <> 'replay'), 0) into accounted
    from raw_schema._ledger where _dlt_load_id = new.load_id;
    if counted <> accounted then
        raise exception 'unaccounted: load % of % copied % dead letters, its ledger says %',
            new.load_id, feed_name, counted, accounted using errcode = 'PW002';
    end if;

    select count(*) into counted from raw_schema._files where _dlt_load_id = new.load_id;
    select coalesce(sum(offered), 0) into accounted
    from raw_schema._ledger where _dlt_load_id = new.load_id and kind = 'files';
    if counted <> accounted then
        raise exception 'unaccounted: load % of % noted % files, its ledger says %',
            new.load_id, feed_name, counted, accounted using errcode = 'PW002';
    end if;

    select
        stream_id, partition, coalesce(replays.landed, 0) as landed, coalesce(marks.marked, 0) as marked
    into broken
    from (
        select stream_id, partition, sum(landed) as landed
        from raw_schema._ledger
        where _dlt_load_id = new.load_id and kind = 'replay'
        group by stream_id, partition
    ) as replays
    full join (
        select _stream_id as stream_id, coalesce(_kafka_partition, 0) as partition, count(*) as marked
        from raw_schema._dead_letters
        where
            replay_load_id = new.load_id and feed = feed_name and discarded_at is null
            and _dlt_load_id in (select load_id from raw_schema._dlt_loads)
        group by _stream_id, coalesce(_kafka_partition, 0)
    ) as marks using (stream_id, partition)
    where coalesce(replays.landed, 0) <> coalesce(marks.marked, 0)
    limit 1;
    if found then
        raise exception 'unaccounted: load % of % replays % dead letters of stream % partition %, % are marked with it',
            new.load_id, feed_name, broken.landed, broken.stream_id, broken.partition, broken.marked
            using errcode = 'PW002';
    end if;
    if exists (
        select from raw_schema._dead_letters where replay_load_id = new.load_id and _kafka_offset is not null
    ) then
        execute format(
            'select count(*) from raw_schema._dead_letters d where d.replay_load_id = $1 and not exists ('
            'select from %I.%I r where r._dlt_load_id = $1 and (r._stream_id, r._kafka_partition, r._kafka_offset) '
            '= (d._stream_id, d._kafka_partition, d._kafka_offset))', tg_table_schema, new.schema_name
        ) into counted using new.load_id;
        if counted > 0 then
            raise exception 'unaccounted: load % of % holds no row for % of the dead letters it replays',
                new.load_id, feed_name, counted using errcode = 'PW002';
        end if;
    end if;
    return new;
end
$guard$;

create or replace trigger _guard_commit before insert on raw_schema._dlt_loads
for each row execute function raw_schema._guard_commit();

-- A dead letter is resolved once: replayed by a committed load, or discarded.
create or replace function raw_schema._guard_resolved() returns trigger language plpgsql as $guard$
begin
    if old.replay_load_id is distinct from new.replay_load_id or old.discarded_at is distinct from new.discarded_at then
        if old.replay_load_id in (select load_id from raw_schema._dlt_loads) then
            raise exception 'resolved: dead letter % was replayed by load %', old.dead_letter_id, old.replay_load_id
                using errcode = 'PW004';
        elsif old.discarded_at is not null then
            raise exception 'resolved: dead letter % was discarded at %', old.dead_letter_id, old.discarded_at
                using errcode = 'PW004';
        end if;
    end if;
    return new;
end
$guard$;

create or replace trigger _guard_resolved before update of replay_load_id, discarded_at on raw_schema._dead_letters
for each row execute function raw_schema._guard_resolved();

create or replace function raw_schema._refuse_change() returns trigger language plpgsql as $guard$
begin
    raise exception 'append-only: rows of % are added and never changed', tg_relid::regclass using errcode = 'PW005';
end
$guard$;

create or replace trigger _append_only before update or delete or truncate on raw_schema._dead_letter_events
for each statement execute function raw_schema._refuse_change();
