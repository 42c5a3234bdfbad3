{{ config(unique_key='date_day') }}

with days as (
    select cast(day as date) as date_day
    from generate_series(
        cast('{{ var("first_date") }}' as timestamp), cast('{{ var("last_date") }}' as timestamp), interval '1 day'
    ) as series (day)
),

final as (
    select
        date_day,
        cast(extract(year from date_day) as integer) as year_number,
        cast(extract(quarter from date_day) as integer) as quarter_of_year,
        cast(extract(month from date_day) as integer) as month_of_year,
        cast(extract(day from date_day) as integer) as day_of_month,
        cast(extract(doy from date_day) as integer) as day_of_year,
        cast(extract(isoyear from date_day) as integer) as iso_year,
        cast(extract(week from date_day) as integer) as iso_week,
        cast(extract(isodow from date_day) as integer) as iso_day_of_week,
        cast(date_trunc('year', date_day) as date) as year_start_date,
        cast(date_trunc('quarter', date_day) as date) as quarter_start_date,
        cast(date_trunc('month', date_day) as date) as month_start_date,
        cast(date_trunc('week', date_day) as date) as week_start_date,
        extract(isodow from date_day) >= 6 as is_weekend
    from days
)

select * from final
