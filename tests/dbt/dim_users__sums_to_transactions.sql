-- Every transaction belongs to exactly one user of the dimension.
{% call unless_tested(ref('fct_transactions')) %}
{{ sums_to_transactions(ref('dim_users'), 'user_key') }}
{% endcall %}
