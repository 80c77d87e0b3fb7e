-- pgflow_prefect on the released pgflow (pgflow.dev): which flows Prefect executes, and who holds their runs.
--
-- A part of the contract of ../CONTRACT.md; needs pgflow_prefect.sql. pgflow's functions are the only writers of its flows,
-- runs, steps and tasks. Moving a flow uses pgflow's own switches: `worker_functions.enabled` and `workers.deprecated_at`.
-- A run that Prefect executes has an owner with an epoch and a lease, and every claim and report carries the epoch.
-- psql -d DATABASE -f pgflow_prefect.sql -f moving.sql -f steps.sql -f executing.sql -f bindings.sql -f observing.sql; safe to
-- run again.

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;

DO $guard$
BEGIN
    IF to_regprocedure('pgflow_prefect.find_column(text,text,text,text)') IS NULL THEN
        RAISE EXCEPTION 'the functions of pgflow_prefect for the released pgflow are missing'
            USING HINT = 'Run pgflow_prefect.sql first.';
    END IF;
    PERFORM set_config('transaction_timeout', '0', true)
    WHERE current_setting('transaction_timeout', true) <> '0'; -- PostgreSQL 17 has it
    -- This locks the schema itself: two installations at once take turns.
    COMMENT ON SCHEMA pgflow_prefect IS 'What pgflow-prefect reads and executes of the released pgflow.';
END
$guard$;


-- The flows that were moved to Prefect. A flow that was moved back keeps its row, which knows our worker.
CREATE TABLE IF NOT EXISTS pgflow_prefect.moved_flows (
    flow_slug TEXT PRIMARY KEY,
    is_ours BOOLEAN NOT NULL DEFAULT true,
    worker_id UUID NOT NULL DEFAULT gen_random_uuid(), -- our row in pgflow.workers from the first claim on, of all processes
    functions TEXT[] NOT NULL DEFAULT '{}',            -- the Edge Functions that were switched off
    moved_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    moved_by TEXT NOT NULL DEFAULT current_user,
    by_steps BOOLEAN NOT NULL DEFAULT false            -- only the steps in moved_steps are ours; Edge workers do the others
);

ALTER TABLE pgflow_prefect.moved_flows ADD COLUMN IF NOT EXISTS by_steps BOOLEAN NOT NULL DEFAULT false;

-- The steps that Prefect executes of these flows. A row is locked FOR KEY SHARE while a message of its step is moved.
CREATE TABLE IF NOT EXISTS pgflow_prefect.moved_steps (
    flow_slug TEXT NOT NULL,
    step_slug TEXT NOT NULL,
    moved_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    moved_by TEXT NOT NULL DEFAULT current_user,
    is_swept BOOLEAN NOT NULL DEFAULT false,           -- no transaction from before the move can leave a message in the queue
    seen_in XID8,                                      -- older transactions may not have seen this row
    PRIMARY KEY (flow_slug, step_slug)
);

-- The messages of their tasks, which are in no queue while they are here. See steps.sql.
CREATE TABLE IF NOT EXISTS pgflow_prefect.taken_out (
    flow_slug TEXT NOT NULL,
    message_id BIGINT NOT NULL,
    run_id UUID NOT NULL,
    step_slug TEXT NOT NULL,
    task_index INT NOT NULL,
    due_at TIMESTAMPTZ NOT NULL,
    message JSONB NOT NULL,                            -- the row of the queue
    PRIMARY KEY (flow_slug, message_id)
);

CREATE INDEX IF NOT EXISTS taken_out_by_run ON pgflow_prefect.taken_out (run_id);

-- A run's owner: only it may write for the run, in its epoch. lease_until has three special values. -infinity: the owner
-- has released the run. 1970: the owner's process is dead. infinity: the owner's flow run waits in Prefect's queue.
CREATE TABLE IF NOT EXISTS pgflow_prefect.run_owners (
    run_id UUID PRIMARY KEY,
    epoch INT NOT NULL,
    flow_run_id UUID,                       -- NULL until Prefect has created it
    held_by TEXT NOT NULL,                  -- host and process, for people
    lease_until TIMESTAMPTZ NOT NULL,
    progress BIGINT NOT NULL DEFAULT 0,     -- tasks that had ended when the run was taken: more now mean progress
    recoveries INT NOT NULL DEFAULT 0,
    stale_writes BIGINT NOT NULL DEFAULT 0, -- refused claims and reports of former owners
    settled BOOLEAN NOT NULL DEFAULT false, -- the run has ended, and Prefect agrees with its rows
    holder JSONB,
    taken_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 70);

-- A run's flow runs, in the epochs in which they took it.
CREATE TABLE IF NOT EXISTS pgflow_prefect.run_flow_runs (
    run_id UUID NOT NULL,
    epoch INT NOT NULL,
    flow_run_id UUID NOT NULL,
    taken_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run_id, epoch)
);

CREATE INDEX IF NOT EXISTS run_flow_runs_by_flow_run ON pgflow_prefect.run_flow_runs (flow_run_id);

-- Runs that could not be taken, and when to try again.
CREATE TABLE IF NOT EXISTS pgflow_prefect.set_aside_runs (
    run_id UUID PRIMARY KEY,
    epoch INT NOT NULL,
    reason TEXT NOT NULL,
    tries INT NOT NULL DEFAULT 1,
    next_try TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp() + interval '1 second'
);


------------------------------------------------------------------------------------------------------------
-- Moving a flow
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.is_leased(lease_until timestamptz, lease double precision) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    -- No process could extend a lease while this server was down. After its start, the runs must not all be taken over.
    SELECT lease_until > clock_timestamp()
        OR (lease_until > 'epoch' AND clock_timestamp() < pg_postmaster_start_time() + make_interval(secs => lease))
$$;

