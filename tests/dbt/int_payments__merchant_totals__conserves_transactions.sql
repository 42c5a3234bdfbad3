-- Every transaction belongs to exactly one merchant.
{{ counts_as_days(ref('int_payments__merchant_totals')) }}
