-- Which versions of our schemas are installed. The catalog is read: these statements work whatever is there, and
-- whichever rights a role has.

-- find_versions --
-- The installed versions, NULL for none: read, not called, for that takes rights.
SELECT max(substring(p.prosrc FROM '[0-9]+')::int) FILTER (WHERE p.proname = 'engine_version') AS engine,
       max(substring(p.prosrc FROM '[0-9]+')::int) FILTER (WHERE p.proname = 'adapter_version') AS adapter
FROM pg_catalog.pg_proc p
JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE (n.nspname, p.proname) IN (('pgflow', 'engine_version'), ('pgflow_prefect', 'adapter_version'))

-- find_schema --
-- Whose schema pgflow is: by columns, for versions of the released pgflow have no number there. The classic one is known
-- as pgflow.sql knows it. Of another program's, the name of a table.
SELECT coalesce(bool_or(c.relname = 'workflows' AND a.attname = 'slug'), false) AS is_classic,
       count(*) FILTER (WHERE (c.relname, a.attname) IN (('flows', 'flow_slug'), ('step_tasks', 'task_index'),
                                                         ('step_states', 'initial_tasks'))) = 3 AS is_released,
       coalesce(bool_or(c.relname = 'step_states' AND a.attname = 'skip_reason'), false) AS has_skips,
       coalesce(min(c.relname::text) FILTER (WHERE c.relname = 'flows'), min(c.relname::text)) AS some_table
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'pgflow'
LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')

-- find_hidden --
-- A table of ours whose rows row-level security may hide from the current user; no row where there is none.
SELECT n.nspname || '.' || c.relname AS name, current_user AS "user", quote_ident(current_user) AS quoted
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname IN ('pgflow', 'pgflow_prefect') AND c.relkind IN ('r', 'p') AND pg_catalog.row_security_active(c.oid)
ORDER BY c.relname <> 'runs', n.nspname, c.relname LIMIT 1

-- read_isolation --
-- The isolation level of a statement that names none: of the role, the database, or the server.
SELECT current_setting('default_transaction_isolation') AS isolation
