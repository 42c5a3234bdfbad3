{#
    Feeds whose counts an incremental run must not build on: those of which rows came back to the raw table since (they
    are short on the day they were first landed, see `restored_loads`), and those the last reconciliation found not to
    add up. They are counted anew from the first load on, so that what was put right is seen. A list, empty in a full
    refresh.

    column, counted: the model's column that holds the load, and the condition for rows whose count is final.
#}
{% macro feeds_to_recount(column, counted) -%}
    {%- set feeds = [] -%}
    {%- if execute and is_incremental() -%}
        {%- set restored = run_query(
            "select ledger.feed from " ~ source('ops', 'ledger') ~ " as ledger"
            ~ " inner join (select feed, max(" ~ column ~ ") as load_id from " ~ this
            ~ " where " ~ counted ~ " group by feed) as marks on ledger.feed = marks.feed"
            ~ " where ledger.restored > 0 and ledger.load_id > marks.load_id"
        ) -%}
        {%- do feeds.extend(restored.columns[0].values()) -%}
        {#- Built after this model: what stands there is of the run before. -#}
        {%- set verdicts = adapter.get_relation(this.database, this.schema, 'audit_reconciliation') -%}
        {%- if verdicts -%}
            {%- do feeds.extend(run_query("select feed from " ~ verdicts ~ " where not adds_up").columns[0].values()) -%}
        {%- endif -%}
    {%- endif -%}
    {{ return(feeds | unique | list) }}
{%- endmacro %}
