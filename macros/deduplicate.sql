{#
    One row per key: the first in `order_by` stands, and says how many rows it stands for. Deduplication happens only
    here. Each row of `relation` carries `folded_count` (rows it already stands for, 1 for a new one) and
    `_last_load_id` (the greatest load among them), so folding a fold with new rows gives what folding everything at
    once gives, and a load none of whose rows stand still moves the high-water mark.

    Gives the columns of `relation` and three more: `_rank` (keep 1), `_folded_count`, `_folded_load_id`.

    order_by: a total order. It ends in the coordinates (load, stream, partition, offset), or two equal events
              would stand in turn.
    folds:    further columns over all rows of a key, name -> aggregate; one that may be folded again (min, max).
#}
{% macro deduplicate(relation, key, order_by, folds={}) -%}
    select
        *,
        row_number() over (
            partition by {{ key | join(', ') }}
            order by {{ order_by | join(', ') }}
        ) as _rank,
        cast(sum(folded_count) over (partition by {{ key | join(', ') }}) as bigint) as _folded_count,
        max(_last_load_id) over (partition by {{ key | join(', ') }}) as _folded_load_id
        {%- for name, aggregate in folds.items() %},
        {{ aggregate }} over (partition by {{ key | join(', ') }}) as {{ name }}
        {%- endfor %}
    from {{ relation }}
{%- endmacro %}
