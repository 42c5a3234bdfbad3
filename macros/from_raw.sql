{#
    The one way from a raw table into a model: committed loads only and, in an incremental run, only loads this model
    has not taken in. Stands after `from`; the model keeps the greatest load of each row in `_last_load_id`.

        select ... from {{ from_raw('raw_payments', 'transaction_created') }} as raw

    up_to: a literal load id, the last to read; for checks that must not see what a loader adds meanwhile.
#}
{% macro from_raw(source_name, table_name, up_to=none) -%}
    (
        select *
        from {{ source(source_name, table_name) }}
        where
            _dlt_load_id in {{ committed_loads(source_name) }}
            {%- if is_incremental() %}
            and _dlt_load_id > {{ high_water_mark() }}
            {%- endif %}
            {%- if up_to is not none %}
            and _dlt_load_id <= {{ up_to }}
            {%- endif %}
    )
{%- endmacro %}
