-- Each transaction of staging is converted, with its state, and no other.
{{ lost_between(
    ref('stg_payments__transactions'),
    ref('int_payments__transactions_converted'),
    'transaction_id',
    ['currency_code', 'status', 'event_count', 'amount_minor'],
) }}