COMMENT ON FUNCTION pgflow_prefect.is_leased(timestamptz, double precision) IS
    'True while a lease holds. Every lease holds for one lease length (in seconds) after the server''s start. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.keep_claimed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER -- pgflow's cron job and other roles have no right on our tables
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM pgflow_prefect.moved_flows m
               WHERE m.flow_slug = OLD.flow_slug AND m.worker_id = OLD.last_worker_id
                 AND (m.is_ours OR EXISTS (SELECT FROM pgflow_prefect.run_owners o
                                           WHERE o.run_id = OLD.run_id AND o.lease_until > clock_timestamp()))) THEN
        RETURN NULL; -- a worker of ours has it, or takes it over
    END IF;
    RETURN NEW;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.keep_claimed() IS
    'Keeps pgflow.requeue_stalled_tasks from tasks that a worker of ours has begun: their leases tell whether it lives. '
    'Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.guard_tasks(wanted boolean) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    is_there boolean := EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = 'pgflow.step_tasks'::regclass
                                AND t.tgname = 'pgflow_prefect_keep_claimed');
BEGIN
    IF wanted AND NOT is_there
       AND pgflow_prefect.find_column('step_tasks', 'requeued_count', 't', 'int') <> 'NULL::int' THEN
        CREATE TRIGGER pgflow_prefect_keep_claimed
            BEFORE UPDATE OF requeued_count, permanently_stalled_at ON pgflow.step_tasks
            FOR EACH ROW WHEN (OLD.status = 'started') EXECUTE FUNCTION pgflow_prefect.keep_claimed();
    ELSIF is_there AND NOT wanted THEN
        DROP TRIGGER pgflow_prefect_keep_claimed ON pgflow.step_tasks;
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.guard_tasks(boolean) IS
    'Creates or drops our only object on a table of pgflow: the trigger that keeps its requeueing from our live tasks. It '
    'exists while a flow is moved. A version that requeues nothing gets none. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.needs_guard() RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    SELECT EXISTS (SELECT FROM pgflow_prefect.moved_flows m WHERE m.is_ours)
        OR EXISTS (SELECT FROM pgflow.step_tasks t
                   JOIN pgflow_prefect.moved_flows m ON m.worker_id = t.last_worker_id
                   JOIN pgflow_prefect.run_owners o ON o.run_id = t.run_id AND o.lease_until > clock_timestamp()
                   WHERE t.status = 'started')
$$;

COMMENT ON FUNCTION pgflow_prefect.needs_guard() IS
    'Whether a task is, or may be, under way in a worker of ours. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.grant_queue(flow_slug text) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles r WHERE r.rolname = 'pgflow_execute') THEN
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON pgmq.%I, pgmq.%I TO pgflow_execute',
                       pgmq.format_table_name(flow_slug, 'q'), pgmq.format_table_name(flow_slug, 'a'));
        EXECUTE format('GRANT SELECT, UPDATE ON SEQUENCE %s TO pgflow_execute', pg_get_serial_sequence(
            format('pgmq.%I', pgmq.format_table_name(flow_slug, 'q')), 'msg_id')); -- for messages that are rebuilt
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.grant_queue(text) IS
    'Lets the role pgflow_execute of roles.sql, where there is one, use the queue of a flow. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.stop_edge_workers(flow_slug text) RETURNS int
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    ours uuid;
    names text[];
    off text[];
    stopped int;
BEGIN
    SELECT m.worker_id INTO ours FROM pgflow_prefect.moved_flows m WHERE m.flow_slug = stop_edge_workers.flow_slug;
    UPDATE pgflow.workers w SET deprecated_at = clock_timestamp()
    WHERE w.queue_name = stop_edge_workers.flow_slug AND w.worker_id <> ours AND w.deprecated_at IS NULL
      -- A worker that died long ago is history.
      AND w.last_heartbeat_at > clock_timestamp() - interval '1 hour';
    GET DIAGNOSTICS stopped = ROW_COUNT;
    IF to_regclass('pgflow.worker_functions') IS NOT NULL THEN
        names := ARRAY(SELECT DISTINCT w.function_name FROM pgflow.workers w
                       WHERE w.queue_name = stop_edge_workers.flow_slug AND w.worker_id <> ours);
        WITH switched AS (
            UPDATE pgflow.worker_functions f SET enabled = false, updated_at = clock_timestamp()
            WHERE f.function_name = ANY (names) AND f.enabled RETURNING f.function_name)
        SELECT array_agg(s.function_name ORDER BY s.function_name) INTO off FROM switched s;
        IF off IS NOT NULL THEN
            UPDATE pgflow_prefect.moved_flows m
            SET functions = ARRAY(SELECT DISTINCT e FROM unnest(m.functions || off) e ORDER BY e)
            WHERE m.flow_slug = stop_edge_workers.flow_slug;
        END IF;
    END IF;
    RETURN stopped;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.stop_edge_workers(text) IS
    'Tells the Edge workers of a flow to stop, and keeps pgflow from starting others: how many were told. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.move_flow(workflow_slug text)
RETURNS TABLE (changed boolean, workers int, functions text[], has_functions boolean, runs bigint)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET lock_timeout = '10s'
AS $$
#variable_conflict use_column
DECLARE
    ours uuid;
    busy record;
