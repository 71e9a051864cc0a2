"""``docs/performance.md`` from the records: nothing in it is written by hand."""
