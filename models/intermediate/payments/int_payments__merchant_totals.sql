{{
    config(
        materialized='incremental',
        incremental_strategy='difference',
        unique_key='merchant_id',
        on_schema_change='fail',
        indexes=[
            {'columns': ['merchant_id'], 'unique': True},
        ],
        post_hook='{{ analyze_if_written() }}',
    )
}}

{{ transaction_totals('merchant_id') }}
