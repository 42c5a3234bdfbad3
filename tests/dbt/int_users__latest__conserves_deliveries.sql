-- Every event landed is counted once in a user.
{{ counts_landed(ref('int_users__latest'), 'delivery_count', 'raw_users.user_events') }}
