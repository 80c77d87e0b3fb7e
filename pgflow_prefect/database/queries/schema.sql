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
-- as pgflow.sql knows it. Of another program's, the name of a table. Unknown: what the released pgflow says with a word
-- that is not among those that this program can show, or does not say any more.
WITH known (relation, attribute, words) AS (
    VALUES ('runs', 'status', '{started,completed,failed}'::text[]),
           ('step_states', 'status', '{created,started,completed,failed,skipped}'),
           ('step_tasks', 'status', '{queued,started,completed,failed,skipped,cancelled}'),
           ('steps', 'step_type', '{single,map}'),
           ('steps', 'when_unmet', '{fail,skip,skip-cascade}'),
           ('steps', 'when_exhausted', '{fail,skip,skip-cascade}')
), needed (relation, attribute) AS (
    SELECT r.relation, a.attribute FROM (
        VALUES ('flows', 'flow_slug opt_max_attempts opt_base_delay opt_timeout'),
               ('steps', 'flow_slug step_slug step_type step_index opt_max_attempts opt_base_delay opt_timeout opt_start_delay'),
               ('deps', 'flow_slug dep_slug step_slug'),
               ('runs', 'run_id flow_slug status input remaining_steps started_at completed_at failed_at'),
               ('step_states', 'flow_slug run_id step_slug status initial_tasks error_message created_at started_at '
                               'completed_at failed_at'),
               ('step_tasks', 'flow_slug run_id step_slug task_index status attempts_count error_message output queued_at '
                              'started_at last_worker_id'),
               ('workers', 'worker_id queue_name function_name last_heartbeat_at deprecated_at')) r (relation, attributes),
        LATERAL regexp_split_to_table(r.attributes, ' +') a (attribute)
), present AS (
    SELECT c.oid, c.relname::text AS relation, a.attname::text AS attribute, a.attnum
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'pgflow'
    LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')
)
SELECT coalesce(bool_or(p.relation = 'workflows' AND p.attribute = 'slug'), false) AS is_classic,
       count(*) FILTER (WHERE (p.relation, p.attribute) IN (('flows', 'flow_slug'), ('step_tasks', 'task_index'),
                                                            ('step_states', 'initial_tasks'))) = 3 AS is_released,
       coalesce(bool_or(p.relation = 'step_states' AND p.attribute = 'skip_reason'), false) AS has_skips,
       ARRAY(SELECT d.relation || '.' || d.attribute || ' is missing' FROM needed d
             WHERE NOT EXISTS (SELECT FROM present q WHERE (q.relation, q.attribute) = (d.relation, d.attribute))
             UNION ALL
             SELECT DISTINCT k.relation || '.' || k.attribute || ' may be ' || quote_literal(w.word[1])
             FROM known k
             JOIN present q ON (q.relation, q.attribute) = (k.relation, k.attribute)
             JOIN pg_catalog.pg_constraint t ON t.conrelid = q.oid AND t.contype = 'c' AND t.conkey = ARRAY[q.attnum],
             LATERAL regexp_matches(pg_catalog.pg_get_constraintdef(t.oid), '''([^'']*)''::text', 'g') w (word)
             WHERE w.word[1] <> ALL (k.words)) AS unknown,
       coalesce(min(p.relation) FILTER (WHERE p.relation = 'flows'), min(p.relation)) AS some_table
FROM present p

-- find_adapter --
-- A row where there is a schema of ours, whatever is in it.
SELECT n.oid FROM pg_catalog.pg_namespace n WHERE n.nspname = 'pgflow_prefect'

-- find_hidden --
-- A table of ours whose rows row-level security may hide from the current user; no row where there is none.
SELECT n.nspname || '.' || c.relname AS name, current_user AS "user", quote_ident(current_user) AS quoted
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname IN ('pgflow', 'pgflow_prefect') AND c.relkind IN ('r', 'p') AND pg_catalog.row_security_active(c.oid)
ORDER BY c.relname <> 'runs', n.nspname, c.relname LIMIT 1

-- read_isolation --
-- The isolation level of a statement that names none: of the role, the database, or the server.
SELECT current_setting('default_transaction_isolation') AS isolation
