-- Every transaction belongs to exactly one user.
{{ counts_as_days(ref('int_payments__user_totals')) }}
