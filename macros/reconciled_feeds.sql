{#
    How each feed goes from raw to the models, for the reconciliation. A new feed needs an entry here; a rule of the
    project's tests says so.

    source, table: the feed.
    staging:       the model that takes it in.
    key:           what a record is, column of staging -> column of the raw table.
    money:         for a feed with amounts: the columns that tell one raw row from another beside its load, the raw
                   table's columns of the amount (major units) and its currency, and the mart with a row per record.
                   Staging and mart call them `amount_minor` and `currency_code`.
#}
{% macro reconciled_feeds() -%}
    {{ return([
        {
            'source': 'raw_fx',
            'table': 'daily_rates',
            'staging': 'stg_fx__daily_rates',
            'key': {
                'rate_date': 'rate_date',
                'base_currency_code': 'base_currency',
                'quote_currency_code': 'quote_currency',
            },
        },
        {
            'source': 'raw_payments',
            'table': 'transaction_created',
            'staging': 'stg_payments__transactions',
            'key': {'transaction_id': 'transaction_id'},
            'money': {
                'coordinates': ['_stream_id', '_kafka_partition', '_kafka_offset'],
                'amount': 'amount',
                'currency': 'currency',
                'mart': 'fct_transactions',
            },
        },
        {
            'source': 'raw_users',
            'table': 'user_events',
            'staging': 'stg_users__events',
            'key': {'event_id': 'event_id'},
        },
    ]) }}
{%- endmacro %}
