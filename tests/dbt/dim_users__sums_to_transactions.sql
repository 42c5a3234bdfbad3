-- Every transaction belongs to exactly one user of the dimension.
-- Counts everything: see macros/untested.sql for when.
{% if untested(ref('fct_transactions')) == 'true' %}

    with facts as (
        select
            user_key,
            count(*) as transactions,
            count(*) filter (where is_completed) as completed
        from {{ ref('fct_transactions') }}
        group by user_key
    ),

    users as (
        select
            user_key,
            transaction_count as transactions,
            completed_transaction_count as completed
        from {{ ref('dim_users') }}
        where transaction_count > 0
    )

    (
        select * from facts
        except
        select * from users
    )
    union all
    (
        select * from users
        except
        select * from facts
    )

{% else %}

    select 1 as nothing
    where false

{% endif %}
