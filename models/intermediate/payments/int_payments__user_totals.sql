{{
    config(
        materialized='incremental',
        incremental_strategy='difference',
        unique_key='user_id',
        on_schema_change='fail',
        indexes=[
            {'columns': ['user_id'], 'unique': True},
        ],
        post_hook='{{ analyze_if_written() }}',
    )
}}

{{ transaction_totals('user_id') }}
