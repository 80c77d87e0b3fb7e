-- Which versions of our schemas are installed.

-- read_versions --
-- The versions of both.
SELECT pgflow.engine_version() AS engine, pgflow_prefect.adapter_version() AS adapter

-- find_foreign_table --
-- A table of a schema pgflow that is not ours, as pgflow.sql looks for it; no row where there is none.
SELECT c.relname AS name
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'pgflow'
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_class w JOIN pg_catalog.pg_attribute a ON a.attrelid = w.oid
                  WHERE w.relnamespace = n.oid AND w.relname = 'workflows' AND a.attname = 'slug')
ORDER BY c.relname <> 'flows', c.relname LIMIT 1

-- read_isolation --
-- The isolation level of a statement that names none: of the role, the database, or the server.
SELECT current_setting('default_transaction_isolation') AS isolation

-- read_engine_version --
-- The version of the installed pgflow.sql.
SELECT pgflow.engine_version() AS version

-- read_adapter_version --
-- The version of the installed pgflow_prefect.sql.
SELECT pgflow_prefect.adapter_version() AS version
