{#
    Rows of a dimension, or groups of the fact, whose counts of transactions the other does not have.

    key: the dimension's key, named alike in the fact.
#}
{% macro sums_to_transactions(dimension, key) -%}
    with facts as (
        select
            {{ key }},
            count(*) as transactions,
            count(*) filter (where is_completed) as completed
        from {{ ref('fct_transactions') }}
        group by {{ key }}
    ),

    members as (
        select
            {{ key }},
            transaction_count as transactions,
            completed_transaction_count as completed
        from {{ dimension }}
        where transaction_count > 0
    )

    (
        select * from facts
        except
        select * from members
    )
    union all
    (
        select * from members
        except
        select * from facts
    )
{%- endmacro %}
