{#
    On-run-start: from here on the models may differ from what `warehouse run` built last, so that its next one builds
    (orchestration/standing.py). After a build of its own `warehouse run` notes it again.
#}
{% macro forget_standing() -%}
    {%- if execute and flags.WHICH in ('build', 'clone', 'run', 'run-operation', 'seed', 'snapshot')
        and adapter.get_relation(database=target.database, schema='ops', identifier='standing') is not none -%}
        {{ return('delete from ops.standing') }}
    {%- endif -%}
    {{ return('') }}
{%- endmacro %}
