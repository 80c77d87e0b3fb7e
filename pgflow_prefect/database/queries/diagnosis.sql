-- What `pgflow-prefect doctor` asks. Only what every role may look at, as far as that is possible.

-- read_server --
-- Which server and database this is, and who asks.
SELECT current_setting('server_version') AS version, current_setting('server_version_num')::int AS number,
       current_database() AS database, current_user AS "user", clock_timestamp() AS now

-- list_missing_rights --
-- What a role that executes runs needs, and this user does not have: as sql/supabase/roles.sql grants it to pgflow_work.
WITH ours AS (
    SELECT n.oid, n.nspname FROM pg_catalog.pg_namespace n WHERE n.nspname IN ('pgflow', 'pgflow_prefect')
), relation AS (
    SELECT c.oid, ours.nspname || '.' || c.relname AS name, c.relkind, CASE
        WHEN c.relkind = 'v' OR c.relname ~ '^binding' OR c.relname ~ '^airflow_' OR c.relname = 'installation' THEN '{SELECT}'::text[]
        WHEN ours.nspname = 'pgflow_prefect' OR c.relname IN ('runs', 'step_states') THEN '{SELECT,INSERT,UPDATE}'
        WHEN c.relname IN ('waiting_steps', 'undone_steps', 'step_maps', 'step_items') THEN '{SELECT,INSERT,UPDATE,DELETE}'
        ELSE '{SELECT}' END AS needed
    FROM pg_catalog.pg_class c JOIN ours ON ours.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v')
), routine AS (
    SELECT p.oid, ours.nspname || '.' || p.proname AS name
    FROM pg_catalog.pg_proc p JOIN ours ON ours.oid = p.pronamespace
    WHERE p.prokind = 'f' AND p.prorettype <> 'trigger'::regtype
      AND p.proname NOT IN ('change_binding', 'bind_step', 'undo_binding', 'observe_workflow', 'insert_workflow',
                            'lock_workflow', 'insert_steps', 'insert_deps', 'set_rules', 'delete_steps', 'delete_deps', 'prune_runs',
                            'prune_run', 'prune_definitions', 'prune_backfills', 'find_gone_runs', 'find_prunable', 'choose_prunable', 'lock_schema',
                            'close_schema', 'hand_on_rights', 'reserve_pages', 'pause_reactions', 'write_snapshot', 'new_installation',
                            'move_installation', 'name_airflow_dags', 'remove_airflow_dags',
                            'claim_airflow_task', 'watch_airflow_tasks', 'end_airflow_task')
)
SELECT missing FROM (
    SELECT 1 AS place, 'USAGE on schema ' || nspname AS missing FROM ours WHERE NOT has_schema_privilege(oid, 'USAGE')
    UNION
    SELECT 2, granted || ' on ' || name FROM relation CROSS JOIN unnest(needed) AS granted
    WHERE NOT has_table_privilege(oid, granted)
      AND (granted = 'DELETE' OR NOT has_any_column_privilege(oid, granted))
    UNION
    SELECT 3, 'EXECUTE on function ' || name FROM routine WHERE NOT has_function_privilege(oid, 'EXECUTE')
    UNION
    SELECT 4, 'BYPASSRLS, for row-level security of ' || name FROM relation
    WHERE relkind IN ('r', 'p') AND row_security_active(oid)
) found
ORDER BY place, missing

-- list_disabled_triggers --
-- Triggers of ours that do not fire, or not in all sessions, and the command that helps; foreign keys have some, too.
WITH trigger AS (
    SELECT t.tgname AS name, t.tgenabled AS enabled, n.nspname AS schema, c.relname AS "table",
           t.tgname ~ '^(edited_by_|replace_(installation|limits)$)' AS is_always
    FROM pg_catalog.pg_trigger t
    JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
    JOIN pg_catalog.pg_namespace f ON f.oid = p.pronamespace
    WHERE n.nspname IN ('pgflow', 'pgflow_prefect') AND (t.tgisinternal OR f.nspname IN ('pgflow', 'pgflow_prefect'))
)
SELECT format('%%s on %%I.%%I', name, schema, "table") AS trigger,
       format('ALTER TABLE %%I.%%I ENABLE %%sTRIGGER %%I', schema, "table", CASE WHEN is_always THEN 'ALWAYS ' ELSE '' END, name)
           AS command,
       name LIKE 'edited_by_%%' AS sees_edits
FROM trigger
WHERE enabled IN ('D', 'R') OR (is_always AND enabled <> 'A')
ORDER BY sees_edits DESC, schema, "table", name

-- list_unlike_snapshots --
-- Workflows whose next run would begin with a definition that their rows do not have.
SELECT slug FROM pgflow_prefect.list_unlike_snapshots() AS slug

