{{
    config(
        unique_key=['rate_date', 'base_currency_code', 'quote_currency_code'],
        indexes=[
            {'columns': ['rate_date', 'base_currency_code', 'quote_currency_code'], 'unique': True},
            {'columns': ['_last_load_id']},
        ],
        post_hook='{{ analyze_if_written() }}',
    )
}}

with versions as (
    select * from {{ from_raw('raw_fx', 'daily_rates') }} as raw
),

new_versions as (
    select
        rate_date,
        base_currency as base_currency_code,
        quote_currency as quote_currency_code,
        rate,
        1 as folded_count,
        _stream_id,
        _api_window_from,
        _api_page,
        _api_item,
        _loaded_at,
        _dlt_load_id,
        _dlt_load_id as _last_load_id
    from versions
),

all_versions as (
    select * from new_versions
    {% if is_incremental() %}
        union all
        select
            rate_date,
            base_currency_code,
            quote_currency_code,
            rate,
            version_count as folded_count,
            _stream_id,
            _api_window_from,
            _api_page,
            _api_item,
            _loaded_at,
            _dlt_load_id,
            _last_load_id
        from {{ this }}
        where
            (rate_date, base_currency_code, quote_currency_code) in (
                select
                    new_versions.rate_date,
                    new_versions.base_currency_code,
                    new_versions.quote_currency_code
                from new_versions
            )
    {% endif %}
),

-- The bank corrects a rate by publishing it again, so the latest load stands.
ranked as (
    {{ deduplicate(
        relation='all_versions',
        key=['rate_date', 'base_currency_code', 'quote_currency_code'],
        order_by=[
            '_dlt_load_id desc',
            '_stream_id desc',
            '_api_window_from desc',
            '_api_page desc',
            '_api_item desc',
        ],
    ) }}
),

final as (
    select
        rate_date,
        base_currency_code,
        quote_currency_code,
        rate,
        _folded_count as version_count,
        _stream_id,
        _api_window_from,
        _api_page,
        _api_item,
        _loaded_at,
        _dlt_load_id,
        _folded_load_id as _last_load_id
    from ranked
    where _rank = 1
)

select * from final
