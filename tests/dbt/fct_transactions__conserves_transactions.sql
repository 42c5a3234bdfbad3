-- Each transaction of the intermediate model is in the fact, with its amounts, and no other.
{{ lost_between(
    ref('int_payments__transactions_converted'),
    ref('fct_transactions'),
    'transaction_id',
    [
        'occurred_date',
        'currency_code',
        'status',
        'has_fx_rate',
        'event_count',
        'amount_minor',
        'reporting_amount_minor',
    ],
) }}
