{#
    Days whose sums changed rows of a relation may have changed, as an array for `= any`: a transaction stood on no day
    before its first event and on none after its latest, so every day in between.

    An array, because the planner takes it for a few days and looks them up by index. Of a subquery it knows nothing, and
    reads the whole table.

    condition: what tells the changed rows.
#}
{% macro days_touched(relation, condition) -%}
    array(
        select distinct cast(days.day as date)
        from {{ relation }} as changed
        cross join lateral generate_series(
            {{ utc_date('changed.first_occurred_at') }}, changed.occurred_date, interval '1 day'
        ) as days (day)
        where {{ condition }}
    )
{%- endmacro %}
