-- Four roles of least privilege, to be granted to login roles: GRANT pgflow_work TO my_worker;
--
--   pgflow_define   edits workflows, steps, deps and bindings. Sees no run
--   pgflow_run      starts, cancels and reopens runs by pgflow_api. Reads runs and step states
--   pgflow_work     takes runs, and claims, completes and fails steps. For worker, bridge and reconcile, and for your
--                   workers that read a queue. Can't change steps or bindings
--   pgflow_observe  reads everything, changes nothing
--
-- None of them deletes runs: let `pgflow-prefect prune`, or a job of pg_cron, run as the owner of the tables.
--
-- A binding names the code that a worker executes. So a role that may define workflows decides what workers do.
-- Supabase's service_role, if there is one, may do all of this.
--
-- Needs pgflow.sql and api.sql; run it again after the scripts of classic/ were added or upgraded. Paste it into
-- an SQL editor as the owner of the schema pgflow, or psql -f roles.sql. One transaction, safe to run again.
-- Your own grants to these roles stay.
--
-- An open transaction of a login holds locks. Starts of the workflow and deletions of its steps may then wait. Members of
-- a role do not inherit its settings, so set this for each login:
--     ALTER ROLE my_worker SET idle_in_transaction_session_timeout = '1min';
--
-- Roles belong to the whole server, grants to this database. To undo it, in each database and for each role:
--     DROP OWNED BY pgflow_define;  and at last:  DROP ROLE pgflow_define;
-- (If you are no superuser, first: GRANT pgflow_define TO CURRENT_USER;)

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;
SET LOCAL pgflow.script_version = 6;

DO $guard$
BEGIN
    IF to_regclass('pgflow_api.requests') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow_api is missing' USING HINT = 'Run pgflow.sql and supabase/api.sql first.';
    END IF;
    IF NOT pg_has_role((SELECT relowner FROM pg_catalog.pg_class WHERE oid = 'pgflow.runs'::regclass), 'USAGE') THEN
        RAISE EXCEPTION '% does not own the tables of pgflow', current_user
            USING ERRCODE = 'insufficient_privilege', HINT = 'Run this as the role that ran pgflow.sql.';
    END IF;
    IF to_regprocedure('pgflow.find_definition(text)') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow is old' USING HINT = 'Run pgflow.sql first.';
    END IF;
    PERFORM pgflow.lock_schema('pgflow');
END
$guard$;

DO $roles$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['pgflow_define', 'pgflow_run', 'pgflow_work', 'pgflow_observe'] LOOP
        CONTINUE WHEN EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = wanted);
        BEGIN
            EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
        EXCEPTION
            WHEN duplicate_object OR unique_violation THEN
                NULL; -- this script, in another database, a moment ago
            WHEN insufficient_privilege THEN
                RAISE EXCEPTION 'the role % is missing, and % may not create roles', wanted, current_user
                    USING ERRCODE = 'insufficient_privilege',
                          HINT = 'Let a role with CREATEROLE say: CREATE ROLE pgflow_define; CREATE ROLE pgflow_run; '
                                 'CREATE ROLE pgflow_work; CREATE ROLE pgflow_observe; then run this again.';
        END;
    END LOOP;
END
$roles$;

-- What earlier versions of this script granted, and no role needs any more.
DO $revokes$
DECLARE
    revoked record;
    grantee text;
BEGIN
    FOR revoked IN
        SELECT format('INSERT, UPDATE, DELETE ON %s', oid::regclass) AS "right", '{pgflow_define}'::text[] AS roles
        FROM pg_catalog.pg_class
        WHERE oid IN (to_regclass('pgflow_prefect.bindings'), to_regclass('pgflow_prefect.binding_changes'))
        UNION ALL
        SELECT format('INSERT, UPDATE, DELETE ON %s', oid::regclass), '{pgflow_work}'
        FROM pg_catalog.pg_class WHERE oid = to_regclass('pgflow_prefect.installation')
        UNION ALL
        SELECT unnest(ARRAY['INSERT ON pgflow.definitions, pgflow.definition_steps, pgflow.definition_deps',
                            'UPDATE (edited_in) ON pgflow.workflows']), '{pgflow_work}'
    LOOP
        FOR grantee IN
            SELECT rolname FROM pg_catalog.pg_roles WHERE rolname = ANY (revoked.roles || '{service_role}')
        LOOP
            EXECUTE format('REVOKE %s FROM %I', revoked."right", grantee);
        END LOOP;
    END LOOP;
