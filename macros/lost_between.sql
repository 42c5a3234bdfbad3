{#
    Keys of untested rows (see `untested`) that a model does not have as its parent has them, or that only it has.

    key:      named alike in both.
    measures: columns of both that are the same.
#}
{% macro lost_between(parent, model, key, measures) -%}
    with given as (
        select * from {{ parent }}
        where {{ untested(parent) }}
    ),

    taken as (
        select * from {{ model }}
        where {{ untested(model) }}
    )

    select given.{{ key }}
    from given
    left join {{ model }} as same on given.{{ key }} = same.{{ key }}
    where
        same.{{ key }} is null
        {%- for measure in measures %}
        or given.{{ measure }} is distinct from same.{{ measure }}
        {%- endfor %}
    union all
    select taken.{{ key }}
    from taken
    left join {{ parent }} as same on taken.{{ key }} = same.{{ key }}
    where same.{{ key }} is null
{%- endmacro %}