BEGIN
    PERFORM FROM pgflow.flows f WHERE f.flow_slug = move_flow.workflow_slug;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown workflow "%"', move_flow.workflow_slug USING ERRCODE = 'no_data_found';
    ELSIF pgflow_prefect.find_column('workers', 'deprecated_at', 'w', 'text') = 'NULL::text' THEN
        RAISE EXCEPTION 'flow "%" stays with pgflow''s own workers: this version of pgflow has no switch that stops them',
                        move_flow.workflow_slug
            USING ERRCODE = 'feature_not_supported',
                  HINT = 'It lacks the column pgflow.workers.deprecated_at. Upgrade pgflow.';
    END IF;
    PERFORM pgflow_prefect.refuse_step_queues(move_flow.workflow_slug);
    IF to_regclass('pgflow.worker_functions') IS NOT NULL THEN
        SELECT w.function_name, o.queue_name INTO busy
        FROM pgflow.workers w
        JOIN pgflow.workers o ON o.function_name = w.function_name AND o.queue_name <> w.queue_name
                             AND o.deprecated_at IS NULL AND o.last_heartbeat_at > clock_timestamp() - interval '30 seconds'
        WHERE w.queue_name = move_flow.workflow_slug
          AND NOT EXISTS (SELECT FROM pgflow_prefect.moved_flows m WHERE m.worker_id IN (w.worker_id, o.worker_id))
        ORDER BY w.function_name, o.queue_name LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'flow "%" can''t be moved alone: the Edge Function "%" works on flow "%", too',
                            move_flow.workflow_slug, busy.function_name, busy.queue_name
                USING ERRCODE = 'object_not_in_prerequisite_state',
                      HINT = 'Give each flow an Edge Function of its own, and move it then.';
        END IF;
    END IF;
    PERFORM pgflow_prefect.lock_moves();
    -- Before the first of their rows, as the head of steps.sql says: a report holds the rows of several steps.
    IF EXISTS (SELECT FROM pgflow_prefect.moved_steps m WHERE m.flow_slug = move_flow.workflow_slug) THEN
        LOCK TABLE pgflow.step_tasks IN ACCESS EXCLUSIVE MODE;
    END IF;
    PERFORM pgflow_prefect.move_step_back(m.flow_slug, m.step_slug) -- their bindings stay
    FROM pgflow_prefect.moved_steps m WHERE m.flow_slug = move_flow.workflow_slug;
    INSERT INTO pgflow_prefect.moved_flows AS m (flow_slug) VALUES (move_flow.workflow_slug)
    ON CONFLICT (flow_slug) DO UPDATE SET is_ours = true, moved_at = clock_timestamp(), moved_by = current_user
    WHERE NOT m.is_ours;
    changed := FOUND;
    SELECT m.worker_id INTO ours FROM pgflow_prefect.moved_flows m WHERE m.flow_slug = move_flow.workflow_slug;
    -- Its first claim writes our worker's row. Here is only one from before the flow was moved back.
    UPDATE pgflow.workers w SET deprecated_at = NULL WHERE w.worker_id = ours AND w.deprecated_at IS NOT NULL;
    workers := pgflow_prefect.stop_edge_workers(move_flow.workflow_slug);
    PERFORM pgflow_prefect.guard_tasks(true);
    PERFORM pgflow_prefect.grant_queue(move_flow.workflow_slug);
    SELECT m.functions INTO functions FROM pgflow_prefect.moved_flows m WHERE m.flow_slug = move_flow.workflow_slug;
    has_functions := to_regclass('pgflow.worker_functions') IS NOT NULL;
    runs := (SELECT count(*) FROM pgflow.runs r WHERE r.flow_slug = move_flow.workflow_slug AND r.status = 'started');
    PERFORM pg_notify('pgflow_runs', '');
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.move_flow(text) IS
    'Moves a whole flow to Prefect, by pgflow''s own switches: its Edge workers are deprecated, and their functions are not '
    'called any more. What they have begun, they end. workers: how many were told to stop. functions: those that are off. '
    'runs: how many go on. Again: stops those that have begun since.';


CREATE OR REPLACE FUNCTION pgflow_prefect.move_flow_back(workflow_slug text)
RETURNS TABLE (changed boolean, workers int, functions text[], has_functions boolean, runs bigint)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET lock_timeout = '10s'
AS $$
#variable_conflict use_column
DECLARE
    former pgflow_prefect.moved_flows;
BEGIN
    PERFORM FROM pgflow.flows f WHERE f.flow_slug = move_flow_back.workflow_slug
    UNION ALL SELECT FROM pgflow_prefect.moved_flows m WHERE m.flow_slug = move_flow_back.workflow_slug AND m.is_ours;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown workflow "%"', move_flow_back.workflow_slug USING ERRCODE = 'no_data_found';
    END IF;
    PERFORM pgflow_prefect.lock_moves();
    SELECT * INTO former FROM pgflow_prefect.moved_flows m
    WHERE m.flow_slug = move_flow_back.workflow_slug AND m.is_ours FOR UPDATE;
    changed := FOUND;
    functions := '{}';
    workers := 0;
    has_functions := to_regclass('pgflow.worker_functions') IS NOT NULL;
    IF former.by_steps THEN
        -- Before the first of their rows, as the head of steps.sql says: a report holds the rows of several steps.
        IF EXISTS (SELECT FROM pgflow_prefect.moved_steps m WHERE m.flow_slug = former.flow_slug) THEN
            LOCK TABLE pgflow.step_tasks IN ACCESS EXCLUSIVE MODE;
        END IF;
        -- Those that the flow has no more, since it was compiled again, have no binding to change.
        PERFORM pgflow_prefect.move_step_back(m.flow_slug, m.step_slug) FROM pgflow_prefect.moved_steps m
        WHERE m.flow_slug = former.flow_slug
          AND NOT EXISTS (SELECT FROM pgflow.steps s WHERE s.flow_slug = m.flow_slug AND s.step_slug = m.step_slug);
        PERFORM pgflow_prefect.bind_step(m.flow_slug, m.step_slug, NULL)
        FROM pgflow_prefect.moved_steps m WHERE m.flow_slug = former.flow_slug;
    ELSIF changed THEN
        UPDATE pgflow_prefect.moved_flows m
        SET is_ours = false, functions = '{}', moved_at = clock_timestamp(), moved_by = current_user
        WHERE m.flow_slug = former.flow_slug;
        UPDATE pgflow.workers w SET deprecated_at = clock_timestamp() WHERE w.worker_id = former.worker_id;
        -- Those that have not yet heard that they were to stop go on.
        UPDATE pgflow.workers w SET deprecated_at = NULL
        WHERE w.queue_name = former.flow_slug AND w.worker_id <> former.worker_id AND w.deprecated_at >= former.moved_at
          AND w.last_heartbeat_at < w.deprecated_at
          AND w.last_heartbeat_at > clock_timestamp() - interval '10 seconds';
        GET DIAGNOSTICS workers = ROW_COUNT;
        IF has_functions THEN
            UPDATE pgflow.worker_functions f SET enabled = true, updated_at = clock_timestamp()
            WHERE f.function_name = ANY (former.functions);
            functions := former.functions;
        END IF;
        PERFORM pgflow_prefect.guard_tasks(false) WHERE NOT pgflow_prefect.needs_guard();
    END IF;
    runs := (SELECT count(*) FROM pgflow.runs r WHERE r.flow_slug = move_flow_back.workflow_slug AND r.status = 'started');
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.move_flow_back(text) IS
    'Gives a flow back to pgflow''s own workers, and switches on what move_flow has switched off. A process of ours ends the '
    'tasks that it has begun, and shows the rest of its runs.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_moved_flows()
