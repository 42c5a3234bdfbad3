-- A state is what age and budget say; only where an input never landed it may be unknown instead of pass.
select table_name
from {{ ref('rpt_ops__table_ages') }}
where
    (state = 'error') is distinct from (coalesce(age_seconds > error_after_seconds, false))
    or (
        (state = 'warn')
        is distinct from (
            coalesce(age_seconds > warn_after_seconds, false)
            and not coalesce(age_seconds > error_after_seconds, false)
        )
    )
    or (state = 'pass' and age_seconds is null)
    or error_budget_left > 1
