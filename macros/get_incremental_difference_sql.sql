{#
    Incremental strategy `difference`: the model computes all its rows, and only those that differ are written. Rows
    that are gone are deleted, new ones inserted, changed ones updated.

    So the table equals its full refresh by construction, a build with nothing new writes nothing, readers never meet
    an empty or missing table, and their own views on it are not dropped, as a rebuilt table's would be.
#}
{% macro get_incremental_difference_sql(arg_dict) %}
    {%- set target_relation = arg_dict['target_relation'] -%}
    {%- set new_relation = arg_dict['temp_relation'] -%}
    {%- set columns = arg_dict['dest_columns'] | map(attribute='quoted') | list -%}
    {%- set keys = arg_dict['unique_key'] -%}
    {%- if not keys -%}
        {{ exceptions.raise_compiler_error('The strategy `difference` needs `unique_key`: ' ~ target_relation) }}
    {%- endif -%}
    {%- set keys = [keys] if keys is string else keys %}

    delete from {{ target_relation }} as old
    where not exists (
        select 1 from {{ new_relation }} as new
        where {% for key in keys %}new.{{ key }} = old.{{ key }}{% if not loop.last %} and {% endif %}{% endfor %}
    );

    insert into {{ target_relation }} ({{ columns | join(', ') }})
    (
        select {{ columns | join(', ') }} from {{ new_relation }}
        except
        select {{ columns | join(', ') }} from {{ target_relation }}
    )
    on conflict ({{ keys | join(', ') }}) do update set
        {% for column in columns -%}
            {{ column }} = excluded.{{ column }}{% if not loop.last %}, {% endif %}
        {%- endfor %}
{% endmacro %}
