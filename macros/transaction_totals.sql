{#
    The transactions of each user or merchant, summed up: a whole model. It counts on by what changed, as long as
    that is known (see `follows_changes`).

    key: `user_id` or `merchant_id`.
#}
{% macro transaction_totals(key) -%}
    {%- set transactions = ref('int_payments__transactions_converted') -%}
    {%- set only_changes = follows_changes(transactions, 'raw_payments', 'transaction_created') -%}
    {%- set first_first = 'order by first_occurred_at, transaction_id' -%}
    {%- set columns = [
        'first_transaction_id',
        'first_country_code',
        'first_transaction_at',
        'last_transaction_at',
        'transaction_count',
        'completed_transaction_count',
        '_last_load_id',
    ] -%}

    with transactions as (
        select * from {{ transactions }}
        {%- if only_changes %}
        where _last_load_id > {{ high_water_mark() }}
        {%- endif %}
    ),

    counted as (
        select
            {{ key }},
            (array_agg(transaction_id {{ first_first }}))[1] as first_transaction_id,
            (array_agg(country_code {{ first_first }}))[1] as first_country_code,
            min(first_occurred_at) as first_transaction_at,
            max(occurred_at) as last_transaction_at,
            {% if only_changes -%}
                count(*) filter (where _previous_load_id is null) as transaction_count,
                count(*) filter (where status = 'completed')
                - count(*) filter (where _previous_load_id is not null and _previous_status = 'completed')
                as completed_transaction_count,
            {%- else -%}
                count(*) as transaction_count,
                count(*) filter (where status = 'completed') as completed_transaction_count,
            {%- endif %}
            max(_last_load_id) as _last_load_id
        from transactions
        group by {{ key }}
    ){% if only_changes %},

    known as (
        select * from {{ this }}
    ),

    paired as (
        select
            coalesce(counted.{{ key }}, known.{{ key }}) as {{ key }},
            known.{{ key }} is null
            or (counted.first_transaction_at, counted.first_transaction_id)
            <= (known.first_transaction_at, known.first_transaction_id) as has_new_first,
            {% for column in columns -%}
                counted.{{ column }} as new_{{ column }},
                known.{{ column }} as known_{{ column }}{{ ',' if not loop.last }}
            {% endfor %}
        from counted
        full outer join known on counted.{{ key }} = known.{{ key }}
    ),

    final as (
        select
            {{ key }},
            {% for column in columns[:2] -%}
                case when has_new_first then new_{{ column }} else known_{{ column }} end as {{ column }},
            {% endfor -%}
            least(known_first_transaction_at, new_first_transaction_at) as first_transaction_at,
            greatest(known_last_transaction_at, new_last_transaction_at) as last_transaction_at,
            {% for column in columns[4:6] -%}
                coalesce(known_{{ column }}, 0) + coalesce(new_{{ column }}, 0) as {{ column }},
            {% endfor -%}
            greatest(known__last_load_id, new__last_load_id) as _last_load_id
        from paired
    )

    select * from final
    {%- else %}

    select * from counted
    {%- endif %}
{%- endmacro %}