RETURNS TABLE (workflow_slug text, moved_at timestamptz, moved_by text, functions text[])
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT m.flow_slug, m.moved_at, m.moved_by, m.functions
        FROM pgflow_prefect.moved_flows m WHERE m.is_ours ORDER BY m.flow_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_moved_flows() IS 'The flows that Prefect executes, and when they were moved.';


------------------------------------------------------------------------------------------------------------
-- Ownership. A process that takes a run gets the next epoch, and everything that carries an older one is refused.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.refuse_policies() RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    hidden text;
BEGIN
    SELECT string_agg(t.name, ', ') INTO hidden
    FROM unnest('{pgflow.runs,pgflow.step_states,pgflow.step_tasks,pgflow_prefect.run_owners,pgflow_prefect.moved_flows,
                  pgflow_prefect.moved_steps,pgflow_prefect.taken_out,pgflow_prefect.task_runs}'::text[]) AS t (name)
    WHERE row_security_active(t.name);
    IF hidden IS NOT NULL THEN
        RAISE EXCEPTION 'row-level security may hide rows of % from %', hidden, current_user
            USING ERRCODE = 'insufficient_privilege', CONSTRAINT = 'row_level_security',
                  HINT = 'Half of the rows is worse than none: connect as a role with BYPASSRLS.';
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.refuse_policies() IS
    'Raises 42501 where row-level security applies to the caller. For functions in which triggers of users run, and that '
    'therefore set no row_security. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.how_held(owner pgflow_prefect.run_owners, lease double precision) RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    SELECT CASE WHEN owner.run_id IS NULL THEN NULL
                WHEN owner.lease_until = '-infinity' THEN 'released'
                WHEN owner.lease_until = 'infinity' THEN 'queued'
                WHEN pgflow_prefect.is_leased(owner.lease_until, lease) THEN 'leased'
                ELSE 'expired' END
$$;

COMMENT ON FUNCTION pgflow_prefect.how_held(pgflow_prefect.run_owners, double precision) IS
    'How the owner holds a run: leased, queued in Prefect, expired, or released. NULL: no owner. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_stale(run_id uuid, epoch int) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE pgflow_prefect.run_owners o SET stale_writes = o.stale_writes + 1
    WHERE o.run_id = is_stale.run_id AND o.epoch > is_stale.epoch;
    RETURN FOUND;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.is_stale(uuid, int) IS
    'Tells whether another owner has taken the run since this epoch, and counts the refused write if so. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.note_flow_run(run_id uuid, epoch int, flow_run_id uuid) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    IF note_flow_run.flow_run_id IS NULL THEN
        RETURN;
    END IF;
    INSERT INTO pgflow_prefect.run_flow_runs AS f (run_id, epoch, flow_run_id)
    VALUES (note_flow_run.run_id, note_flow_run.epoch, note_flow_run.flow_run_id)
    ON CONFLICT (run_id, epoch) DO UPDATE SET flow_run_id = excluded.flow_run_id;
    INSERT INTO pgflow_prefect.flow_runs AS f (run_id, flow_run_id)
    VALUES (note_flow_run.run_id, note_flow_run.flow_run_id)
    ON CONFLICT (run_id) DO UPDATE SET flow_run_id = excluded.flow_run_id, settled = false;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.note_flow_run(uuid, int, uuid) IS
    'Notes the flow run that executes a run, which shows it as well. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_run(
    run_id uuid, flow_run_id uuid, held_by text, lease double precision, max_recoveries int,
    force boolean DEFAULT false
) RETURNS int
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
    owner pgflow_prefect.run_owners;
    flow pgflow_prefect.moved_flows;
    task record;
    taken int;
    recoveries int := 0;
    progress bigint;
BEGIN
    PERFORM pgflow_prefect.refuse_policies();
    SELECT * INTO run FROM pgflow.runs r WHERE r.run_id = take_run.run_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown run %', take_run.run_id USING ERRCODE = 'no_data_found';
    ELSIF run.status <> 'started' THEN
        RETURN NULL;
    END IF;
    SELECT * INTO flow FROM pgflow_prefect.moved_flows m WHERE m.flow_slug = run.flow_slug AND m.is_ours;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'pgflow''s own workers execute flow "%"', run.flow_slug
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'moved_flows',
                  HINT = format('Move it: pgflow-prefect bind %s --python', run.flow_slug);
    END IF;
    SELECT * INTO owner FROM pgflow_prefect.run_owners o WHERE o.run_id = run.run_id FOR UPDATE;
    progress := (SELECT count(*) FROM pgflow.step_tasks t WHERE t.run_id = run.run_id AND t.status NOT IN ('queued', 'started'));
    IF owner.run_id IS NOT NULL THEN
        IF pgflow_prefect.is_leased(owner.lease_until, lease) AND NOT force
           -- A reserved run waits for its flow run, which may be this one.
           AND (take_run.flow_run_id IS NULL OR owner.flow_run_id <> take_run.flow_run_id) THEN
            RAISE EXCEPTION 'run % is held by %', run.run_id, owner.held_by
                USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'owners_lease',
                      HINT = format('Its lease ends at %s, unless it is extended.', owner.lease_until);
        END IF;
        recoveries := owner.recoveries;
        IF owner.flow_run_id IS NULL AND NOT pgflow_prefect.is_leased(owner.lease_until, lease) THEN
            -- The run was reserved, and no process has begun to execute it. Keep the epoch, which is part of the flow
            -- run's idempotency key: if Prefect has created the flow run and its answer was lost, this finds it.
            taken := owner.epoch;
        ELSIF pgflow_prefect.how_held(owner, lease) = 'expired' THEN
            recoveries := CASE WHEN progress > owner.progress THEN 0 ELSE owner.recoveries + 1 END;
        END IF;
        IF recoveries > max_recoveries THEN
            -- pgflow decides what comes of them: another attempt, a failure, a skip.
            FOR task IN SELECT t.step_slug, t.task_index FROM pgflow.step_tasks t
                        WHERE t.run_id = run.run_id AND t.status = 'started' AND t.last_worker_id = flow.worker_id
                        ORDER BY t.step_slug, t.task_index
            LOOP
                PERFORM FROM pgflow.fail_task(run.run_id, task.step_slug, task.task_index, format(
                    '%s owners in a row have vanished while no task ended, the last one was %s', recoveries, owner.held_by));
            END LOOP;
            recoveries := 0;
            SELECT * INTO run FROM pgflow.runs r WHERE r.run_id = take_run.run_id;
            IF run.status <> 'started' THEN
                RETURN NULL;
            END IF;
        END IF;
    END IF;
    taken := coalesce(taken, owner.epoch + 1, 1);
    INSERT INTO pgflow_prefect.run_owners AS o (run_id, epoch, flow_run_id, held_by, lease_until, progress, recoveries)
    VALUES (run.run_id, taken, take_run.flow_run_id, take_run.held_by, clock_timestamp() + make_interval(secs => lease),
            progress, recoveries)
    ON CONFLICT (run_id) DO UPDATE
    SET epoch = excluded.epoch, flow_run_id = excluded.flow_run_id, held_by = excluded.held_by,
        lease_until = excluded.lease_until, progress = excluded.progress, recoveries = excluded.recoveries,
        settled = false, taken_at = clock_timestamp();
    PERFORM pgflow_prefect.note_flow_run(run.run_id, taken, take_run.flow_run_id);
    RETURN taken;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_run(uuid, uuid, text, double precision, int, boolean) IS
    'Makes a flow run the owner of a run that goes on, for `lease` seconds, and returns the new epoch. NULL if the run has '
    'ended. Without a flow run, reserves the run for a new one. Refuses a run that another process holds, unless forced, and '
    'one of a flow that was not moved. Where too many owners have vanished, the tasks that the last one had begun fail: '
    'pgflow''s retries follow.';