END
$revokes$;

DO $grants$
DECLARE
    granted record;
    grantee text;
    binding_relations CONSTANT text := '^binding';
    defining CONSTANT text[] := '{bind_step,undo_binding,observe_workflow,insert_workflow,lock_workflow,insert_steps,'
        'set_rules,insert_deps,delete_steps,delete_deps,name_airflow_dags,'
        'remove_airflow_dags}';
    of_definitions CONSTANT text[] := '{adapter_version,list_slugs,describe_rules,describe_map,describe_child,list_unlike_snapshots,load_definitions,list_bindings,'
        'list_network_bindings,list_binding_changes,list_bound_workflows,list_workflows_with_bindings,list_moved}';
    internal CONSTANT text[] := '{prune_runs,prune_run,prune_definitions,prune_backfills,find_gone_runs,find_prunable,'
        'choose_prunable,'
        'change_binding,lock_schema,close_schema,hand_on_rights,reserve_pages,pause_reactions,write_snapshot,new_installation,'
        'move_installation,claim_airflow_task,watch_airflow_tasks,end_airflow_task}'; -- the last three for Airflow's role
BEGIN
    FOR granted IN
        WITH adapter AS ( -- what a role that runs SQL workers only does not have
            SELECT oid, nspname FROM pg_catalog.pg_namespace WHERE nspname = 'pgflow_prefect'
        ), relation AS (
            SELECT c.oid, c.oid::regclass AS name, c.relname, c.relkind, c.relname ~ binding_relations AS of_bindings
            FROM pg_catalog.pg_class c JOIN adapter ON adapter.oid = c.relnamespace
            WHERE c.relkind IN ('r', 'v', 'm', 'p')
        ), routine AS ( -- no role may use a trigger's function for a trigger of its own
            SELECT p.oid::regprocedure AS name, n.nspname AS schema, p.proname, p.provolatile <> 'v' AS only_reads,
                   p.proname = ANY (defining) AND n.nspname = 'pgflow_prefect' AS changes,
                   p.proname = ANY (of_definitions) AND n.nspname = 'pgflow_prefect' AS reads_definitions
            FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
            WHERE n.nspname IN ('pgflow', 'pgflow_prefect') AND p.prokind = 'f' AND p.prorettype <> 'trigger'::regtype
              AND p.proname <> ALL (internal)
        )
        SELECT * FROM (VALUES
            ('USAGE ON SCHEMA pgflow', '{define,run,work,observe}'::text[]),
            ('USAGE ON SCHEMA pgflow_api', '{run,observe}'),

            ('SELECT ON pgflow.workflows, pgflow.steps, pgflow.deps', '{define,run,work,observe}'),
            ('INSERT (slug, when_failed, failed_by), UPDATE (slug, when_failed, failed_by), DELETE ON pgflow.workflows',
             '{define}'), -- its version is the triggers'
            ('INSERT, UPDATE, DELETE ON pgflow.steps, pgflow.deps', '{define}'),
            ('SELECT ON pgflow.definitions, pgflow.definition_steps, pgflow.definition_deps', '{define,work,observe}'),

            ('SELECT ON pgflow.limits', '{run,work,observe}'),
            ('SELECT ON pgflow.runs, pgflow.step_states', '{run,work,observe}'),
            ('SELECT ON pgflow_api.requests', '{observe}'),
            ('INSERT (workflow_slug, id, payload) ON pgflow.runs', '{run}'),
            ('INSERT (run_id, action, reason) ON pgflow_api.requests', '{run}'),
            ('EXECUTE ON FUNCTION pgflow_api.run_workflow, pgflow_api.request, pgflow_api.cancel_run, '
             'pgflow_api.reopen_run', '{run}'),

            ('INSERT (workflow_slug, id, payload, definition_id, remaining, uses_rules, continues, logical_date, '
             'data_interval, backfill_id, parent_run_id, parent_step_slug, parent_item, parent_attempt, '
             'created_at), ' -- a mirrored run has the times of Airflow
             'UPDATE (status, ended_as, definition_id, remaining, uses_rules, continues, epoch, taken_in, '
             'error_message, finished_at, backfill_id) ON pgflow.runs', '{work}'),
            ('SELECT ON pgflow.backfills, pgflow.backfill_dates', '{run,work,observe}'),
            ('SELECT ON pgflow.child_requests', '{work,observe}'),
            ('INSERT, UPDATE, DELETE ON pgflow.child_requests', '{work}'), -- a row is locked before it is deleted
            ('INSERT, UPDATE ON pgflow.backfills, pgflow.backfill_dates', '{work}'),
            ('INSERT (workflow_slug, run_id, step_slug, status, skip_reason, skip_cascades, skipped_by, skip_note, '
             'error_message, finished_at, attempts, step_result, created_at), '
             'UPDATE (status, ended_as, step_result, attempts, error_message, started_at, finished_at, skip_reason, '
             'skip_cascades, skip_note), DELETE ON pgflow.step_states', -- a reopened run takes steps back
             '{work}'),
            ('SELECT ON pgflow.waiting_steps, pgflow.undone_steps, pgflow.step_maps, pgflow.step_items', '{work,observe}'),
            ('INSERT, UPDATE, DELETE ON pgflow.waiting_steps, pgflow.undone_steps, pgflow.step_maps, pgflow.step_items',
             '{work}')
        ) AS fixed ("right", roles)
        UNION ALL
        SELECT format('USAGE ON SCHEMA %I', nspname), '{define,work,observe}'::text[] FROM adapter
        UNION ALL
        SELECT format('SELECT ON %s', name),
               CASE WHEN of_bindings THEN '{define,work,observe}'::text[] ELSE '{work,observe}' END
        FROM relation
        UNION ALL
        SELECT format('INSERT, UPDATE, DELETE ON %s', name), '{work}'
        FROM relation
        -- By list: which database this is in Prefect (installation) only the owner says.
        WHERE relname IN ('owners', 'flow_runs', 'task_runs', 'enabled_workflows', 'external_claims', 'set_aside_runs',
                          'shadow_reports', 'heartbeats', 'schedules', 'cached_results', 'mirrors', 'mirrored_runs',
                          'airflow_claims')
        UNION ALL
        SELECT format('SELECT, INSERT (workflow_slug), UPDATE (removed_at) ON %s', name), '{define}'
        FROM relation WHERE relname = 'airflow_dags'
        UNION ALL
        -- Bindings and their history are written by the trigger of this view alone.
        SELECT format('INSERT (workflow_slug, step_slug, action, kind, target, options) ON %I.binding_requests', nspname),
               '{define}'::text[]
        FROM adapter
        UNION ALL
        SELECT format('EXECUTE ON FUNCTION %s', name),
               CASE WHEN changes THEN '{define}'::text[]
                    WHEN reads_definitions
                         OR (schema = 'pgflow' AND proname IN ('get_root_steps', 'engine_version', 'is_under_policies',
                                                               'refuse_policies'))
                    THEN '{define,work,observe}'
                    WHEN only_reads THEN '{work,observe}'
                    ELSE '{work}' END
        FROM routine
    LOOP
        FOR grantee IN
            SELECT 'pgflow_' || role FROM unnest(granted.roles) AS role
            UNION ALL
            -- Itself, not by membership: on Supabase it is NOINHERIT.
            SELECT rolname FROM pg_catalog.pg_roles WHERE rolname = 'service_role'
        LOOP
            EXECUTE format('GRANT %s TO %I', granted."right", grantee);
        END LOOP;
    END LOOP;
END
$grants$;

COMMIT;
