{#
    The one way from a raw table into a model: committed loads only and, in an incremental run, only loads this model
    has not taken in. Stands after `from`; the model keeps the greatest load of each row in `_last_load_id`.

        select ... from {{ from_raw('raw_payments', 'transaction_created') }} as raw

    key:   the columns a model that counts what it folds is unique by, named alike in both. Keys of which a load brought
           rows back (see `restored_loads`) come with all their raw rows, and `keys_to_fold` keeps the model's own out.
           They are looked for between the first and the last load folded into one of them: the raw table has an
           index on the load, and none on the key, which would cost the landing too much.
    up_to: a literal load id, the last to read; for checks that must not see what a loader adds meanwhile.
    after: a literal load id, the last not to read; for models over several feeds, which keep a mark for each.
#}
{% macro from_raw(source_name, table_name, up_to=none, key=[], after=none) -%}
    {%- set restored = restored_loads(source_name, table_name) if key else [] -%}
    (
        select *
        from {{ source(source_name, table_name) }}
        where
            _dlt_load_id in {{ committed_loads(source_name) }}
            {%- if after is not none %}
            and _dlt_load_id > {{ after }}
            {%- elif is_incremental() %}
            and _dlt_load_id > {{ high_water_mark() }}
            {%- endif %}
            {%- if up_to is not none %}
            and _dlt_load_id <= {{ up_to }}
            {%- endif %}
        {%- if restored %}
        {%- set is_restored -%}
            ({{ key | join(', ') }}) in (
                select {{ key | join(', ') }} from {{ source(source_name, table_name) }}
                where _dlt_load_id in ('{{ restored | join("', '") }}')
            )
        {%- endset %}
        union all
        select *
        from {{ source(source_name, table_name) }}
        where
            _dlt_load_id in {{ committed_loads(source_name) }}
            and _dlt_load_id >= (select min(_first_load_id) from {{ this }} where {{ is_restored }})
            and _dlt_load_id <= (select max(_last_load_id) from {{ this }} where {{ is_restored }})
            {#- `is true` makes it a lookup in a hash; joined, the planner takes a new load for two rows. #}
            and ({{ is_restored }}) is true
        {%- endif %}
    )
{%- endmacro %}