CREATE OR REPLACE FUNCTION pgflow_prefect.create_run(
    workflow_slug text, payload jsonb, run_id uuid, flow_run_id uuid, held_by text, lease double precision,
    max_recoveries int, logical_date timestamptz DEFAULT NULL, interval_start timestamptz DEFAULT NULL
) RETURNS int
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    former pgflow.runs;
BEGIN
    PERFORM FROM pgflow.flows f WHERE f.flow_slug = create_run.workflow_slug;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown workflow "%"', create_run.workflow_slug USING ERRCODE = 'no_data_found';
    END IF;
    SELECT * INTO former FROM pgflow.runs r WHERE r.run_id = create_run.run_id;
    IF NOT FOUND THEN -- one transaction: otherwise a worker could take the run after its start
        PERFORM FROM pgflow.start_flow(create_run.workflow_slug, create_run.payload, create_run.run_id);
    ELSIF former.flow_slug <> create_run.workflow_slug OR (former.input = create_run.payload) IS NOT TRUE THEN
        RAISE EXCEPTION 'run % exists already, with another payload', create_run.run_id
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'This flow run did not create it: start a new flow run.';
    END IF;
    RETURN pgflow_prefect.take_run(run_id, flow_run_id, held_by, lease, max_recoveries);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.create_run(
    text, jsonb, uuid, uuid, text, double precision, int, timestamptz, timestamptz) IS
    'pgflow.start_flow and take_run in one. The date of a schedule is not kept: a run of pgflow has no place for it.';


CREATE OR REPLACE FUNCTION pgflow_prefect.set_aside(run_id uuid, reason text) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO pgflow_prefect.set_aside_runs AS s (run_id, epoch, reason)
    SELECT set_aside.run_id, coalesce((SELECT o.epoch FROM pgflow_prefect.run_owners o WHERE o.run_id = set_aside.run_id), 0),
           left(set_aside.reason, 1000)
    ON CONFLICT (run_id) DO UPDATE
    SET epoch = excluded.epoch, reason = excluded.reason, tries = s.tries + 1,
        next_try = clock_timestamp() + least(300, 2 ^ least(s.tries, 10)) * interval '1 second';
END
$$;

COMMENT ON FUNCTION pgflow_prefect.set_aside(uuid, text) IS
    'Notes why a run could not be taken, and when to try again: after 1 s, 2 s, 4 s, ..., at most 5 minutes. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.choose_runs(
    workflow_slugs text[], wanted int, lease double precision, besides uuid[], expired boolean
) RETURNS TABLE (run_id uuid, workflow_slug text, former_flow_run_id uuid, was_held boolean)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.run_id, r.flow_slug, o.flow_run_id, o.run_id IS NOT NULL AND o.lease_until <> '-infinity'
        FROM pgflow_prefect.moved_flows m
        JOIN pgflow.runs r ON r.flow_slug = m.flow_slug AND r.status = 'started'
        LEFT JOIN LATERAL (SELECT * FROM pgflow_prefect.run_owners o WHERE o.run_id = r.run_id OFFSET 0) o ON true
        WHERE m.is_ours AND m.flow_slug = ANY (choose_runs.workflow_slugs)
          AND NOT EXISTS (SELECT FROM pgflow_prefect.enabled_workflows e
                          WHERE e.workflow_slug = m.flow_slug AND NOT e.enabled)
          AND r.run_id <> ALL (coalesce(choose_runs.besides, '{}'))
          AND (o.run_id IS NULL OR o.lease_until = '-infinity'
               OR (choose_runs.expired AND NOT pgflow_prefect.is_leased(o.lease_until, choose_runs.lease)))
          AND NOT EXISTS (SELECT FROM pgflow_prefect.set_aside_runs s
                          WHERE s.run_id = r.run_id AND s.next_try > clock_timestamp() OFFSET 0)
        ORDER BY (o.run_id IS NOT NULL AND o.lease_until <> '-infinity') DESC, r.started_at, r.run_id
        LIMIT choose_runs.wanted
        FOR NO KEY UPDATE OF r SKIP LOCKED; -- others who look at this moment take others
END
$$;

