-- Three roles of least privilege for a database of the released pgflow: GRANT pgflow_observe TO my_login;
--
--   pgflow_observe  reads flows, runs, steps, tasks and workers, and what Prefect was told. Changes nothing
--   pgflow_work     reads the same, and writes what `pgflow-prefect observe` notes in the schema pgflow_prefect. Changes
--                   nothing of pgflow
--   pgflow_execute  may do what pgflow_work may, and executes the flows that the owner has moved to Prefect: it calls pgflow's
--                   functions, which write runs, steps, tasks and messages with its rights. Moves no flow, deletes no run,
--                   changes no definition
--
-- The first two can't read the messages of pgmq, nor write for pgflow. Supabase's roles anon, authenticated and
-- service_role get nothing here. If row-level security is on for a table of pgflow, a login also needs BYPASSRLS: half of
-- the rows is worse than none, and the functions raise an error.
--
-- Paste it into an SQL editor as the owner of the schema pgflow_prefect, or psql -f roles.sql. One transaction, safe to run
-- again, and needed again after an upgrade of pgflow_prefect. Your own grants to these roles stay.
--
-- Roles belong to the whole server, grants to this database: `pgflow-prefect init --remove` takes these grants back. At
-- last: DROP ROLE pgflow_execute; DROP ROLE pgflow_observe; DROP ROLE pgflow_work;

BEGIN ISOLATION LEVEL READ COMMITTED;

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;

DO $guard$
BEGIN
    IF to_regclass('pgflow_prefect.flow_runs') IS NULL OR to_regclass('pgflow.step_tasks') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow_prefect of the released pgflow is missing'
            USING HINT = 'Run `pgflow-prefect init` first.';
    END IF;
END
$guard$;

DO $roles$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['pgflow_work', 'pgflow_observe', 'pgflow_execute'] LOOP
        CONTINUE WHEN EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = wanted);
        BEGIN
            EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
        EXCEPTION
            WHEN duplicate_object OR unique_violation THEN
                NULL; -- this script, in another database, a moment ago
            WHEN insufficient_privilege THEN
                RAISE EXCEPTION 'the role % is missing, and % may not create roles', wanted, current_user
                    USING ERRCODE = 'insufficient_privilege',
                          HINT = 'Let a role with CREATEROLE say: CREATE ROLE pgflow_work; CREATE ROLE pgflow_observe; '
                                 'CREATE ROLE pgflow_execute; then run this again.';
        END;
    END LOOP;
END
$roles$;

GRANT USAGE ON SCHEMA pgflow, pgflow_prefect TO pgflow_work, pgflow_observe, pgflow_execute;
GRANT SELECT ON pgflow.flows, pgflow.steps, pgflow.deps, pgflow.runs, pgflow.step_states, pgflow.step_tasks, pgflow.workers
    TO pgflow_work, pgflow_observe, pgflow_execute;
GRANT SELECT ON ALL TABLES IN SCHEMA pgflow_prefect TO pgflow_work, pgflow_observe, pgflow_execute;
-- Which database this is in Prefect (installation), which flows are moved, and who does a step only the owner says.
GRANT INSERT, UPDATE, DELETE ON pgflow_prefect.heartbeats, pgflow_prefect.enabled_workflows, pgflow_prefect.flow_runs,
    pgflow_prefect.run_owners, pgflow_prefect.run_flow_runs, pgflow_prefect.task_runs, pgflow_prefect.item_claims,
    pgflow_prefect.set_aside_runs TO pgflow_work, pgflow_execute;
GRANT INSERT, UPDATE, DELETE ON pgflow_prefect.taken_out TO pgflow_execute;
-- Not which steps are moved: what a claim may lock.
GRANT UPDATE (is_swept, seen_in) ON pgflow_prefect.moved_steps TO pgflow_execute;
-- pgflow's functions write with the rights of their caller.
GRANT INSERT, UPDATE ON pgflow.runs, pgflow.step_states, pgflow.step_tasks, pgflow.workers TO pgflow_execute;

DO $queues$
DECLARE
    granted record;
BEGIN
    FOR granted IN
        SELECT 'SCHEMA ' || quote_ident(n.nspname) AS what, 'USAGE' AS rights FROM pg_catalog.pg_namespace n
        WHERE n.nspname IN ('pgmq', 'realtime')
        UNION ALL
        SELECT 'FUNCTION ' || p.oid::regprocedure, 'EXECUTE' FROM pg_catalog.pg_proc p
        JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
        WHERE p.prokind = 'f' AND (n.nspname = 'pgflow' AND p.proname <> 'delete_flow_and_data'
                                   OR n.nspname = 'pgmq' AND p.proname IN ('archive', 'set_vt', 'send_batch', 'send',
                                                                           'format_table_name', 'validate_queue_name')
                                   OR n.nspname = 'realtime' AND p.proname = 'send')
        UNION ALL
        SELECT 'TABLE realtime.messages', 'INSERT' WHERE to_regclass('realtime.messages') IS NOT NULL
    LOOP
        BEGIN
            EXECUTE format('GRANT %s ON %s TO pgflow_execute', granted.rights, granted.what);
        EXCEPTION WHEN insufficient_privilege THEN -- Supabase owns it, and every role has it there
            RAISE NOTICE 'not granted to pgflow_execute: % on %', granted.rights, granted.what;
        END;
    END LOOP;
    PERFORM pgflow_prefect.grant_queue(m.flow_slug) FROM pgflow_prefect.moved_flows m WHERE m.is_ours;
END
$queues$;

DO $functions$
DECLARE
    granted record;
BEGIN
    FOR granted IN
        SELECT p.oid::regprocedure AS name, p.provolatile <> 'v' AS only_reads
        FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname = 'pgflow_prefect' AND p.proname <> ALL ('{new_installation,move_installation,move_flow,move_flow_back,guard_tasks,
                                                               grant_queue,keep_claimed,move_step,move_step_back,guard_steps,
                                                               take_new_tasks,return_message,take_again}')
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO pgflow_work, pgflow_execute', granted.name);
        IF granted.only_reads THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO pgflow_observe', granted.name);
        END IF;
    END LOOP;
END
$functions$;

COMMIT;
