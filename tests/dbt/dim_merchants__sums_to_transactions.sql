-- Every transaction belongs to exactly one merchant of the dimension.
{% call unless_tested(ref('fct_transactions')) %}
{{ sums_to_transactions(ref('dim_merchants'), 'merchant_key') }}
{% endcall %}
