-- Every transaction belongs to exactly one merchant of the dimension.
-- Counts everything: see macros/untested.sql for when.
{% if untested(ref('fct_transactions')) == 'true' %}

    with facts as (
        select
            merchant_key,
            count(*) as transactions,
            count(*) filter (where is_completed) as completed
        from {{ ref('fct_transactions') }}
        group by merchant_key
    ),

    merchants as (
        select
            merchant_key,
            transaction_count as transactions,
            completed_transaction_count as completed
        from {{ ref('dim_merchants') }}
        where transaction_count > 0
    )

    (
        select * from facts
        except
        select * from merchants
    )
    union all
    (
        select * from merchants
        except
        select * from facts
    )

{% else %}

    select 1 as nothing
    where false

{% endif %}
