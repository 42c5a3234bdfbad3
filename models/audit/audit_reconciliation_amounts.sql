with amounts as (
    select * from {{ ref('audit_amounts') }}
    where is_sum
),

final as (
    select
        feed,
        loaded_date,
        currency_code,

        raw_rows,
        raw_minor,
        raw_rows - standing_rows as superseded_rows,
        raw_minor - standing_minor as superseded_minor,

        standing_rows,
        standing_minor,
        staged_rows,
        staged_minor,
        mart_rows,
        mart_minor,

        (
            raw_rows >= standing_rows
            and standing_rows = staged_rows
            and staged_rows = mart_rows
            and standing_minor = staged_minor
            and staged_minor = mart_minor
        ) as adds_up,
        _last_load_id
    from amounts
)

select * from final
