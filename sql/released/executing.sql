-- pgflow_prefect on the released pgflow (pgflow.dev): the steps of the runs that Prefect executes.
--
-- A part of the contract of ../CONTRACT.md; needs steps.sql. A claim calls pgflow.start_tasks, and a report calls
-- pgflow.complete_task or pgflow.fail_task, in the transaction in which the owner's epoch is checked. pgflow decides about
-- retries, back-off, conditions, maps and skips.
-- psql -d DATABASE -f pgflow_prefect.sql -f moving.sql -f steps.sql -f executing.sql -f bindings.sql -f observing.sql; safe to
-- run again.
--
-- The functions here set a search_path, although triggers of users run inside some of them: pgflow's own functions, which
-- write its tables, set theirs anyway. They set nothing else.

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;

DO $guard$
BEGIN
    IF to_regclass('pgflow_prefect.run_owners') IS NULL THEN
        RAISE EXCEPTION 'the tables of pgflow_prefect for the released pgflow are missing'
            USING HINT = 'Run pgflow_prefect.sql and moving.sql first.';
    END IF;
    PERFORM set_config('transaction_timeout', '0', true)
    WHERE current_setting('transaction_timeout', true) <> '0'; -- PostgreSQL 17 has it
    -- This locks the schema itself: two installations at once take turns.
    COMMENT ON SCHEMA pgflow_prefect IS 'What pgflow-prefect reads and executes of the released pgflow.';
END
$guard$;


-- The latest claim of a step, its task run, and the state of that in Prefect.
CREATE TABLE IF NOT EXISTS pgflow_prefect.task_runs (
    run_id UUID NOT NULL,
    step_slug TEXT NOT NULL,
    task_index INT NOT NULL DEFAULT 0,
    task_run_id UUID NOT NULL,
    state_name TEXT NOT NULL,
    message TEXT,                  -- of the latest failed attempt, before a retry
    handler TEXT,
    attempt INT,
    claimed_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    updated_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run_id, step_slug, task_index)
) WITH (fillfactor = 70);

-- The tasks of maps that an owner has claimed, in its epoch.
CREATE TABLE IF NOT EXISTS pgflow_prefect.item_claims (
    run_id UUID NOT NULL,
    step_slug TEXT NOT NULL,
    item_index INT NOT NULL,
    epoch INT NOT NULL,
    due_at TIMESTAMPTZ,            -- another program was asked to do it, and has this much time
    PRIMARY KEY (run_id, step_slug, item_index)
) WITH (fillfactor = 70);


------------------------------------------------------------------------------------------------------------
-- What a step is given, and how it stands
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.shorten(result jsonb) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    problem text := pgflow_prefect.find_json_problem(result);
BEGIN
    IF problem IS NOT NULL THEN
        RETURN 'not shown: it ' || problem;
    END IF;
    RETURN left(result::text, 1000); -- a statement of its own: the planner would evaluate it behind a condition
END
$$;

COMMENT ON FUNCTION pgflow_prefect.shorten(jsonb) IS 'As much of a result as a person needs to read. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_others(kind text, has_function boolean) RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$ SELECT kind = 'external' OR (kind = 'python' AND NOT has_function) $$;

COMMENT ON FUNCTION pgflow_prefect.is_others(text, boolean) IS
    'True if the claiming process can only wait: another worker does the step, or another process has its function. '
    'Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_output(run_id uuid, step_slug text) RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    IF EXISTS (SELECT FROM pgflow.step_states s
               JOIN pgflow.steps d ON d.flow_slug = s.flow_slug AND d.step_slug = s.step_slug AND d.step_type = 'map'
               WHERE s.run_id = read_output.run_id AND s.step_slug = read_output.step_slug) THEN
        RETURN (SELECT coalesce(jsonb_agg(t.output ORDER BY t.task_index), '[]') FROM pgflow.step_tasks t
                WHERE t.run_id = read_output.run_id AND t.step_slug = read_output.step_slug);
    END IF;
    RETURN (SELECT t.output FROM pgflow.step_tasks t
            WHERE t.run_id = read_output.run_id AND t.step_slug = read_output.step_slug AND t.task_index = 0);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_output(uuid, text) IS
    'The result of a completed step: of a map, an array. From its tasks, for not every version has it with the step. '
    'Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_outputs(run_id uuid, step_slug text, upstream text[]) RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    IF cardinality(upstream) = 0 THEN
        RETURN '{}';
    END IF;
    RETURN (SELECT coalesce(jsonb_object_agg(d.dep_slug, pgflow_prefect.read_output(s.run_id, d.dep_slug)), '{}')
            FROM pgflow.step_states s
            JOIN pgflow.deps d ON d.flow_slug = s.flow_slug AND d.step_slug = s.step_slug
            JOIN pgflow.step_states u ON u.run_id = s.run_id AND u.step_slug = d.dep_slug AND u.status = 'completed'
            WHERE s.run_id = read_outputs.run_id AND s.step_slug = read_outputs.step_slug
              AND (read_outputs.upstream IS NULL OR d.dep_slug = ANY (read_outputs.upstream)));
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_outputs(uuid, text, text[]) IS
    'The results of the steps that a step waits for, by slug, without those that were skipped; NULL: of all. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_item(run_id uuid, step_slug text, item_index int) RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    upstream record;
BEGIN
    SELECT d.dep_slug, u.step_type INTO upstream
    FROM pgflow.step_states s
    JOIN pgflow.deps d ON d.flow_slug = s.flow_slug AND d.step_slug = s.step_slug
    JOIN pgflow.steps u ON u.flow_slug = d.flow_slug AND u.step_slug = d.dep_slug
    WHERE s.run_id = read_item.run_id AND s.step_slug = read_item.step_slug;
    IF NOT FOUND THEN
        RETURN (SELECT r.input -> item_index FROM pgflow.runs r WHERE r.run_id = read_item.run_id);
    ELSIF upstream.step_type = 'map' THEN
        RETURN (SELECT t.output FROM pgflow.step_tasks t
                WHERE t.run_id = read_item.run_id AND t.step_slug = upstream.dep_slug AND t.task_index = item_index);
    END IF;
    RETURN (SELECT t.output -> item_index FROM pgflow.step_tasks t
            WHERE t.run_id = read_item.run_id AND t.step_slug = upstream.dep_slug AND t.task_index = 0);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_item(uuid, text, int) IS
    'The element that a task of a map is given: of the run''s input, or of the result that it maps over. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.describe_end(run_id uuid, step_slug text)
