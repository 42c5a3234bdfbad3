{#
    Rows whose text does not match the regular expression. The loader enforces the same rule on each record before it
    lands, so a pattern keeps to what Python and Postgres read alike.
#}
{% test matches_pattern(model, column_name, pattern) %}
    select {{ column_name }}
    from {{ model }}
    where {{ column_name }} !~ '{{ pattern | replace("'", "''") }}'
{% endtest %}
