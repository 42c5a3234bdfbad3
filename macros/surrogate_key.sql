{#
    A key made of the natural one: the same input gives the same key in every build and every environment. As uuid it
    takes 16 bytes a row where the text of the digest takes 33.

    expressions: SQL expressions, in an order that must never change; the separator cannot occur in an identifier.
#}
{% macro surrogate_key(expressions) -%}
    cast(md5(
        {%- for expression in expressions -%}
            coalesce(cast({{ expression }} as text), '')
            {%- if not loop.last %} || chr(31) || {% endif -%}
        {%- endfor -%}
    ) as uuid)
{%- endmacro %}