RETURNS TABLE (status text, ended_as text, error_message text, skip_reason text, skip_message text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    state pgflow.step_states;
BEGIN
    SELECT * INTO state FROM pgflow.step_states s
    WHERE s.run_id = describe_end.run_id AND s.step_slug = describe_end.step_slug;
    IF state.status = 'skipped' THEN
        SELECT e.status, e.skip_reason, e.skip_message INTO status, skip_reason, skip_message
        FROM pgflow_prefect.list_step_ends(describe_end.run_id, ARRAY[describe_end.step_slug]) e;
    ELSIF state.status IN ('completed', 'failed') THEN
        status := state.status;
        error_message := CASE WHEN state.status = 'failed' THEN state.error_message END;
    ELSIF EXISTS (SELECT FROM pgflow.runs r WHERE r.run_id = describe_end.run_id AND r.status IN ('completed', 'failed')) THEN
        -- pgflow leaves the steps of a failed run as they are, and accepts no report on them.
        status := 'failed';
        ended_as := 'cancelled';
        error_message := 'the run has ended: ' || coalesce(pgflow_prefect.describe_failure(describe_end.run_id),
                                                           'pgflow says no reason');
    ELSE
        status := 'pending';
    END IF;
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.describe_end(uuid, text) IS 'How a step stands, as a report tells it. Internal.';


------------------------------------------------------------------------------------------------------------
-- Tasks: pgflow's functions claim and report them
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.find_free(flow_slug text, message_ids bigint[]) RETURNS bigint[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    free bigint[];
BEGIN
    -- A message that an Edge worker has read, and not begun yet, is hidden: it stays that worker's until it is visible. A
    -- message that is gone can be read by no worker. One that was taken out is due when it would be visible.
    EXECUTE format($query$
        WITH seen AS (
            SELECT q.msg_id FROM pgmq.%1$I q WHERE q.msg_id = ANY ($1) AND q.vt <= clock_timestamp()
            ORDER BY q.msg_id FOR UPDATE SKIP LOCKED),
        held AS (
            SELECT o.message_id, o.due_at FROM pgflow_prefect.taken_out o
            WHERE o.flow_slug = $2 AND o.message_id = ANY ($1))
        SELECT ARRAY(SELECT s.msg_id FROM seen s
                     UNION ALL
                     SELECT h.message_id FROM held h WHERE h.due_at <= clock_timestamp()
                     UNION ALL
                     SELECT m.id FROM unnest($1) AS m (id)
                     WHERE NOT EXISTS (SELECT FROM pgmq.%1$I q WHERE q.msg_id = m.id)
                       AND NOT EXISTS (SELECT FROM held h WHERE h.message_id = m.id))
        $query$, pgmq.format_table_name(flow_slug, 'q')) INTO free USING message_ids, flow_slug;
    RETURN free;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_free(text, bigint[]) IS
    'Those of these messages of a flow that can be taken now. It locks them, as pgmq.read does. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_due(flow_slug text, message_id bigint) RETURNS timestamptz
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    due timestamptz;
BEGIN
    EXECUTE format('SELECT q.vt FROM pgmq.%I q WHERE q.msg_id = $1', pgmq.format_table_name(flow_slug, 'q'))
    INTO due USING message_id;
    RETURN coalesce(due, (SELECT o.due_at FROM pgflow_prefect.taken_out o
                          WHERE o.flow_slug = find_due.flow_slug AND o.message_id = find_due.message_id), '-infinity');
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_due(text, bigint) IS
    'When a message of a flow can be read again: pgflow keeps its back-off there. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_worker(flow_slug text) RETURNS uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    ours uuid := (SELECT m.worker_id FROM pgflow_prefect.moved_flows m WHERE m.flow_slug = find_worker.flow_slug);
BEGIN
    IF ours IS NOT NULL AND NOT EXISTS (SELECT FROM pgflow.workers w WHERE w.worker_id = ours) THEN
        INSERT INTO pgflow.workers (worker_id, queue_name, function_name)
        VALUES (ours, find_worker.flow_slug, 'pgflow-prefect') ON CONFLICT DO NOTHING; -- the first claim, or after a clean-up
    END IF;
    RETURN ours;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_worker(text) IS
    'Our worker of a flow, which has a row in pgflow.workers; NULL: the flow was never moved. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_claimed(task pgflow.step_tasks, worker uuid, attempt int) RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    SELECT (task.status = 'started' AND task.last_worker_id = worker AND (attempt IS NULL OR task.attempts_count = attempt))
           IS TRUE
$$;

COMMENT ON FUNCTION pgflow_prefect.is_claimed(pgflow.step_tasks, uuid, int) IS
    'Whether a report of this attempt by our worker is awaited. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.note_state(
    run_id uuid, step_slug text, task_index int, task_run_id uuid, state_name text, message text
) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    UPDATE pgflow_prefect.task_runs t
    SET state_name = note_state.state_name, message = coalesce(left(note_state.message, 10100), t.message),
        updated_at = clock_timestamp()
    WHERE t.run_id = note_state.run_id AND t.step_slug = note_state.step_slug AND t.task_index = note_state.task_index
      AND t.task_run_id = note_state.task_run_id; -- a task run of another flow run may do the step now
END
$$;

COMMENT ON FUNCTION pgflow_prefect.note_state(uuid, text, int, uuid, text, text) IS
    'Notes the state in which Prefect shows the run of a task, such as AwaitingRetry.';


CREATE OR REPLACE FUNCTION pgflow_prefect.claim_step(
    run_id uuid, step_slug text, task_index int, epoch int, task_run_id uuid, upstream text[], with_payload boolean,
    bound text, has_function boolean, handler text
) RETURNS TABLE (status text, attempt int, payload jsonb, upstream_results jsonb,
                 kind text, target text, options jsonb, waits boolean, waited double precision,
                 began_at timestamptz, ended_at timestamptz, note text, skip_reason text, logical_date timestamptz,
                 interval_start timestamptz, interval_end timestamptz)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
    owner record;
    state pgflow.step_states;
    task pgflow.step_tasks;
    former pgflow_prefect.task_runs;
    step_type text;
    flow pgflow_prefect.moved_flows;
    does_it boolean;
    worker uuid;
    doing text;
    takes_input boolean;
    is_theirs boolean; -- a worker of pgflow's did it
BEGIN
    PERFORM pgflow_prefect.refuse_policies();
    waits := false;
    SELECT * INTO run FROM pgflow.runs r WHERE r.run_id = claim_step.run_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown run %', claim_step.run_id USING ERRCODE = 'no_data_found';
    END IF;
    SELECT o.epoch INTO owner FROM pgflow_prefect.run_owners o WHERE o.run_id = run.run_id;
    IF owner.epoch > claim_step.epoch AND pgflow_prefect.is_stale(run.run_id, claim_step.epoch) THEN
        RETURN NEXT; -- without a status: an error would roll back the count
        RETURN;
    END IF;
    SELECT b.kind, b.target, b.options INTO kind, target, options
    FROM pgflow_prefect.bindings b WHERE b.workflow_slug = run.flow_slug AND b.step_slug = claim_step.step_slug;
    SELECT * INTO flow FROM pgflow_prefect.moved_flows m WHERE m.flow_slug = run.flow_slug;
    does_it := pgflow_prefect.does_step(flow, claim_step.step_slug);
    IF flow.by_steps AND NOT does_it THEN
        kind := 'external';
        target := NULL;
        options := '{}';
    END IF;
    doing := coalesce(kind, bound);
    IF doing = 'child' THEN
        RAISE EXCEPTION 'step "%" can''t be a run of another flow on the released pgflow', claim_step.step_slug
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Start that run in a Python function.';
    END IF;
    SELECT * INTO state FROM pgflow.step_states s WHERE s.run_id = run.run_id AND s.step_slug = claim_step.step_slug;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'run % has no step "%"', run.run_id, claim_step.step_slug USING ERRCODE = 'no_data_found';
    END IF;
    SELECT * INTO former FROM pgflow_prefect.task_runs t
    WHERE t.run_id = run.run_id AND t.step_slug = claim_step.step_slug AND t.task_index = claim_step.task_index;
    SELECT * INTO task FROM pgflow.step_tasks t
    WHERE t.run_id = run.run_id AND t.step_slug = claim_step.step_slug AND t.task_index = claim_step.task_index;
    attempt := coalesce(task.attempts_count, 0);
    IF state.status IN ('completed', 'failed', 'skipped') THEN
        SELECT e.status, e.skip_reason, coalesce(e.skip_message, e.error_message) INTO status, skip_reason, note
        FROM pgflow_prefect.describe_end(run.run_id, claim_step.step_slug) e;
        is_theirs := task.last_worker_id IS DISTINCT FROM pgflow_prefect.find_worker(run.flow_slug);
        IF state.status = 'failed' OR (state.status = 'completed' AND is_theirs) THEN
            began_at := coalesce(task.started_at, state.started_at, state.created_at);
            ended_at := coalesce(state.completed_at, state.failed_at);
            IF state.status = 'completed' THEN
                note := pgflow_prefect.shorten(pgflow_prefect.read_output(run.run_id, claim_step.step_slug));
            END IF;
        END IF;
    ELSIF run.status <> 'started' THEN
        RAISE EXCEPTION 'run % is %', run.run_id, run.status
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'runs_status';
    ELSIF state.status = 'created' THEN
        RAISE EXCEPTION 'step "%" of run % has not started', claim_step.step_slug, run.run_id
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'step_states_status';
    ELSE
        status := 'pending';
        SELECT d.step_type INTO step_type FROM pgflow.steps d
        WHERE d.flow_slug = run.flow_slug AND d.step_slug = claim_step.step_slug;
        worker := pgflow_prefect.find_worker(run.flow_slug);
        IF flow.by_steps AND NOT does_it AND NOT pgflow_prefect.is_others(bound, has_function)
           AND EXISTS (SELECT FROM pgflow.step_tasks t
                       WHERE t.run_id = run.run_id AND t.step_slug = claim_step.step_slug AND t.status = 'started'
                         AND t.last_worker_id = worker) THEN
            kind := NULL; -- the step was moved back, and a former owner has begun it: only a worker of ours can end that
            doing := bound;
            does_it := true;
        END IF;
        IF NOT does_it THEN
            waits := true; -- pgflow's own workers do it, or what is left of it
        ELSIF step_type = 'map' THEN
            waits := pgflow_prefect.is_others(doing, has_function); -- work_items claims its tasks
        ELSIF task.status = 'started' AND task.last_worker_id = worker THEN
            -- Ours: after a lost answer, or taken over in place. What was handed to another program stays there.
            waits := former.state_name = 'Deferred' AND former.attempt = task.attempts_count;
            waited := CASE WHEN waits THEN extract(epoch FROM clock_timestamp() - task.started_at) END;
        ELSIF pgflow_prefect.is_others(doing, has_function) OR task.status <> 'queued' THEN
            waits := true; -- an Edge worker has begun it, or this process has no handler
        ELSE
            PERFORM FROM pgflow.start_tasks(run.flow_slug, pgflow_prefect.find_free(run.flow_slug, ARRAY[task.message_id]),
                                            worker);
            SELECT * INTO task FROM pgflow.step_tasks t
            WHERE t.run_id = run.run_id AND t.step_slug = claim_step.step_slug AND t.task_index = claim_step.task_index;
            -- Otherwise it is not due, or an Edge worker was faster.
            waits := NOT pgflow_prefect.is_claimed(task, worker, NULL);
        END IF;
        IF waits AND waited IS NULL AND former.state_name = 'Waiting' THEN
            waited := extract(epoch FROM clock_timestamp() - former.updated_at);
        END IF;
        attempt := coalesce(task.attempts_count, 0);
        takes_input := doing IN ('sql', 'http', 'queue', 'command');
        IF NOT waits THEN
            payload := CASE WHEN takes_input OR (claim_step.with_payload AND doing <> 'work-pool') THEN run.input END;
            upstream_results := pgflow_prefect.read_outputs(
                run.run_id, claim_step.step_slug,
                CASE WHEN step_type = 'map' OR doing = 'work-pool' THEN '{}' WHEN takes_input THEN NULL ELSE upstream END);
        END IF;
    END IF;
    INSERT INTO pgflow_prefect.task_runs AS t (run_id, step_slug, task_index, task_run_id, state_name, handler, attempt)
    VALUES (claim_step.run_id, claim_step.step_slug, claim_step.task_index, claim_step.task_run_id,
            CASE WHEN skip_reason IS NOT NULL THEN 'Skipped'
                 WHEN status = 'completed' THEN CASE WHEN is_theirs THEN 'Completed' ELSE 'Cached' END
                 WHEN status = 'failed' THEN 'Failed'
                 WHEN NOT waits THEN 'Running'
                 WHEN former.state_name = 'Deferred' THEN 'Deferred'
                 ELSE 'Waiting' END,
            CASE WHEN kind IS NULL THEN claim_step.handler ELSE concat_ws(' ', kind, target) END,
            CASE WHEN NOT waits THEN attempt END)
    ON CONFLICT (run_id, step_slug, task_index) DO UPDATE
    SET task_run_id = excluded.task_run_id, state_name = excluded.state_name,
        handler = CASE WHEN excluded.state_name = 'Deferred' THEN t.handler ELSE excluded.handler END,
        attempt = CASE WHEN excluded.state_name = 'Deferred' THEN t.attempt ELSE excluded.attempt END,
        updated_at = CASE WHEN excluded.state_name = 'Waiting' AND t.state_name = 'Waiting' THEN t.updated_at
                          ELSE clock_timestamp() END;
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.claim_step(uuid, text, int, int, uuid, text[], boolean, text, boolean, text) IS
    'pgflow.start_tasks for the task of a step, its input, and which task run claimed it. A task that our worker has begun '
    'is taken over in place, in the same attempt. waits: the task is not due, a worker of pgflow''s has it, or this process '
    'has no handler. Of a map, it begins none of its tasks: work_items does. All NULL for a former owner.';


CREATE OR REPLACE FUNCTION pgflow_prefect.complete_task(
    run_id uuid, step_slug text, task_index int, task_result jsonb, epoch int, attempt int, task_run_id uuid, outcome jsonb
) RETURNS TABLE (status text, ended_as text, error_message text, skip_reason text, skip_message text, accepted boolean)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
    task pgflow.step_tasks;
BEGIN
    PERFORM pgflow_prefect.refuse_policies();
    IF outcome ?| '{skip,taken}' THEN
        RAISE EXCEPTION 'step "%" can''t skip itself or take branches on the released pgflow', complete_task.step_slug
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'pgflow''s own conditions skip steps, and its option whenExhausted.';
    END IF;
    SELECT * INTO run FROM pgflow.runs r WHERE r.run_id = complete_task.run_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown run %', complete_task.run_id USING ERRCODE = 'no_data_found';
    END IF;
    SELECT * INTO task FROM pgflow.step_tasks t
    WHERE t.run_id = run.run_id AND t.step_slug = complete_task.step_slug AND t.task_index = complete_task.task_index;
    accepted := false;
    IF NOT pgflow_prefect.is_stale(run.run_id, complete_task.epoch) AND run.status = 'started'
       AND pgflow_prefect.is_claimed(task, pgflow_prefect.find_worker(run.flow_slug), complete_task.attempt) THEN
        PERFORM FROM pgflow.complete_task(run.run_id, task.step_slug, task.task_index, complete_task.task_result);
        accepted := EXISTS (SELECT FROM pgflow.step_tasks t
                            WHERE t.run_id = run.run_id AND t.step_slug = task.step_slug
                              AND t.task_index = task.task_index AND t.status = 'completed');
    END IF;
    SELECT e.status, e.ended_as, e.error_message, e.skip_reason, e.skip_message
    INTO status, ended_as, error_message, skip_reason, skip_message
    FROM pgflow_prefect.describe_end(complete_task.run_id, complete_task.step_slug) e;
    IF accepted THEN
        PERFORM pgflow_prefect.note_state(run.run_id, task.step_slug, task.task_index, complete_task.task_run_id,
                                          CASE WHEN outcome ? 'cached_from' THEN 'Cached' ELSE 'Completed' END, NULL);
    END IF;
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.complete_task(uuid, text, int, jsonb, int, int, uuid, jsonb) IS
    'pgflow.complete_task, if this owner holds the run and the attempt is the latest one; how the step stands then. The first '
    'report wins: a later one changes nothing.';


CREATE OR REPLACE FUNCTION pgflow_prefect.fail_task(
    run_id uuid, step_slug text, task_index int, reason text, epoch int, attempt int, task_run_id uuid, state_name text
) RETURNS TABLE (status text, ended_as text, error_message text, skip_reason text, skip_message text,
                 retry_after double precision)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    said text := left(fail_task.reason, 10100);
    run pgflow.runs;
    task pgflow.step_tasks;
    worker uuid;
BEGIN
    PERFORM pgflow_prefect.refuse_policies();
    SELECT * INTO run FROM pgflow.runs r WHERE r.run_id = fail_task.run_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown run %', fail_task.run_id USING ERRCODE = 'no_data_found';
    END IF;
    worker := pgflow_prefect.find_worker(run.flow_slug);
    SELECT * INTO task FROM pgflow.step_tasks t
    WHERE t.run_id = run.run_id AND t.step_slug = fail_task.step_slug AND t.task_index = fail_task.task_index;
    IF NOT pgflow_prefect.is_stale(run.run_id, fail_task.epoch) AND run.status = 'started' THEN
        IF fail_task.attempt IS NULL AND task.status = 'queued' THEN -- it failed before its claim
            PERFORM FROM pgflow.start_tasks(run.flow_slug, ARRAY[task.message_id], worker);
            SELECT * INTO task FROM pgflow.step_tasks t
            WHERE t.run_id = run.run_id AND t.step_slug = fail_task.step_slug AND t.task_index = fail_task.task_index;
        END IF;
        IF pgflow_prefect.is_claimed(task, worker, fail_task.attempt) THEN
            PERFORM FROM pgflow.fail_task(run.run_id, task.step_slug, task.task_index, said);
            SELECT * INTO task FROM pgflow.step_tasks t
            WHERE t.run_id = run.run_id AND t.step_slug = fail_task.step_slug AND t.task_index = fail_task.task_index;
            IF task.status = 'queued' THEN
                retry_after := greatest(0, extract(epoch FROM
                    pgflow_prefect.find_due(run.flow_slug, task.message_id) - clock_timestamp()));
            END IF;
            PERFORM pgflow_prefect.note_state(run.run_id, task.step_slug, task.task_index, fail_task.task_run_id,
                                              CASE WHEN retry_after IS NULL THEN fail_task.state_name
                                                   ELSE 'AwaitingRetry' END, said);
        END IF;
    END IF;
    SELECT e.status, e.ended_as, e.error_message, e.skip_reason, e.skip_message
    INTO status, ended_as, error_message, skip_reason, skip_message
    FROM pgflow_prefect.describe_end(fail_task.run_id, fail_task.step_slug) e;
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.fail_task(uuid, text, int, text, int, int, uuid, text) IS
    'pgflow.fail_task, if this owner holds the run and the attempt is the latest one (NULL: whichever it is); how the step '
    'stands then. retry_after: pgflow tries the task again in so many seconds.';


CREATE OR REPLACE FUNCTION pgflow_prefect.exhaust_task(run_id uuid, step_slug text, task_index int, reason text)
RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    task pgflow.step_tasks;
    run pgflow.runs;
    worker uuid;
BEGIN
    SELECT * INTO run FROM pgflow.runs r WHERE r.run_id = exhaust_task.run_id FOR NO KEY UPDATE;
    LOOP
        SELECT * INTO task FROM pgflow.step_tasks t
        WHERE t.run_id = exhaust_task.run_id AND t.step_slug = exhaust_task.step_slug
          AND t.task_index = exhaust_task.task_index;
        EXIT WHEN (task.status IN ('queued', 'started')) IS NOT TRUE
               OR NOT EXISTS (SELECT FROM pgflow.runs r WHERE r.run_id = exhaust_task.run_id AND r.status = 'started');
        worker := coalesce(task.last_worker_id, worker, pgflow_prefect.find_worker(run.flow_slug));
        IF task.status = 'queued' THEN
            PERFORM FROM pgflow.start_tasks(run.flow_slug, ARRAY[task.message_id], worker);
            EXIT WHEN NOT EXISTS (SELECT FROM pgflow.step_tasks t
                                  WHERE t.run_id = task.run_id AND t.step_slug = task.step_slug
                                    AND t.task_index = task.task_index AND t.status = 'started');
        END IF;
        PERFORM FROM pgflow.fail_task(task.run_id, task.step_slug, task.task_index, exhaust_task.reason);
    END LOOP;
    RETURN task.status;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.exhaust_task(uuid, text, int, text) IS
    'Fails a task as often as pgflow would try it again: pgflow has no "fail at once". What follows is what its flow says: '
    'the run fails, or the step is skipped. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.fail_run(run_id uuid, epoch int, held_by text, reason text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    task record;
BEGIN
    PERFORM pgflow_prefect.refuse_policies();
    PERFORM FROM pgflow.runs r WHERE r.run_id = fail_run.run_id FOR NO KEY UPDATE;
    -- A reservation that ran out keeps its epoch: another process may have the run in the same one.
    IF NOT EXISTS (SELECT FROM pgflow_prefect.run_owners o
                   WHERE o.run_id = fail_run.run_id AND o.epoch = fail_run.epoch AND o.held_by = fail_run.held_by) THEN
        RETURN false;
    END IF;
    LOOP -- a step that is skipped may start others
        SELECT t.step_slug, t.task_index INTO task
        FROM pgflow.step_tasks t
        JOIN pgflow.runs r ON r.run_id = t.run_id AND r.status = 'started'
        JOIN pgflow.step_states s ON s.run_id = t.run_id AND s.step_slug = t.step_slug AND s.status = 'started'
        WHERE t.run_id = fail_run.run_id AND t.status IN ('queued', 'started')
        ORDER BY t.step_slug, t.task_index LIMIT 1;
        EXIT WHEN NOT FOUND;
        EXIT WHEN pgflow_prefect.exhaust_task(fail_run.run_id, task.step_slug, task.task_index, fail_run.reason)
                  IN ('queued', 'started');
    END LOOP;
    RETURN true;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.fail_run(uuid, int, text, text) IS
    'Ends a run that this process holds and can''t go on with: its tasks fail with this reason, in all their attempts. False '
    'where another process has taken the run: it stays as it is, and so does one that has ended.';


CREATE OR REPLACE FUNCTION pgflow_prefect.lock_run(run_id uuid) RETURNS uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    locked uuid;
BEGIN
    SELECT r.run_id INTO locked FROM pgflow.runs r WHERE r.run_id = lock_run.run_id FOR NO KEY UPDATE;
    IF locked IS NULL THEN
        RAISE EXCEPTION 'unknown run %', lock_run.run_id USING ERRCODE = 'no_data_found';
    END IF;
    RETURN locked;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.lock_run(uuid) IS
    'Locks a run''s row until the transaction ends, as the transitions of the run do.';


CREATE OR REPLACE FUNCTION pgflow_prefect.complete_pending_step(
    run_id uuid, step_slug text, task_index int, step_result jsonb, epoch int, attempt int, task_run_id uuid,
    outcome jsonb DEFAULT NULL
) RETURNS TABLE (status text, ended_as text, error_message text, accepted boolean, skip_reason text, skip_message text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    SELECT c.status, c.ended_as, c.error_message, c.accepted, c.skip_reason, c.skip_message
    INTO status, ended_as, error_message, accepted, skip_reason, skip_message
    FROM pgflow_prefect.complete_task(run_id, step_slug, task_index, step_result, epoch, attempt, task_run_id, outcome) c;
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.complete_pending_step(uuid, text, int, jsonb, int, int, uuid, jsonb) IS
    'complete_task in the transaction of a handler; and whether it was this call that ended the task.';


CREATE OR REPLACE FUNCTION pgflow_prefect.perform_tasks(elements jsonb)
RETURNS TABLE (outcome text, status text, ended_as text, error_message text, attempt int, payload jsonb,
               upstream_results jsonb, kind text, target text, options jsonb, waits boolean, waited double precision,
               began_at timestamptz, ended_at timestamptz, note text, skip_reason text, logical_date timestamptz,
               interval_start timestamptz, interval_end timestamptz)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    element record;
    answer record;
    ids uuid[] := ARRAY(SELECT DISTINCT e.run_id FROM jsonb_to_recordset(elements) AS e (run_id uuid) ORDER BY 1);
    locked uuid[];
    broken_constraint text;
    reason text;
BEGIN
    PERFORM pgflow_prefect.refuse_policies();
    IF cardinality(ids) = 1 THEN
        PERFORM FROM pgflow.runs r WHERE r.run_id = ids[1] FOR NO KEY UPDATE;
        locked := ids;
    ELSE
        SELECT array_agg(l.run_id) INTO locked
        FROM (SELECT r.run_id FROM pgflow.runs r WHERE r.run_id = ANY (ids)
              ORDER BY r.run_id FOR NO KEY UPDATE SKIP LOCKED) l;
    END IF;
    FOR element IN
        SELECT * FROM jsonb_to_recordset(elements) AS e(
            "do" text, run_id uuid, epoch int, step_slug text, task_index int, task_run_id uuid, attempt int, result jsonb,
            outcome jsonb, error_message text, state_name text, upstream text[], with_payload boolean, bound text,
            has_function boolean, handler text)
    LOOP
        status := NULL;
        ended_as := NULL;
        error_message := NULL;
        attempt := NULL;
        payload := NULL;
        upstream_results := NULL;
        kind := NULL;
        target := NULL;
        options := NULL;
        waits := NULL;
        waited := NULL;
        began_at := NULL;
        ended_at := NULL;
        note := NULL;
        skip_reason := NULL;
        IF NOT EXISTS (SELECT FROM pgflow.runs r WHERE r.run_id = element.run_id) THEN
            outcome := 'gone';
            error_message := format('unknown run %s', coalesce(element.run_id::text, 'NULL'));
            RETURN NEXT;
            CONTINUE;
        ELSIF (element.run_id = ANY (locked)) IS NOT TRUE THEN
            outcome := 'locked';
            RETURN NEXT;
            CONTINUE;
        END IF;
        outcome := CASE WHEN EXISTS (SELECT FROM pgflow_prefect.run_owners o
                                     WHERE o.run_id = element.run_id AND o.epoch > element.epoch)
                        THEN 'superseded' ELSE 'done' END;
        IF element."do" = 'complete' THEN
            SELECT c.* INTO answer FROM pgflow_prefect.complete_task(
                element.run_id, element.step_slug, element.task_index, coalesce(element.result, 'null'), element.epoch,
                element.attempt, element.task_run_id, element.outcome) c;
        ELSIF element."do" = 'fail' THEN
            SELECT c.* INTO answer FROM pgflow_prefect.fail_task(
                element.run_id, element.step_slug, element.task_index, element.error_message, element.epoch,
                element.attempt, element.task_run_id, element.state_name) c;
        ELSIF element."do" = 'claim' THEN
            BEGIN
                SELECT c.status, c.attempt, c.payload, c.upstream_results, c.kind, c.target, c.options, c.waits, c.waited,
                       c.began_at, c.ended_at, c.note, c.skip_reason
                INTO status, attempt, payload, upstream_results, kind, target, options, waits, waited, began_at, ended_at,
                     note, skip_reason
                FROM pgflow_prefect.claim_step(
                    element.run_id, element.step_slug, element.task_index, element.epoch, element.task_run_id,
                    element.upstream, element.with_payload, element.bound, element.has_function, element.handler) c;
            EXCEPTION WHEN object_not_in_prerequisite_state THEN
                GET STACKED DIAGNOSTICS reason = MESSAGE_TEXT, broken_constraint = CONSTRAINT_NAME;
                IF broken_constraint NOT IN ('runs_status', 'step_states_status') THEN
                    RAISE;
                END IF;
                outcome := 'ended';
                error_message := reason;
            END;
        ELSE
            RAISE EXCEPTION 'an element has to complete, fail or claim a task, and this one says %',
                            coalesce(element."do", 'nothing')
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
        IF element."do" <> 'claim' THEN
            status := answer.status;
            ended_as := answer.ended_as;
            error_message := answer.error_message;
            skip_reason := answer.skip_reason;
            note := answer.skip_message;
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.perform_tasks(jsonb) IS
    'Completes, fails and claims tasks of one or several runs in one transaction: a row for each element, in their order. '
    'outcome: done; superseded, ended, gone: that run is not the caller''s any more; locked: of several runs, another '
    'transaction holds this one, and nothing was done. Any other error undoes all.';


CREATE OR REPLACE FUNCTION pgflow_prefect.watch_steps(
    run_ids uuid[], step_slugs text[], task_indexes int[], epochs int[], task_run_ids uuid[], bound text[],
    have_function boolean[]
) RETURNS TABLE (task_run_id uuid, outcome text, message text, began_at timestamptz, ended_at timestamptz)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
DECLARE
    seen record;
    told record;
BEGIN
    FOR seen IN
        SELECT w.run_id, w.step_slug, w.task_index, w.task_run_id, s.status, t.status AS task_status, t.message_id,
               r.flow_slug, r.status AS run_status, o.epoch IS DISTINCT FROM w.epoch AS is_lost,
               coalesce(m.is_ours, false) AND (NOT m.by_steps OR p.step_slug IS NOT NULL)
                   AND NOT pgflow_prefect.is_others(coalesce(b.kind, w.bound), w.has_function) AS is_ours,
               d.step_type = 'map' AS is_map,
               t.last_worker_id = m.worker_id AND c.state_name IS DISTINCT FROM 'Deferred' AS is_left,
               coalesce(t.started_at, s.started_at, s.created_at) AS began_at,
               coalesce(s.completed_at, s.failed_at) AS ended_at
        FROM unnest(run_ids, step_slugs, task_indexes, epochs, task_run_ids, bound, have_function)
             AS w (run_id, step_slug, task_index, epoch, task_run_id, bound, has_function)
        LEFT JOIN LATERAL (SELECT * FROM pgflow.runs r WHERE r.run_id = w.run_id OFFSET 0) r ON true
        LEFT JOIN LATERAL (
            SELECT * FROM pgflow.step_states s WHERE s.run_id = w.run_id AND s.step_slug = w.step_slug OFFSET 0) s ON true
        LEFT JOIN LATERAL (
            SELECT * FROM pgflow.step_tasks t
            WHERE t.run_id = w.run_id AND t.step_slug = w.step_slug AND t.task_index = w.task_index OFFSET 0) t ON true
        LEFT JOIN LATERAL (SELECT * FROM pgflow_prefect.run_owners o WHERE o.run_id = w.run_id OFFSET 0) o ON true
        LEFT JOIN LATERAL (
            SELECT * FROM pgflow_prefect.task_runs c
            WHERE c.run_id = w.run_id AND c.step_slug = w.step_slug AND c.task_index = w.task_index OFFSET 0) c ON true
        LEFT JOIN pgflow_prefect.moved_flows m ON m.flow_slug = r.flow_slug
        LEFT JOIN pgflow_prefect.bindings b ON b.workflow_slug = r.flow_slug AND b.step_slug = w.step_slug
        LEFT JOIN pgflow_prefect.moved_steps p ON p.flow_slug = r.flow_slug AND p.step_slug = w.step_slug
        LEFT JOIN pgflow.steps d ON d.flow_slug = r.flow_slug AND d.step_slug = w.step_slug
    LOOP
        outcome := CASE WHEN seen.status = 'skipped' THEN 'skipped'
                        WHEN seen.status IN ('completed', 'failed') THEN seen.status
                        WHEN seen.is_lost THEN 'lost'
                        WHEN seen.run_status <> 'started' THEN 'ended'
                        WHEN NOT seen.is_ours THEN NULL
                        WHEN seen.is_map THEN
                            CASE WHEN EXISTS (SELECT FROM pgflow.step_tasks t
                                              WHERE t.run_id = seen.run_id AND t.step_slug = seen.step_slug
                                                AND t.status IN ('queued', 'started')) THEN 'rebound' END
                        WHEN seen.task_status = 'started' AND seen.is_left THEN 'rebound'
                        WHEN seen.task_status = 'queued'
                             AND pgflow_prefect.find_due(seen.flow_slug, seen.message_id) <= clock_timestamp()
                        THEN 'rebound' END;
        CONTINUE WHEN outcome IS NULL;
        task_run_id := seen.task_run_id;
        message := NULL;
        began_at := seen.began_at;
        ended_at := seen.ended_at;
        IF outcome IN ('skipped', 'failed', 'ended') THEN
            SELECT coalesce(e.skip_message, e.error_message) INTO message
            FROM pgflow_prefect.describe_end(seen.run_id, seen.step_slug) e;
        ELSIF outcome = 'completed' THEN
            message := pgflow_prefect.shorten(pgflow_prefect.read_output(seen.run_id, seen.step_slug));
        END IF;
        IF outcome IN ('completed', 'skipped', 'failed', 'ended') THEN
            PERFORM pgflow_prefect.note_state(seen.run_id, seen.step_slug, seen.task_index, seen.task_run_id,
                                              CASE outcome WHEN 'ended' THEN 'Cancelled' ELSE initcap(outcome) END, NULL);
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.watch_steps(uuid[], text[], int[], int[], uuid[], text[], boolean[]) IS
    'Looks at tasks that are awaited, and returns those for which the waiting is over: completed, skipped, failed, lost (the '
    'run was taken), ended (the run was), rebound (the one who waits can claim it now).';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_input(run_id uuid, step_slug text, task_index int, upstream text[])
RETURNS TABLE (payload jsonb, upstream_results jsonb, logical_date timestamptz, interval_start timestamptz,
               interval_end timestamptz)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.input, pgflow_prefect.read_outputs(r.run_id, read_input.step_slug, read_input.upstream),
               NULL::timestamptz, NULL::timestamptz, NULL::timestamptz
        FROM pgflow.runs r WHERE r.run_id = read_input.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_input(uuid, text, int, text[]) IS
    'What a claim would give, without claiming.';


CREATE OR REPLACE FUNCTION pgflow_prefect.check_result(result jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
DECLARE
    problem text := pgflow_prefect.find_json_problem(result);
BEGIN
    IF problem IS NOT NULL THEN
        RAISE EXCEPTION 'the result of the function %', problem
            USING ERRCODE = 'program_limit_exceeded', CONSTRAINT = 'json_limits';
    END IF;
    RETURN result;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.check_result(jsonb) IS
    'Returns the result of a function that does a step; raises an error if the result is beyond the limits.';


------------------------------------------------------------------------------------------------------------
-- Maps: a task for each element
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.choose_items(
    flow_slug text, run_id uuid, step_slug text, wanted int
) RETURNS bigint[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    chosen bigint[];
BEGIN
    EXECUTE format($query$
        SELECT array_agg(c.msg_id) FROM (
            SELECT q.msg_id FROM pgflow.step_tasks t JOIN pgmq.%1$I q ON q.msg_id = t.message_id
            WHERE t.run_id = $1 AND t.step_slug = $2 AND t.status = 'queued' AND q.vt <= clock_timestamp()
            ORDER BY t.task_index LIMIT $3 FOR UPDATE OF q SKIP LOCKED) c
        $query$, pgmq.format_table_name(flow_slug, 'q')) INTO chosen USING run_id, step_slug, wanted;
    IF coalesce(cardinality(chosen), 0) < wanted THEN -- those that were taken out and are due, and those that are gone
        EXECUTE format($query$
            SELECT $3 || ARRAY(
                SELECT t.message_id FROM pgflow.step_tasks t
                LEFT JOIN pgflow_prefect.taken_out o ON o.flow_slug = t.flow_slug AND o.message_id = t.message_id AND o.run_id = t.run_id
                WHERE t.run_id = $1 AND t.step_slug = $2 AND t.status = 'queued'
                  AND coalesce(o.due_at <= clock_timestamp(), true)
                  AND NOT EXISTS (SELECT FROM pgmq.%1$I q WHERE q.msg_id = t.message_id)
                ORDER BY t.task_index LIMIT $4)
            $query$, pgmq.format_table_name(flow_slug, 'q'))
        INTO chosen USING run_id, step_slug, coalesce(chosen, '{}'), wanted - coalesce(cardinality(chosen), 0);
    END IF;
    RETURN chosen;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.choose_items(text, uuid, text, int) IS
    'The messages of tasks of a map that can be begun now, the first ones first, at most so many. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_next_due(flow_slug text, run_id uuid, step_slug text)
RETURNS double precision
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    due double precision;
BEGIN
    EXECUTE format($query$
        SELECT greatest(0, extract(epoch FROM min(coalesce(q.vt, o.due_at)) - clock_timestamp()))::double precision
        FROM pgflow.step_tasks t
        LEFT JOIN pgmq.%1$I q ON q.msg_id = t.message_id
        LEFT JOIN pgflow_prefect.taken_out o ON o.flow_slug = t.flow_slug AND o.message_id = t.message_id AND o.run_id = t.run_id
        WHERE t.run_id = $1 AND t.step_slug = $2 AND t.status = 'queued'
        $query$, pgmq.format_table_name(flow_slug, 'q')) INTO due USING run_id, step_slug;
    RETURN due;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_next_due(text, uuid, text) IS
    'In how many seconds the next task of a map can be begun; NULL where none waits. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.report_items(
    run pgflow.runs, step_slug text, epoch int, worker uuid, reports jsonb
) RETURNS int
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    report record;
    task pgflow.step_tasks;
    noted int := 0;
    ended int[] := '{}';
BEGIN
    FOR report IN
        SELECT * FROM jsonb_to_recordset(reports) AS e(
            item_index int, attempt int, "do" text, result jsonb, message text, pause double precision)
    LOOP
        SELECT * INTO task FROM pgflow.step_tasks t
        WHERE t.run_id = run.run_id AND t.step_slug = report_items.step_slug AND t.task_index = report.item_index;
        CONTINUE WHEN NOT pgflow_prefect.is_claimed(task, worker, report.attempt);
        IF report."do" = 'complete' THEN
            PERFORM FROM pgflow.complete_task(run.run_id, task.step_slug, task.task_index, coalesce(report.result, 'null'));
            ended := ended || task.task_index;
        ELSIF report."do" = 'fail' THEN -- pgflow may try it again: that is another claim
            PERFORM FROM pgflow.fail_task(run.run_id, task.step_slug, task.task_index, left(report.message, 10100));
            ended := ended || task.task_index;
        ELSIF report."do" IN ('retry', 'defer') THEN -- retry: not the handler's fault, so the attempt does not count
            UPDATE pgflow_prefect.item_claims c
            SET due_at = CASE WHEN report.pause IS NULL THEN 'infinity'
                              ELSE clock_timestamp() + make_interval(secs => report.pause) END
            WHERE c.run_id = run.run_id AND c.step_slug = task.step_slug AND c.item_index = task.task_index;
        ELSE
            RAISE EXCEPTION 'an item of step "%" can''t be left out on the released pgflow', task.step_slug
                USING ERRCODE = 'invalid_parameter_value', HINT = 'Return null, and let the next step leave it out.';
        END IF;
        noted := noted + 1;
    END LOOP;
    -- Only tasks in work keep a claim. So work_items never reads those that have ended.
    DELETE FROM pgflow_prefect.item_claims c
    WHERE c.run_id = run.run_id AND c.step_slug = report_items.step_slug AND c.item_index = ANY (ended);
    RETURN noted;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.report_items(pgflow.runs, text, int, uuid, jsonb) IS
    'Reports on tasks of a map, as work_items is told, and returns how many reports counted. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.work_items(
    run_id uuid, step_slug text, epoch int, reports jsonb, wanted int, held int[]
) RETURNS TABLE (status text, ended_as text, error_message text, skip_reason text, skip_message text, run_status text,
                 total int, remaining int, failed int, next_due double precision, item_index int, attempt int, item jsonb)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
    state pgflow.step_states;
    flow pgflow_prefect.moved_flows;
    worker uuid;
    is_ours boolean;
    claimed record;
    claims int := 0;
BEGIN
    PERFORM pgflow_prefect.refuse_policies();
    SELECT * INTO run FROM pgflow.runs r WHERE r.run_id = work_items.run_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown run %', work_items.run_id USING ERRCODE = 'no_data_found';
    ELSIF pgflow_prefect.is_stale(run.run_id, work_items.epoch) THEN
        RETURN NEXT; -- without a status, as in claim_step
        RETURN;
    END IF;
    worker := pgflow_prefect.find_worker(run.flow_slug);
    IF run.status = 'started' THEN
        PERFORM pgflow_prefect.report_items(run, work_items.step_slug, work_items.epoch, worker, reports);
        SELECT r.status INTO run.status FROM pgflow.runs r WHERE r.run_id = run.run_id;
    END IF;
    SELECT * INTO flow FROM pgflow_prefect.moved_flows m WHERE m.flow_slug = run.flow_slug;
    is_ours := pgflow_prefect.does_step(flow, work_items.step_slug);
    SELECT * INTO state FROM pgflow.step_states s WHERE s.run_id = run.run_id AND s.step_slug = work_items.step_slug;
    IF run.status = 'started' AND state.status = 'started' AND flow.is_ours AND wanted > 0 THEN
        FOR claimed IN -- those of a former owner, of a claim whose answer was lost, and of programs that were too slow
            UPDATE pgflow_prefect.item_claims c SET epoch = work_items.epoch, due_at = NULL
            FROM (SELECT k.item_index, t.attempts_count
                  FROM pgflow_prefect.item_claims k
                  JOIN pgflow.step_tasks t ON t.run_id = k.run_id AND t.step_slug = k.step_slug
                                          AND t.task_index = k.item_index AND t.status = 'started'
                                          AND t.last_worker_id = worker
                  WHERE k.run_id = run.run_id AND k.step_slug = work_items.step_slug
                    AND CASE WHEN k.due_at IS NOT NULL THEN k.due_at <= clock_timestamp()
                             ELSE k.epoch < work_items.epoch OR k.item_index <> ALL (held) END
                  ORDER BY k.item_index LIMIT wanted) f
            WHERE c.run_id = run.run_id AND c.step_slug = work_items.step_slug AND c.item_index = f.item_index
            RETURNING c.item_index, f.attempts_count
        LOOP
            claims := claims + 1;
            item_index := claimed.item_index;
            attempt := claimed.attempts_count;
            item := pgflow_prefect.read_item(run.run_id, work_items.step_slug, claimed.item_index);
            RETURN NEXT;
        END LOOP;
        IF claims < wanted AND is_ours THEN
            FOR claimed IN
                WITH begun AS (
                    SELECT s.task_index, s.input
                    FROM pgflow.start_tasks(run.flow_slug, pgflow_prefect.choose_items(
                        run.flow_slug, run.run_id, work_items.step_slug, wanted - claims), worker) s),
                noted AS (
                    INSERT INTO pgflow_prefect.item_claims AS c (run_id, step_slug, item_index, epoch)
                    SELECT run.run_id, work_items.step_slug, b.task_index, work_items.epoch FROM begun b
                    ON CONFLICT ON CONSTRAINT item_claims_pkey DO UPDATE SET epoch = excluded.epoch, due_at = NULL
                    RETURNING c.item_index)
                SELECT b.task_index, b.input FROM begun b JOIN noted n ON n.item_index = b.task_index ORDER BY b.task_index
            LOOP
                -- Two transactions that begin one task both get it from start_tasks.
                SELECT t.attempts_count INTO attempt FROM pgflow.step_tasks t
                WHERE t.run_id = run.run_id AND t.step_slug = work_items.step_slug AND t.task_index = claimed.task_index
                  AND t.status = 'started' AND t.last_worker_id = worker;
                CONTINUE WHEN NOT FOUND;
                claims := claims + 1;
                item_index := claimed.task_index;
                item := claimed.input;
                RETURN NEXT;
            END LOOP;
        END IF;
    END IF;
    SELECT e.status, e.ended_as, e.error_message, e.skip_reason, e.skip_message
    INTO status, ended_as, error_message, skip_reason, skip_message
    FROM pgflow_prefect.describe_end(run.run_id, work_items.step_slug) e;
    total := coalesce(state.initial_tasks, 0);
    remaining := coalesce(state.remaining_tasks, 0);
    failed := CASE WHEN status <> 'pending' THEN
                  (SELECT count(*) FROM pgflow.step_tasks t
                   WHERE t.run_id = run.run_id AND t.step_slug = work_items.step_slug AND t.status = 'failed')::int
                   ELSE 0 END;
    run_status := CASE WHEN run.status IN ('completed', 'failed') THEN run.status ELSE 'pending' END;
    IF claims < wanted AND status = 'pending' AND is_ours THEN
        next_due := pgflow_prefect.find_next_due(run.flow_slug, run.run_id, work_items.step_slug);
    END IF;
    item_index := NULL;
    attempt := NULL;
    item := NULL;
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.work_items(uuid, text, int, jsonb, int, int[]) IS
    'For the owner of a run: reports on tasks of a map, and claims others, in one statement; see the contract. A task that '
    'fails is tried again when pgflow says so. A row for each claimed task, and at last one that says how the map stands. One '
    'row of NULL for a former owner.';


CREATE OR REPLACE FUNCTION pgflow_prefect.complete_pending_items(
    run_id uuid, step_slug text, item_indexes int[], item_results jsonb, epoch int, attempts int[],
    outcome jsonb DEFAULT NULL
) RETURNS TABLE (status text, ended_as text, error_message text, accepted boolean, skip_reason text, skip_message text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
    noted int := 0;
BEGIN
    PERFORM pgflow_prefect.refuse_policies();
    SELECT * INTO run FROM pgflow.runs r WHERE r.run_id = complete_pending_items.run_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown run %', complete_pending_items.run_id USING ERRCODE = 'no_data_found';
    ELSIF run.status = 'started' AND NOT pgflow_prefect.is_stale(run.run_id, complete_pending_items.epoch) THEN
        noted := pgflow_prefect.report_items(
            run, complete_pending_items.step_slug, complete_pending_items.epoch,
            pgflow_prefect.find_worker(run.flow_slug), (
                SELECT jsonb_agg(jsonb_build_object(
                    'do', CASE WHEN complete_pending_items.outcome IS NULL THEN 'complete' ELSE 'skip' END,
                    'item_index', i.item_index, 'attempt', i.attempt, 'result', item_results -> (i.place - 1)::int)
                    ORDER BY i.place)
                FROM unnest(item_indexes, attempts) WITH ORDINALITY AS i (item_index, attempt, place)));
    END IF;
    SELECT e.status, e.ended_as, e.error_message, e.skip_reason, e.skip_message
    INTO status, ended_as, error_message, skip_reason, skip_message
    FROM pgflow_prefect.describe_end(run.run_id, complete_pending_items.step_slug) e;
    accepted := noted = cardinality(item_indexes);
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.complete_pending_items(uuid, text, int[], jsonb, int, int[], jsonb) IS
    'Completes tasks of a map in the transaction of their handler; how the map stands then, and whether all of these reports '
    'were accepted.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_returned_items(run_id uuid, step_slug text, item_indexes int[])
RETURNS TABLE (item_index int)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT t.task_index FROM pgflow.step_tasks t
        WHERE t.run_id = list_returned_items.run_id AND t.step_slug = list_returned_items.step_slug
          AND t.task_index = ANY (list_returned_items.item_indexes) AND t.error_message IS NOT NULL;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_returned_items(uuid, text, int[]) IS
    'Which of these tasks of a map have failed in an earlier attempt.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_failed_items(run_id uuid, step_slug text, at_most int)
RETURNS TABLE (item_index int, attempts int, error_message text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT t.task_index, t.attempts_count, t.error_message FROM pgflow.step_tasks t
        WHERE t.run_id = list_failed_items.run_id AND t.step_slug = list_failed_items.step_slug AND t.status = 'failed'
        ORDER BY t.task_index LIMIT list_failed_items.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_failed_items(uuid, text, int) IS 'The first failed tasks of a map.';


------------------------------------------------------------------------------------------------------------
-- Reading runs that Prefect executes
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.read_results(run_id uuid, step_slugs text[]) RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN (SELECT coalesce(jsonb_object_agg(s.step_slug, pgflow_prefect.read_output(s.run_id, s.step_slug)), '{}')
            FROM pgflow.step_states s
            WHERE s.run_id = read_results.run_id AND s.status = 'completed' AND s.step_slug = ANY (read_results.step_slugs));
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_results(uuid, text[]) IS
    'The results of those of these steps that are completed and were not skipped, by slug.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_end(run_id uuid, step_slugs text[])
RETURNS TABLE (id uuid, status text, ended_as text, epoch int, error_message text, results jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.run_id, CASE WHEN r.status IN ('completed', 'failed') THEN r.status ELSE 'pending' END, NULL::text,
               coalesce((SELECT o.epoch FROM pgflow_prefect.run_owners o WHERE o.run_id = r.run_id), 0),
               CASE WHEN r.status = 'failed' THEN pgflow_prefect.describe_failure(r.run_id) END,
               CASE WHEN r.status = 'completed' THEN pgflow_prefect.read_results(r.run_id, read_end.step_slugs)
                    ELSE '{}' END
        FROM pgflow.runs r WHERE r.run_id = read_end.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_end(uuid, text[]) IS
    'How a run stands, and the results of these steps if it is completed, without those that were skipped. No row: there is '
    'no such run.';


CREATE OR REPLACE FUNCTION pgflow_prefect.reopen_run(run_id uuid) RETURNS uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    now_is text;
BEGIN
    SELECT r.status INTO now_is FROM pgflow.runs r WHERE r.run_id = reopen_run.run_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown run %', reopen_run.run_id USING ERRCODE = 'no_data_found';
    ELSIF now_is <> 'started' THEN
        RAISE EXCEPTION 'run % is %, and pgflow has no function that reopens it', reopen_run.run_id, now_is
            USING ERRCODE = 'feature_not_supported', HINT = 'Begin a new run.';
    END IF;
    RETURN run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.reopen_run(uuid) IS
    'Refuses a run that has ended: pgflow can''t reopen it. One that goes on stays as it is.';


CREATE OR REPLACE FUNCTION pgflow_prefect.repair_run(run_id uuid) RETURNS uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM pgflow.runs r WHERE r.run_id = repair_run.run_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown run %', repair_run.run_id USING ERRCODE = 'no_data_found';
    END IF;
    RETURN run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.repair_run(uuid) IS
    'Changes nothing: pgflow starts steps in the transaction that makes them ready.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_task_runs(run_id uuid) RETURNS TABLE (step_slug text, task_run_id uuid)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT t.step_slug, t.task_run_id FROM pgflow_prefect.task_runs t
        WHERE t.run_id = list_task_runs.run_id AND t.task_index = 0;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_task_runs(uuid) IS 'The latest task run of each step of a run that was claimed.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_waiting_runs()
RETURNS TABLE (workflow_slug text, runs bigint, first uuid)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.flow_slug, count(*), (array_agg(r.run_id ORDER BY r.started_at))[1]
        FROM pgflow_prefect.moved_flows m
        JOIN pgflow.runs r ON r.flow_slug = m.flow_slug AND r.status = 'started'
        WHERE m.is_ours
          AND NOT EXISTS (SELECT FROM pgflow_prefect.enabled_workflows e
                          WHERE e.workflow_slug = m.flow_slug AND NOT e.enabled)
          AND NOT EXISTS (SELECT FROM pgflow_prefect.run_owners o WHERE o.run_id = r.run_id)
        GROUP BY r.flow_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_waiting_runs() IS
    'The number of runs of each moved flow that no process has ever taken, and the oldest of them.';


CREATE OR REPLACE FUNCTION pgflow_prefect.count_untaken_runs(seconds double precision, lease double precision)
RETURNS TABLE (workflow_slug text, runs bigint, older bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.flow_slug, count(*), 0::bigint
        FROM pgflow_prefect.moved_flows m
        JOIN pgflow.runs r ON r.flow_slug = m.flow_slug AND r.status = 'started'
        LEFT JOIN pgflow_prefect.run_owners o ON o.run_id = r.run_id
        WHERE m.is_ours
          AND NOT EXISTS (SELECT FROM pgflow_prefect.enabled_workflows e
                          WHERE e.workflow_slug = m.flow_slug AND NOT e.enabled)
          AND greatest(r.started_at, m.moved_at, o.taken_at)
              < clock_timestamp() - make_interval(secs => count_untaken_runs.seconds)
          AND coalesce(pgflow_prefect.how_held(o, count_untaken_runs.lease), 'released') IN ('released', 'expired')
          AND NOT EXISTS (SELECT FROM pgflow_prefect.set_aside_runs a WHERE a.run_id = r.run_id)
        GROUP BY r.flow_slug
        ORDER BY r.flow_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.count_untaken_runs(double precision, double precision) IS
    'Runs of moved flows that no process has taken for so many seconds, without those that are set aside.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_set_aside(lease double precision, at_most int)
RETURNS TABLE (run_id uuid, workflow_slug text, reason text, runs bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT a.run_id, r.flow_slug, a.reason, count(*) OVER ()
        FROM pgflow_prefect.set_aside_runs a
        JOIN pgflow.runs r ON r.run_id = a.run_id AND r.status = 'started'
        LEFT JOIN pgflow_prefect.run_owners o ON o.run_id = r.run_id
        WHERE coalesce(pgflow_prefect.how_held(o, list_set_aside.lease), 'released') IN ('released', 'expired')
          AND coalesce(o.epoch, 0) = a.epoch
        ORDER BY a.tries DESC, a.run_id
        LIMIT list_set_aside.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_set_aside(double precision, int) IS
    'Runs that could not be taken, those with the most tries first, and how many there are in all.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_unsettled(run_ids uuid[], lease double precision)
RETURNS TABLE (id uuid, workflow_slug text, status text, ended_as text, is_given_up boolean, error_message text,
               finished_at timestamptz, epoch int,
               taken_at timestamptz, now timestamptz, flow_run_id uuid, held text, flow_run_ids uuid[])
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.run_id, r.flow_slug, CASE WHEN r.status IN ('completed', 'failed') THEN r.status ELSE 'pending' END,
               NULL::text, false, CASE WHEN r.status = 'failed' THEN pgflow_prefect.describe_failure(r.run_id) END,
               coalesce(r.completed_at, r.failed_at), o.epoch, o.taken_at, clock_timestamp(), o.flow_run_id,
               pgflow_prefect.how_held(o, read_unsettled.lease),
               ARRAY(SELECT DISTINCT f.flow_run_id FROM pgflow_prefect.run_flow_runs f WHERE f.run_id = r.run_id)
        FROM pgflow_prefect.run_owners o
        JOIN pgflow.runs r ON r.run_id = o.run_id
        WHERE o.run_id = ANY (read_unsettled.run_ids)
        ORDER BY r.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_unsettled(uuid[], double precision) IS
    'Those of these runs that Prefect executes, with all their flow runs. `observe` settles the others.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_unsettled_steps(run_ids uuid[])
RETURNS TABLE (run_id uuid, step_slug text, task_index int, status text, ended_as text, error_message text,
               task_run_id uuid)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT t.run_id, t.step_slug, t.task_index, e.status, e.ended_as, e.error_message, t.task_run_id
        FROM pgflow_prefect.task_runs t
        CROSS JOIN LATERAL pgflow_prefect.describe_end(t.run_id, t.step_slug) e
        WHERE t.run_id = ANY (list_unsettled_steps.run_ids)
        ORDER BY t.claimed_at, t.step_slug, t.task_index;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_unsettled_steps(uuid[]) IS
    'The steps of these runs that a task run has claimed, without their results, which may be large.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_known(run_ids uuid[], flow_run_ids uuid[])
RETURNS TABLE (known_runs uuid[], known_flow_runs uuid[])
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT ARRAY(SELECT r.run_id FROM pgflow.runs r WHERE r.run_id = ANY (find_known.run_ids)),
               ARRAY(SELECT f.flow_run_id FROM pgflow_prefect.run_flow_runs f
                     WHERE f.flow_run_id = ANY (find_known.flow_run_ids)
                     UNION SELECT f.flow_run_id FROM pgflow_prefect.flow_runs f
                     WHERE f.flow_run_id = ANY (find_known.flow_run_ids));
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_known(uuid[], uuid[]) IS
    'Which of these runs exist, and which of these flow runs have ever taken or shown one.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_cached(run_id uuid, step_slug text, task_index int, cache_key text)
RETURNS TABLE (source_run_id uuid, result jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    RETURN; -- pgflow keeps no key of a result
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_cached(uuid, text, int, text) IS
    'No result: steps take no result of an earlier run over here.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_left_unshown(
    workflow_slugs text[], grace double precision, after uuid, at_most int
) RETURNS TABLE (run_id uuid, workflow_slug text, epoch int, status text, seconds double precision)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN; -- no run begins here without a flow run
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_left_unshown(text[], double precision, uuid, int) IS
    'No run: Prefect is told of each one from its beginning.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_given_up(run_id uuid, step_slug text, task_index int) RETURNS boolean
LANGUAGE plpgsql VOLATILE -- reads what was committed before the run's lock was got
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    answer boolean;
BEGIN
    EXECUTE format($query$
        SELECT t.status = 'started' AND %s IS NOT NULL FROM pgflow.step_tasks t
        WHERE t.run_id = $1 AND t.step_slug = $2 AND t.task_index = $3
          AND NOT EXISTS (SELECT FROM pgflow_prefect.moved_flows m
                          WHERE m.flow_slug = t.flow_slug AND m.is_ours AND m.worker_id = t.last_worker_id)
        $query$, pgflow_prefect.find_column('step_tasks', 'permanently_stalled_at', 't', 'timestamptz'))
    INTO answer USING run_id, step_slug, task_index;
    RETURN answer IS TRUE;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.is_given_up(uuid, text, int) IS
    'Whether pgflow has given a task up, and no worker of ours has it. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.end_given_up_tasks(at_most int)
RETURNS TABLE (workflow_slug text, run_id uuid, step_slug text, task_index int, run_status text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    given_up record;
BEGIN
    PERFORM pgflow_prefect.refuse_policies();
    FOR given_up IN
        SELECT s.workflow_slug, s.run_id, s.step_slug, s.task_index, s.requeued
        FROM pgflow_prefect.list_stalled_tasks(end_given_up_tasks.at_most) s WHERE s.is_given_up
    LOOP
        workflow_slug := given_up.workflow_slug;
        run_id := given_up.run_id;
        step_slug := given_up.step_slug;
        task_index := given_up.task_index;
        -- The list was read without locks: a person may have put the task back meanwhile.
        PERFORM FROM pgflow.runs r WHERE r.run_id = given_up.run_id FOR NO KEY UPDATE;
        CONTINUE WHEN NOT pgflow_prefect.is_given_up(run_id, step_slug, task_index);
        CONTINUE WHEN pgflow_prefect.exhaust_task(run_id, step_slug, task_index, format(
            'given up: pgflow has put the task back %s times, and no worker has reported it', given_up.requeued))
            IN ('queued', 'started');
        run_status := (SELECT r.status FROM pgflow.runs r WHERE r.run_id = given_up.run_id);
        RETURN NEXT;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.end_given_up_tasks(int) IS
    'Fails tasks that pgflow has given up and that would keep their runs for ever, at most so many: what follows is what the '
    'flow says. Returns each with the status of its run.';


-- Rights: the owner's alone, until a role is granted EXECUTE. The version is set by the last script.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA pgflow_prefect FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA pgflow_prefect FROM PUBLIC;

COMMIT;
