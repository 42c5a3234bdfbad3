{# One row when sums that are counted on hold other numbers of transactions than those by day, which are counted again. #}
{% macro counts_as_days(totals) -%}
    with members as (
        select
            coalesce(sum(transaction_count), 0) as transactions,
            coalesce(sum(completed_transaction_count), 0) as completed
        from {{ totals }}
    ),

    days as (
        select
            coalesce(sum(transaction_count), 0) as transactions,
            coalesce(sum(transaction_count) filter (where status = 'completed'), 0) as completed
        from {{ ref('int_payments__daily_totals') }}
    )

    select * from members
    except
    select * from days
{%- endmacro %}
