{#
    One row when a model does not stand for as many events as its feed's loads brought, which are counted load by load.

    column: how many events a row of the model stands for. The model has `_last_load_id`; later loads are not compared.
#}
{% macro counts_landed(model, column, feed) -%}
    with counted as (
        select
            coalesce(sum({{ column }}), 0) as events,
            max(_last_load_id) as mark
        from {{ model }}
    ),

    landed as (
        select coalesce(sum(loads.raw_rows), 0) as events
        from {{ ref('audit_loads') }} as loads
        inner join counted on loads.load_id <= counted.mark
        where loads.feed = '{{ feed }}'
    )

    select
        landed.events as landed_events,
        counted.events as counted_events
    from landed
    cross join counted
    where landed.events <> counted.events
{%- endmacro %}
