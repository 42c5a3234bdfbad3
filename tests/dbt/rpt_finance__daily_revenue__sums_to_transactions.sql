-- By day, currency and country, revenue is the sum of the completed transactions, in minor units; and major units
-- say the same by the currency's exponent.
{%- set changed = untested(ref('fct_transactions')) %}

with currencies as (
    select * from {{ ref('currencies') }}
),

facts as (
    select
        occurred_date as revenue_date,
        currency_code,
        country_code,
        count(*) as transactions,
        count(*) - count(reporting_amount_minor) as unconverted,
        sum(amount_minor) as revenue_minor,
        sum(reporting_amount_minor) as reporting_revenue_minor
    from {{ ref('fct_transactions') }}
    where
        status = 'completed'
    {%- if changed != 'true' %}
        and occurred_date = any({{ days_touched(ref('fct_transactions'), changed) }})
        {%- endif %}
    group by occurred_date, currency_code, country_code
),

report as (
    select
        report.*,
        power(cast(10 as numeric), currencies.minor_unit_exponent) as minor_per_major,
        power(cast(10 as numeric), reporting_currency.minor_unit_exponent) as reporting_minor_per_major
    from {{ ref('rpt_finance__daily_revenue') }} as report
    left join currencies on report.currency_code = currencies.currency_code
    left join currencies as reporting_currency
        on report.reporting_currency_code = reporting_currency.currency_code
    {%- if changed != 'true' %}
    where report.revenue_date = any({{ days_touched(ref('fct_transactions'), changed) }})
    {%- endif %}
)

select
    coalesce(facts.revenue_date, report.revenue_date) as revenue_date,
    coalesce(facts.currency_code, report.currency_code) as currency_code,
    coalesce(facts.country_code, report.country_code) as country_code,
    facts.revenue_minor as facts_revenue_minor,
    report.revenue_minor as report_revenue_minor
from facts
full outer join report
    on
        facts.revenue_date = report.revenue_date
        and facts.currency_code = report.currency_code
        and facts.country_code = report.country_code
where
    facts.transactions is distinct from report.transaction_count
    or facts.unconverted is distinct from report.unconverted_count
    or facts.revenue_minor is distinct from report.revenue_minor
    or facts.reporting_revenue_minor is distinct from report.reporting_revenue_minor
    or report.revenue_minor is distinct from report.revenue_major * report.minor_per_major
    or report.reporting_revenue_minor
    is distinct from report.reporting_revenue_major * report.reporting_minor_per_major
