-- What `init` does beside the scripts, so that no table that is in use stays locked: see upgrade.py.

-- find_unkeyed_tables --
-- The tables of a former version whose primary key has no task_index yet; none in an empty database.
SELECT keyed.name
FROM unnest(ARRAY['task_runs', 'external_claims', 'shadow_reports']) WITH ORDINALITY AS keyed (name, place)
JOIN pg_catalog.pg_class c ON c.oid = pg_catalog.to_regclass('pgflow_prefect.' || keyed.name)
WHERE NOT EXISTS (
    SELECT FROM pg_catalog.pg_constraint p
    JOIN pg_catalog.pg_attribute a ON a.attrelid = p.conrelid AND a.attnum = ANY (p.conkey)
    WHERE p.conrelid = c.oid AND p.contype = 'p' AND a.attname = 'task_index')
ORDER BY keyed.place

-- add_task_index --
-- The column alone: its default is a constant, so no row is written.
ALTER TABLE pgflow_prefect.{table} ADD COLUMN IF NOT EXISTS task_index INT NOT NULL DEFAULT 0

-- find_prepared_index --
-- Whether an index is there, and whole; no row where there is none.
SELECT i.indisvalid AS is_valid FROM pg_catalog.pg_index i
WHERE i.indexrelid = pg_catalog.to_regclass(%(index)s)

-- keep_builders_out --
-- Waits for another session that builds an index of the table.
LOCK TABLE {schema}.{table} IN SHARE UPDATE EXCLUSIVE MODE

-- drop_prepared_index --
-- What an interrupted build or a former version has left.
DROP INDEX IF EXISTS {schema}.{index}

-- build_prepared_index --
-- Reads the table twice, and keeps no claim and no report waiting.
CREATE UNIQUE INDEX CONCURRENTLY {index} ON {schema}.{table} (run_id, step_slug, task_index)

-- build_index_to_take --
-- What pgflow.sql has for a new database.
CREATE INDEX CONCURRENTLY {index} ON {schema}.{table}
    (workflow_slug, (taken_in IS DISTINCT FROM epoch), created_at) WHERE status = 'pending'

-- build_index_of_dates --
-- Likewise.
CREATE INDEX CONCURRENTLY {index} ON {schema}.{table} (workflow_slug, logical_date) WHERE logical_date IS NOT NULL

-- build_index_of_parents --
-- Likewise.
CREATE UNIQUE INDEX CONCURRENTLY {index}
    ON {schema}.{table} (parent_run_id, parent_step_slug, (coalesce(parent_item, -1)), parent_attempt)
    WHERE parent_run_id IS NOT NULL

-- key_by_task --
-- Makes that index the primary key.
SELECT pgflow_prefect.key_by_task(%(table)s)

-- wait_briefly --
-- Until the transaction's end, wait no longer than this for a lock: claims and reports queue up behind it.
SELECT pg_catalog.set_config('lock_timeout', '500ms', true)

-- list_under_way --
-- The transactions of other sessions that are in the middle of a statement, as far as this role may see that.
SELECT l.virtualtransaction AS transaction
FROM pg_catalog.pg_locks l
JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'virtualxid' AND l.granted AND a.datname = pg_catalog.current_database()
  AND coalesce(a.backend_type, 'client backend') = 'client backend' AND a.pid <> pg_catalog.pg_backend_pid()
  AND coalesce(a.state, '') NOT LIKE 'idle%%'
