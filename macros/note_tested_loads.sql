{#
    On-run-end: how far each relation is tested. It moves on when all of its tests have run and passed, and is forgotten
    when one failed, or when the relation was rebuilt without them. Of models those are noted that are merged by load:
    only there a changed row names the load that changed it. A raw table is tested up to the last load committed before
    the run; the minute is for clocks that disagree.
#}
{% macro note_tested_loads(results) -%}
    {%- if not execute or flags.WHICH not in ('build', 'run', 'test') -%}
        {{ return('') }}
    {%- endif -%}
    {%- set passed, rebuilt = {}, [] -%}
    {%- for result in results -%}
        {%- if result.node.resource_type == 'test' and result.status in ('pass', 'warn', 'fail') -%}
            {%- do passed.update({result.node.unique_id: result.status != 'fail'}) -%}
        {%- elif result.node.resource_type == 'model' and flags.FULL_REFRESH -%}
            {%- do rebuilt.append(result.node.unique_id) -%}
        {%- endif -%}
    {%- endfor -%}
    {%- if not passed and not rebuilt -%}
        {{ return('') }}
    {%- endif -%}

    {%- set tests_of = {} -%}
    {%- for node in graph.nodes.values() if node.resource_type == 'test' -%}
        {%- for parent in node.depends_on.nodes -%}
            {%- do tests_of.setdefault(parent, []).append(node.unique_id) -%}
        {%- endfor -%}
    {%- endfor -%}

    {%- set tested = generate_schema_name('audit', none) ~ '.tested_loads' -%}
    {%- set statements = [
        'create schema if not exists ' ~ generate_schema_name('audit', none),
        'create table if not exists ' ~ tested
        ~ ' (relation text, load_column text, load_id text not null, primary key (relation, load_column))',
    ] -%}
    {%- for parent, tests in tests_of.items() -%}
        {%- set node = graph.nodes.get(parent) or graph.sources.get(parent) -%}
        {%- set relation = node.schema ~ '.' ~ (node.alias or node.identifier) -%}
        {%- set outcomes = [] -%}
        {%- for test in tests if test in passed -%}
            {%- do outcomes.append(passed[test]) -%}
        {%- endfor -%}
        {#- Column -> where its greatest tested load is found. -#}
        {%- set reached = {} -%}
        {%- if node.resource_type == 'source' and node.source_name.startswith('raw_') -%}
            {%- do reached.update({
                '_dlt_load_id': "max(load_id) as mark from ops.loads where feed = '" ~ node.source_name ~ "." ~ node.name
                ~ "' and committed_at < timestamptz '" ~ run_started_at ~ "' - interval '1 minute'"
            }) -%}
        {%- elif node.resource_type == 'model' and node.config.incremental_strategy == 'merge' -%}
            {%- for column in ['_last_load_id', '_fx_load_id'] if column in node.columns -%}
                {%- do reached.update({column: 'max(' ~ column ~ ') as mark from ' ~ relation}) -%}
            {%- endfor -%}
        {%- endif -%}
        {%- if reached and (false in outcomes or (parent in rebuilt and outcomes | length < tests | length)) -%}
            {%- do statements.append("delete from " ~ tested ~ " where relation = '" ~ relation ~ "'") -%}
        {%- elif outcomes | length == tests | length -%}
            {%- for column, mark in reached.items() -%}
                {%- do statements.append(
                    "insert into " ~ tested ~ " select '" ~ relation ~ "', '" ~ column ~ "', mark from (select " ~ mark
                    ~ ") as reached where mark is not null"
                    ~ " on conflict (relation, load_column) do update set load_id = excluded.load_id"
                ) -%}
            {%- endfor -%}
        {%- endif -%}
    {%- endfor -%}
    {{ return(statements | join(';\n')) }}
{%- endmacro %}
