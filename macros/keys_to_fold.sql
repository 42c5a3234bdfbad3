{#
    The keys of new rows that an incremental run folds into the model's own, as a subquery for `in`: all of them but
    those `from_raw` gives anew, with every raw row they have, because a load brought some of their rows back.

    relation: the new rows, with `_dlt_load_id`.
    key:      the same as given to `from_raw`.
#}
{% macro keys_to_fold(relation, key, source_name, table_name) -%}
    {%- set restored = restored_loads(source_name, table_name) -%}
    {%- set columns = [] -%}
    {%- for column in key -%}
        {%- do columns.append(relation ~ '.' ~ column) -%}
    {%- endfor -%}
    (
        select {{ columns | join(', ') }} from {{ relation }}
        {%- if restored %}
        except
        select {{ columns | join(', ') }} from {{ relation }}
        where {{ relation }}._dlt_load_id in ('{{ restored | join("', '") }}')
        {%- endif %}
    )
{%- endmacro %}