-- read_released --
-- The version of the released pgflow, as far as columns and functions tell it, and the columns that this program does not
-- know: nothing here reads them.
WITH present AS (
    SELECT c.relname::text AS relation, a.attname::text AS attribute
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE n.nspname = 'pgflow' AND c.relkind IN ('r', 'p')
), known (relation, attributes) AS (
    VALUES ('flows', 'flow_slug opt_max_attempts opt_base_delay opt_timeout created_at queue_mode'),
           ('steps', 'flow_slug step_slug step_type step_index deps_count opt_max_attempts opt_base_delay opt_timeout '
                     'opt_start_delay required_input_pattern forbidden_input_pattern when_unmet when_exhausted created_at '
                     'queue_name'),
           ('deps', 'flow_slug dep_slug step_slug created_at'),
           ('runs', 'run_id flow_slug status input output remaining_steps started_at completed_at failed_at'),
           ('step_states', 'flow_slug run_id step_slug status remaining_tasks initial_tasks remaining_deps output '
                           'error_message skip_reason created_at started_at completed_at failed_at skipped_at'),
           ('step_tasks', 'flow_slug run_id step_slug message_id task_index status attempts_count error_message output '
                          'queued_at started_at completed_at failed_at last_worker_id requeued_count last_requeued_at '
                          'permanently_stalled_at queue_name'),
           ('workers', 'worker_id queue_name function_name started_at deprecated_at stopped_at last_heartbeat_at')
), routine AS (
    SELECT p.proname, p.pronargs FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname = 'pgflow'
)
SELECT CASE
           WHEN EXISTS (SELECT FROM present WHERE (relation, attribute) = ('flows', 'queue_mode')) THEN '0.17'
           WHEN EXISTS (SELECT FROM present WHERE (relation, attribute) = ('worker_functions', 'start_mode')) THEN '0.15'
           WHEN EXISTS (SELECT FROM present WHERE (relation, attribute) = ('step_states', 'skip_reason')) THEN '0.14'
           WHEN EXISTS (SELECT FROM routine WHERE proname = 'requeue_stalled_tasks') THEN '0.13.2'
           WHEN EXISTS (SELECT FROM present WHERE (relation, attribute) = ('step_states', 'output')) THEN '0.13'
           WHEN EXISTS (SELECT FROM routine WHERE (proname, pronargs) = ('ensure_flow_compiled', 3)) THEN '0.11'
           WHEN EXISTS (SELECT FROM routine WHERE proname = 'ensure_workers') THEN '0.10'
           ELSE '0.7' END AS version,
       EXISTS (SELECT FROM routine WHERE proname = 'requeue_stalled_tasks') AS requeues,
       ARRAY(SELECT format('%%s.%%s', p.relation, p.attribute) FROM present p JOIN known k USING (relation)
             WHERE p.attribute <> ALL (regexp_split_to_array(k.attributes, ' +')) ORDER BY 1) AS unknown

-- list_queues --
-- Each flow of the released pgflow with its tasks and its workers.
SELECT workflow_slug, queued, oldest, started, live_workers, last_heartbeat_at, functions FROM pgflow_prefect.list_queues()

-- list_stalled_tasks --
-- Tasks whose time is over.
SELECT workflow_slug, run_id, step_slug, task_index, started_at, requeued, is_given_up, tasks
FROM pgflow_prefect.list_stalled_tasks(%(limit)s)

-- list_moved_steps --
-- Steps that Prefect executes while pgflow's own workers do the others of their flow.
SELECT workflow_slug, step_slug, moved_at, moved_by, waiting, has_triggers FROM pgflow_prefect.list_moved_steps()

-- find_power --
-- Whether the current user is a superuser, and whether it owns the tables.
SELECT r.rolsuper AS is_superuser,
       pg_has_role((SELECT c.relowner FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                    WHERE n.nspname = 'pgflow' AND c.relname = 'runs'), 'USAGE') AS is_owner
FROM pg_catalog.pg_roles r WHERE r.rolname = current_user

-- find_work_role --
-- Whether the role that has all that is there.
SELECT to_regrole('pgflow_work') IS NOT NULL AS found

-- listen_for_doctor --
-- Hear of what is sent below.
LISTEN pgflow_doctor

-- unlisten_for_doctor --
-- A pooler may keep this session for others.
UNLISTEN pgflow_doctor

-- notify_doctor --
-- Send something to the sessions that listen.
SELECT pg_notify('pgflow_doctor', 'heard')

-- count_untaken_runs --
-- Pending runs of enabled workflows that no process has taken for a while; those begun before the enabling apart. Without
-- those that are set aside.
SELECT workflow_slug, runs, older FROM pgflow_prefect.count_untaken_runs(%(seconds)s, %(lease)s)

-- list_set_aside --
-- Pending runs that could not be taken, and why.
SELECT run_id, workflow_slug, reason, runs FROM pgflow_prefect.list_set_aside(%(lease)s, %(limit)s)
