-- Every event landed is counted once in the transactions of a day.
{{ counts_landed(ref('int_payments__daily_totals'), 'event_count', 'raw_payments.transaction_created') }}
