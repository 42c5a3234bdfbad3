{#
    A token in place of a personal value: HMAC-SHA-256 with the warehouse's key, its first 16 bytes as uuid. The same value
    gives the same token in every table, so tokens join; without the key nobody finds the value, however few there are.

    The key is written by the loaders into `ops.token_key` (from WAREHOUSE_TOKEN_SECRET; ingestion/tokens.py), and not into the
    SQL, which dbt leaves in target/ and in logs. Lineage takes a column for tokenised when its SQL is this.
#}
{% macro token(expression) -%}
    cast(encode(substring(sha256(
        (select outer_pad from ops.token_key)
        || sha256((select inner_pad from ops.token_key) || convert_to(cast({{ expression }} as text), 'UTF8'))
    ) from 1 for 16), 'hex') as uuid)
{%- endmacro %}
