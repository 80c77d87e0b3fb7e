-- Which versions of our schemas are installed. The catalog is read: these statements work whatever is there, and
-- whichever rights a role has.

-- find_versions --
-- The installed versions, NULL for none: read, not called, for that takes rights.
SELECT max(substring(p.prosrc FROM '[0-9]+')::int) FILTER (WHERE p.proname = 'engine_version') AS engine,
       max(substring(p.prosrc FROM '[0-9]+')::int) FILTER (WHERE p.proname = 'adapter_version') AS adapter
FROM pg_catalog.pg_proc p
JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE (n.nspname, p.proname) IN (('pgflow', 'engine_version'), ('pgflow_prefect', 'adapter_version'))

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