COMMENT ON FUNCTION pgflow_prefect.choose_runs(text[], int, double precision, uuid[], boolean) IS
    'Locks the runs that take_runs is to take, and returns them: those whose lease has run out (expired), and free ones. '
    'Runs from before the flow was moved, too: no other process does them any more. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.has_step_triggers() RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    SELECT count(*) = 3 FROM pg_trigger t
    WHERE t.tgrelid = 'pgflow.step_tasks'::regclass
      AND t.tgname IN ('pgflow_prefect_take_new', 'pgflow_prefect_return', 'pgflow_prefect_take_again')
$$;

COMMENT ON FUNCTION pgflow_prefect.has_step_triggers() IS
    'Whether the triggers of moved steps are there. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.sweep_step(flow_slug text, step_slug text, is_later boolean) RETURNS int
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    moved pgflow_prefect.moved_steps;
    snapshot pg_snapshot;
    taken int;
BEGIN
    LOCK TABLE pgflow.step_tasks IN ACCESS SHARE MODE; -- before the row: see the head of steps.sql
    SELECT * INTO moved FROM pgflow_prefect.moved_steps m
    WHERE m.flow_slug = sweep_step.flow_slug AND m.step_slug = sweep_step.step_slug FOR KEY SHARE;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    snapshot := pg_current_snapshot();
    taken := pgflow_prefect.take_out(sweep_step.flow_slug, ARRAY(
        SELECT t.message_id FROM pgflow.step_tasks t
        WHERE t.flow_slug = sweep_step.flow_slug AND t.step_slug = sweep_step.step_slug AND t.status = 'queued'
          AND t.message_id IS NOT NULL
        ORDER BY t.message_id));
    IF is_later AND NOT moved.is_swept THEN
        -- A transaction that was open at the move does not know of it. Look until all of these have ended.
        UPDATE pgflow_prefect.moved_steps m
        SET seen_in = coalesce(m.seen_in, pg_snapshot_xmax(snapshot)),
            is_swept = coalesce(pg_snapshot_xmin(snapshot) >= m.seen_in, false)
        WHERE m.flow_slug = sweep_step.flow_slug AND m.step_slug = sweep_step.step_slug;
    END IF;
    RETURN taken;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.sweep_step(text, text, boolean) IS
    'Takes the messages of a moved step that are in the queue out of it, and returns how many. is_later: in a later transaction '
    'than that of the move. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_runs(
    workflow_slugs text[], wanted int, adopt boolean, held_by text, lease double precision, max_recoveries int,
    besides uuid[], expired boolean
) RETURNS TABLE (run_id uuid, workflow_slug text, epoch int, former_flow_run_id uuid, was_held boolean, backfill_id bigint,
               parent_flow_run_id uuid, parent_step_slug text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    candidate record;
    reason text;
    broken_constraint text;
    cancelled boolean := false;
BEGIN
    PERFORM pgflow_prefect.refuse_policies();
    IF expired THEN
        -- A cron job of a user may have started another Edge worker.
        PERFORM pgflow_prefect.stop_edge_workers(m.flow_slug)
        FROM pgflow_prefect.moved_flows m
        WHERE m.is_ours AND NOT m.by_steps AND m.flow_slug = ANY (take_runs.workflow_slugs)
          AND EXISTS (SELECT FROM pgflow.workers w
                      WHERE w.queue_name = m.flow_slug AND w.worker_id <> m.worker_id AND w.deprecated_at IS NULL
                        AND w.last_heartbeat_at > clock_timestamp() - interval '1 hour');
        PERFORM pgflow_prefect.sweep_step(m.flow_slug, m.step_slug, true) FROM pgflow_prefect.moved_steps m
        WHERE NOT m.is_swept AND m.flow_slug = ANY (take_runs.workflow_slugs);
        PERFORM pgflow_prefect.give_sign_of_life(take_runs.workflow_slugs);
    END IF;
    FOR candidate IN
        SELECT * FROM pgflow_prefect.choose_runs(workflow_slugs, wanted, lease, besides, expired)
    LOOP
        epoch := NULL;
        BEGIN
            epoch := pgflow_prefect.take_run(candidate.run_id, NULL, held_by, lease, max_recoveries);
            SET CONSTRAINTS ALL IMMEDIATE; -- a deferred trigger would raise at the commit, for all runs
            IF pgflow_prefect.has_step_triggers() THEN -- it has to come after what pgflow does next
                SET CONSTRAINTS pgflow.pgflow_prefect_take_again DEFERRED;
            END IF;
        EXCEPTION WHEN OTHERS OR assert_failure OR query_canceled THEN
            epoch := NULL;
            cancelled := SQLSTATE = '57014'; -- it has used up the time of the statement
            GET STACKED DIAGNOSTICS reason = MESSAGE_TEXT, broken_constraint = CONSTRAINT_NAME;
            -- Otherwise its owner was late, and has just extended it; or the flow was moved back at this moment.
            IF broken_constraint NOT IN ('owners_lease', 'moved_flows') THEN
                PERFORM pgflow_prefect.set_aside(candidate.run_id, format('%s (%s)', reason, SQLSTATE));
            END IF;
        END;
        EXIT WHEN cancelled;
        CONTINUE WHEN epoch IS NULL;
        run_id := candidate.run_id;
        workflow_slug := candidate.workflow_slug;
        former_flow_run_id := candidate.former_flow_run_id;
        was_held := candidate.was_held;
        backfill_id := NULL;
        RETURN NEXT;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_runs(text[], int, boolean, text, double precision, int, uuid[], boolean) IS
    'Reserves runs of moved flows that go on and that no process holds, at most so many, the oldest first; where `expired` '
    'says so, those whose lease has run out before them. A run that raises an error is set aside for a while. Never those '
    'of besides, which the caller executes.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_children(
    parents uuid[], workflow_slugs text[], wanted int, held_by text, lease double precision, max_recoveries int,
    besides uuid[]
) RETURNS TABLE (run_id uuid, workflow_slug text, epoch int, former_flow_run_id uuid, parent_flow_run_id uuid,
                 parent_step_slug text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    RETURN; -- no step of pgflow is a run of another flow
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_children(uuid[], text[], int, text, double precision, int, uuid[]) IS
    'No run: no step of pgflow is a run of another flow.';


CREATE OR REPLACE FUNCTION pgflow_prefect.move_children(at_most int) RETURNS int
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$ SELECT 0 $$;

COMMENT ON FUNCTION pgflow_prefect.move_children(int) IS 'None: no step of pgflow is a run of another flow.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_relatives(of_run uuid, at_most int)
RETURNS TABLE (is_parent boolean, run_id uuid, workflow_slug text, status text, ended_as text, step_slug text,
               item_index int, attempt int)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    RETURN;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_relatives(uuid, int) IS 'None: no step of pgflow is a run of another flow.';


CREATE OR REPLACE FUNCTION pgflow_prefect.give_sign_of_life(workflow_slugs text[]) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE pgflow.workers w SET last_heartbeat_at = clock_timestamp()
    WHERE w.worker_id = ANY (ARRAY(
        SELECT k.worker_id FROM pgflow.workers k
        JOIN pgflow_prefect.moved_flows m ON m.worker_id = k.worker_id AND m.is_ours
        WHERE m.flow_slug = ANY (give_sign_of_life.workflow_slugs)
          AND k.last_heartbeat_at < clock_timestamp() - interval '5 seconds'
        FOR NO KEY UPDATE OF k SKIP LOCKED));
END
$$;

COMMENT ON FUNCTION pgflow_prefect.give_sign_of_life(text[]) IS
    'Notes in pgflow.workers that our worker of these flows lives, at most every 5 s, as pgflow''s own workers do. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.note_holder(run_id uuid, epoch int, holder jsonb) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    UPDATE pgflow_prefect.run_owners o
    SET holder = note_holder.holder || jsonb_build_object('epoch', o.epoch)
    WHERE o.run_id = note_holder.run_id AND o.epoch = note_holder.epoch
$$;

COMMENT ON FUNCTION pgflow_prefect.note_holder(uuid, int, jsonb) IS
    'Notes the process that has taken a run in this epoch, as an object by which its machine can find it.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_holders(machine jsonb, only_run uuid DEFAULT NULL)
RETURNS TABLE (run_id uuid, epoch int, held_by text, holder jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT o.run_id, o.epoch, o.held_by, o.holder - 'epoch'
        FROM pgflow_prefect.run_owners o
        WHERE NOT o.settled AND o.holder @> (machine || jsonb_build_object('epoch', o.epoch))
          AND o.lease_until > 'epoch' AND o.lease_until < 'infinity'
          AND (only_run IS NULL OR o.run_id = only_run)
          AND EXISTS (SELECT FROM pgflow.runs r WHERE r.run_id = o.run_id AND r.status = 'started');
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_holders(jsonb, uuid) IS
    'The processes of one machine that hold runs which go on, or that hold this one.';


CREATE OR REPLACE FUNCTION pgflow_prefect.expire_lease(run_id uuid, epoch int, holder jsonb) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    -- 1970 and not now: shortly after the server's start, a lease that ended lately still holds. See is_leased.
    UPDATE pgflow_prefect.run_owners o SET lease_until = 'epoch'
    WHERE o.run_id = expire_lease.run_id AND o.epoch = expire_lease.epoch
      AND o.lease_until > 'epoch' AND o.lease_until < 'infinity'
      AND o.holder = expire_lease.holder || jsonb_build_object('epoch', o.epoch)
    RETURNING true
$$;

COMMENT ON FUNCTION pgflow_prefect.expire_lease(uuid, int, jsonb) IS
    'Ends the lease of a process that its machine knows to be dead, as if the lease had expired. NULL if another process has '
    'taken the run meanwhile.';


CREATE OR REPLACE FUNCTION pgflow_prefect.link_flow_run(
    run_id uuid, epoch int, flow_run_id uuid, held_by text, queued boolean
) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    UPDATE pgflow_prefect.run_owners o
    SET flow_run_id = link_flow_run.flow_run_id,
        lease_until = CASE WHEN queued THEN 'infinity' ELSE o.lease_until END
    WHERE o.run_id = link_flow_run.run_id AND o.epoch = link_flow_run.epoch AND o.flow_run_id IS NULL
      AND o.held_by = link_flow_run.held_by; -- an expired reservation keeps its epoch, but not its holder
    IF FOUND THEN
        PERFORM pgflow_prefect.note_flow_run(run_id, epoch, flow_run_id);
        RETURN true;
    END IF;
    RETURN EXISTS (SELECT FROM pgflow_prefect.run_owners o
                   WHERE o.run_id = link_flow_run.run_id AND o.flow_run_id = link_flow_run.flow_run_id
                     AND o.held_by = link_flow_run.held_by);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.link_flow_run(uuid, int, uuid, text, boolean) IS
    'Names the flow run of a reserved run. queued: the lease has no end, because Prefect decides when the flow run starts. '
    'False if another process has taken the run meanwhile.';


CREATE OR REPLACE FUNCTION pgflow_prefect.link_flow_runs(
    run_ids uuid[], epochs int[], flow_run_ids uuid[], held_by text
) RETURNS TABLE (run_id uuid, linked boolean, status text, remaining int, definition_id bigint)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
DECLARE
    link record;
BEGIN
    FOR link IN
        SELECT u.run_id, u.epoch, u.flow_run_id FROM unnest(run_ids, epochs, flow_run_ids) AS u (run_id, epoch, flow_run_id)
        ORDER BY u.run_id -- in one order, so that two processes never wait for each other
    LOOP
        run_id := link.run_id;
        linked := pgflow_prefect.link_flow_run(link.run_id, link.epoch, link.flow_run_id, held_by, false);
        status := NULL;
        remaining := NULL;
        definition_id := NULL;
        SELECT CASE WHEN r.status IN ('completed', 'failed') THEN r.status ELSE 'pending' END, r.remaining_steps,
               pgflow_prefect.find_definition_id(r.flow_slug)
        INTO status, remaining, definition_id
        FROM pgflow.runs r WHERE r.run_id = link.run_id;
        RETURN NEXT;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.link_flow_runs(uuid[], int[], uuid[], text) IS
    'link_flow_run for several runs, by id, with the facts that their first claims need: status, number of steps left, '
    'definition.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_definition_id(flow_slug text) RETURNS bigint
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT hashtextextended(concat_ws(' ', f.flow_slug, f.created_at, s.steps, s.latest), 0)
    FROM pgflow.flows f
    CROSS JOIN LATERAL (SELECT count(*) AS steps, max(s.created_at) AS latest
                        FROM pgflow.steps s WHERE s.flow_slug = f.flow_slug) s
    WHERE f.flow_slug = find_definition_id.flow_slug
$$;

COMMENT ON FUNCTION pgflow_prefect.find_definition_id(text) IS
    'Tells one compilation of a flow from another one: pgflow deletes a flow, and makes it anew. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.extend_leases(
    run_ids uuid[], epochs int[], lease double precision
) RETURNS TABLE (run_id uuid, epoch int, holds text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    -- A row that another transaction has locked is left to the next extension. So no lease waits for another one.
    UPDATE pgflow_prefect.run_owners o
    SET lease_until = clock_timestamp() + make_interval(secs => lease)
    WHERE o.run_id = ANY (ARRAY(
        SELECT free.run_id
        FROM unnest(run_ids, epochs) AS held (run_id, epoch)
        CROSS JOIN LATERAL (
            SELECT f.run_id FROM pgflow_prefect.run_owners f WHERE f.run_id = held.run_id AND f.epoch = held.epoch
            OFFSET 0 FOR NO KEY UPDATE SKIP LOCKED) free));
    PERFORM pgflow_prefect.give_sign_of_life(ARRAY(
        SELECT DISTINCT r.flow_slug FROM pgflow.runs r WHERE r.run_id = ANY (run_ids)));
    RETURN QUERY
        SELECT held.run_id, held.epoch,
               CASE WHEN o.epoch IS DISTINCT FROM held.epoch OR r.run_id IS NULL THEN 'lost'
                    WHEN r.status = 'completed' THEN 'completed'
                    WHEN r.status = 'failed' THEN 'ended' -- pgflow accepts no report any more
                    ELSE 'held' END
        FROM unnest(run_ids, epochs) AS held (run_id, epoch)
        LEFT JOIN LATERAL (
            SELECT r.run_id, r.status FROM pgflow.runs r WHERE r.run_id = held.run_id OFFSET 0) r ON true
        LEFT JOIN LATERAL (
            SELECT o.epoch FROM pgflow_prefect.run_owners o WHERE o.run_id = held.run_id OFFSET 0) o ON true;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.extend_leases(uuid[], int[], double precision) IS
    'Extends the leases of runs in the epochs in which they were taken, and tells of each: held; lost to another owner, or '
    'deleted; completed; ended.';


CREATE OR REPLACE FUNCTION pgflow_prefect.release_run(run_id uuid, epoch int) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
BEGIN
    SELECT * INTO run FROM pgflow.runs r WHERE r.run_id = release_run.run_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown run %', release_run.run_id USING ERRCODE = 'no_data_found';
    END IF;
    UPDATE pgflow_prefect.run_owners o SET lease_until = '-infinity'
    WHERE o.run_id = run.run_id AND o.epoch = release_run.epoch;
    IF FOUND AND run.status = 'started' THEN
        PERFORM pg_notify('pgflow_runs', ''); -- for its next owner
        RETURN true;
    END IF;
    RETURN false;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.release_run(uuid, int) IS
    'Hands a run back: its lease ends now. False if there was nothing to hand back.';


CREATE OR REPLACE FUNCTION pgflow_prefect.release_reservation(run_id uuid, epoch int, held_by text) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM pgflow.runs r WHERE r.run_id = release_reservation.run_id FOR NO KEY UPDATE; -- before the owner's row
    -- An expired reservation keeps its epoch, so another process may hold the run in the same epoch.
    IF NOT EXISTS (SELECT FROM pgflow_prefect.run_owners o
                   WHERE o.run_id = release_reservation.run_id AND o.epoch = release_reservation.epoch
                     AND o.held_by = release_reservation.held_by AND o.flow_run_id IS NULL) THEN
        RETURN false;
    END IF;
    RETURN pgflow_prefect.release_run(run_id, epoch);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.release_reservation(uuid, int, text) IS
    'release_run for a run that this process has reserved, and linked to no flow run.';


CREATE OR REPLACE FUNCTION pgflow_prefect.put_off_run(run_id uuid, epoch int, held_by text, reason text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    IF NOT pgflow_prefect.release_reservation(run_id, epoch, held_by) THEN
        RETURN false;
    END IF;
    PERFORM pgflow_prefect.set_aside(run_id, reason);
    RETURN true;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.put_off_run(uuid, int, text, text) IS
    'release_reservation for a run that this process could not begin to execute: it is set aside for a while.';


CREATE OR REPLACE FUNCTION pgflow_prefect.put_off_held_run(run_id uuid, epoch int, step_slug text, reason text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    IF NOT pgflow_prefect.release_run(run_id, epoch) THEN
        RETURN false;
    END IF;
    PERFORM pgflow_prefect.set_aside(run_id, reason);
    RETURN true;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.put_off_held_run(uuid, int, text, text) IS
    'release_run for a run of which PostgreSQL refuses to note something, of this step: it is set aside for a while.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_made_for(run_id uuid, flow_run_id uuid) RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN EXISTS (SELECT FROM pgflow_prefect.run_flow_runs f
                   WHERE f.run_id = is_made_for.run_id AND f.flow_run_id = is_made_for.flow_run_id)
        OR EXISTS (SELECT FROM pgflow.runs r
                   JOIN pgflow_prefect.moved_flows m ON m.flow_slug = r.flow_slug AND m.is_ours
                   JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.flow_slug AND e.enabled
                   LEFT JOIN pgflow_prefect.run_owners o ON o.run_id = r.run_id
                   -- A reserved run waits for its flow run, which may be this one.
                   WHERE r.run_id = is_made_for.run_id AND (o.run_id IS NULL OR o.flow_run_id IS NULL));
END
$$;

COMMENT ON FUNCTION pgflow_prefect.is_made_for(uuid, uuid) IS
    'True if a flow run that Prefect started may take a run: it was made for the run, or the run was never taken, its flow '
    'was moved, and is enabled.';


-- Rights: the owner's alone, until a role is granted EXECUTE. The version is set by the last script.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA pgflow_prefect FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA pgflow_prefect FROM PUBLIC;

COMMIT;
