-- A stand-in of our own for the released pgflow 0.14: its tables as far as this program reads them, and its functions for
-- conditions, skips, retries and stalled tasks, by what they promise. It is small and slow, and is no copy of pgflow's code.
-- Needs pgmq.

CREATE SCHEMA pgflow;

CREATE TABLE pgflow.flows (
    flow_slug text PRIMARY KEY,
    opt_max_attempts int NOT NULL,
    opt_base_delay int NOT NULL,
    opt_timeout int NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE pgflow.steps (
    flow_slug text NOT NULL REFERENCES pgflow.flows,
    step_slug text NOT NULL,
    step_type text NOT NULL DEFAULT 'single' CHECK (step_type IN ('single', 'map')),
    step_index int NOT NULL,
    deps_count int NOT NULL DEFAULT 0,
    opt_max_attempts int,
    opt_base_delay int,
    opt_timeout int,
    opt_start_delay int,
    required_input_pattern jsonb,
    forbidden_input_pattern jsonb,
    when_unmet text NOT NULL DEFAULT 'skip' CHECK (when_unmet IN ('fail', 'skip', 'skip-cascade')),
    when_exhausted text NOT NULL DEFAULT 'fail' CHECK (when_exhausted IN ('fail', 'skip', 'skip-cascade')),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (flow_slug, step_slug)
);
CREATE TABLE pgflow.deps (
    flow_slug text NOT NULL,
    dep_slug text NOT NULL,
    step_slug text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (flow_slug, dep_slug, step_slug),
    FOREIGN KEY (flow_slug, dep_slug) REFERENCES pgflow.steps,
    FOREIGN KEY (flow_slug, step_slug) REFERENCES pgflow.steps
);
CREATE TABLE pgflow.runs (
    run_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    flow_slug text NOT NULL REFERENCES pgflow.flows,
    status text NOT NULL DEFAULT 'started' CHECK (status IN ('started', 'failed', 'completed')),
    input jsonb NOT NULL,
    output jsonb,
    remaining_steps int NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    completed_at timestamptz,
    failed_at timestamptz
);
CREATE INDEX ON pgflow.runs (flow_slug);
CREATE INDEX ON pgflow.runs (status);
CREATE TABLE pgflow.step_states (
    flow_slug text NOT NULL,
    run_id uuid NOT NULL REFERENCES pgflow.runs,
    step_slug text NOT NULL,
    status text NOT NULL DEFAULT 'created'
        CHECK (status IN ('created', 'started', 'completed', 'failed', 'skipped')),
    remaining_tasks int,
    initial_tasks int,
    remaining_deps int NOT NULL,
    output jsonb,
    error_message text,
    skip_reason text,
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    completed_at timestamptz,
    failed_at timestamptz,
    skipped_at timestamptz,
    PRIMARY KEY (run_id, step_slug),
    FOREIGN KEY (flow_slug, step_slug) REFERENCES pgflow.steps
);
CREATE TABLE pgflow.workers (
    worker_id uuid PRIMARY KEY,
    queue_name text NOT NULL,
    function_name text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    deprecated_at timestamptz,
    stopped_at timestamptz,
    last_heartbeat_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE pgflow.worker_functions (
    function_name text PRIMARY KEY,
    enabled boolean NOT NULL DEFAULT true,
    last_invoked_at timestamptz,
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE pgflow.step_tasks (
    flow_slug text NOT NULL,
    run_id uuid NOT NULL,
    step_slug text NOT NULL,
    message_id bigint,
    task_index int NOT NULL DEFAULT 0,
    status text NOT NULL DEFAULT 'queued' CHECK (status IN ('queued', 'started', 'completed', 'failed')),
    attempts_count int NOT NULL DEFAULT 0,
    error_message text,
    output jsonb,
    queued_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    completed_at timestamptz,
    failed_at timestamptz,
    last_worker_id uuid REFERENCES pgflow.workers ON DELETE SET NULL,
    requeued_count int NOT NULL DEFAULT 0,
    last_requeued_at timestamptz,
    permanently_stalled_at timestamptz,
    PRIMARY KEY (run_id, step_slug, task_index),
    FOREIGN KEY (run_id, step_slug) REFERENCES pgflow.step_states
);
CREATE INDEX ON pgflow.step_tasks (message_id);

CREATE FUNCTION pgflow.create_flow(
    flow_slug text, max_attempts int DEFAULT NULL, base_delay int DEFAULT NULL, timeout int DEFAULT NULL
) RETURNS void LANGUAGE plpgsql AS $$
#variable_conflict use_variable
BEGIN
    INSERT INTO pgflow.flows VALUES (flow_slug, coalesce(max_attempts, 3), coalesce(base_delay, 1), coalesce(timeout, 60))
    ON CONFLICT DO NOTHING;
    IF FOUND THEN
        PERFORM pgmq.create(flow_slug);
    END IF;
END
$$;

CREATE FUNCTION pgflow.track_worker_function(function_name text) RETURNS void LANGUAGE sql AS $$
    INSERT INTO pgflow.worker_functions (function_name, last_invoked_at) VALUES ($1, clock_timestamp())
    ON CONFLICT ON CONSTRAINT worker_functions_pkey DO UPDATE SET last_invoked_at = clock_timestamp(), updated_at = now()
$$;

CREATE FUNCTION pgflow.mark_worker_stopped(worker_id uuid) RETURNS void LANGUAGE sql AS $$
    UPDATE pgflow.workers w SET stopped_at = clock_timestamp() WHERE w.worker_id = $1
$$;

CREATE FUNCTION pgflow._get_flow_shape(p_flow_slug text) RETURNS jsonb LANGUAGE sql AS $$
    SELECT jsonb_build_object('steps', coalesce(jsonb_agg(jsonb_build_object(
        'slug', s.step_slug, 'stepType', s.step_type, 'dependencies', to_jsonb(ARRAY(
            SELECT d.dep_slug FROM pgflow.deps d WHERE (d.flow_slug, d.step_slug) = (s.flow_slug, s.step_slug) ORDER BY 1)))
        ORDER BY s.step_index), '[]'))
    FROM pgflow.steps s WHERE s.flow_slug = p_flow_slug
$$;

-- Compares only: a stand-in's flows are made by create_flow and add_step.
CREATE FUNCTION pgflow.ensure_flow_compiled(flow_slug text, shape jsonb, allow_data_loss boolean DEFAULT false)
RETURNS jsonb LANGUAGE sql AS $$
    SELECT jsonb_build_object('status', CASE WHEN pgflow._get_flow_shape($1) = $2 THEN 'verified' ELSE 'mismatch' END,
                              'differences', '[]'::jsonb)
$$;

CREATE FUNCTION pgflow.add_step(
    flow_slug text, step_slug text, deps_slugs text[] DEFAULT '{}', max_attempts int DEFAULT NULL,
    base_delay int DEFAULT NULL, timeout int DEFAULT NULL, start_delay int DEFAULT NULL, step_type text DEFAULT 'single',
    required_input_pattern jsonb DEFAULT NULL, forbidden_input_pattern jsonb DEFAULT NULL, when_unmet text DEFAULT 'skip',
    when_exhausted text DEFAULT 'fail'
) RETURNS void LANGUAGE plpgsql AS $$
#variable_conflict use_variable
BEGIN
    INSERT INTO pgflow.steps
    VALUES (flow_slug, step_slug, step_type, (SELECT count(*) FROM pgflow.steps s WHERE s.flow_slug = add_step.flow_slug),
            cardinality(deps_slugs), max_attempts, base_delay, timeout, start_delay, required_input_pattern,
            forbidden_input_pattern, when_unmet, when_exhausted)
    ON CONFLICT DO NOTHING;
    INSERT INTO pgflow.deps SELECT flow_slug, each, step_slug FROM unnest(deps_slugs) each ON CONFLICT DO NOTHING;
END
$$;

CREATE FUNCTION pgflow.start_flow(flow_slug text, input jsonb, run_id uuid DEFAULT NULL) RETURNS SETOF pgflow.runs
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    id uuid := coalesce(run_id, gen_random_uuid());
BEGIN
    INSERT INTO pgflow.runs (run_id, flow_slug, input, remaining_steps)
    SELECT id, flow_slug, input, count(*) FROM pgflow.steps s WHERE s.flow_slug = start_flow.flow_slug;
    INSERT INTO pgflow.step_states (flow_slug, run_id, step_slug, remaining_deps, initial_tasks)
    SELECT s.flow_slug, id, s.step_slug, s.deps_count,
           CASE WHEN s.step_type = 'single' THEN 1 WHEN s.deps_count > 0 THEN NULL
                WHEN jsonb_typeof(input) = 'array' THEN jsonb_array_length(input) END
    FROM pgflow.steps s WHERE s.flow_slug = start_flow.flow_slug;
    PERFORM pgflow.go_on(id);
    RETURN QUERY SELECT r.* FROM pgflow.runs r WHERE r.run_id = id;
END
$$;

-- The input of a condition, and of a single step.
CREATE FUNCTION pgflow.find_input(run uuid, step text) RETURNS jsonb LANGUAGE sql AS $$
    SELECT CASE WHEN s.deps_count = 0 THEN r.input
                ELSE (SELECT coalesce(jsonb_object_agg(a.step_slug, a.output), '{}') FROM pgflow.deps d
                      JOIN pgflow.step_states a ON a.run_id = run AND a.step_slug = d.dep_slug AND a.status = 'completed'
                      WHERE d.flow_slug = s.flow_slug AND d.step_slug = step) END
    FROM pgflow.runs r JOIN pgflow.steps s ON s.flow_slug = r.flow_slug AND s.step_slug = step WHERE r.run_id = run
$$;

-- What a handler gets: a map's element, nothing for a root, which reads the run's input, or the outputs above.
CREATE FUNCTION pgflow.find_task_input(run uuid, step text, index int) RETURNS jsonb LANGUAGE sql AS $$
    SELECT CASE WHEN s.step_type = 'single' AND s.deps_count = 0 THEN '{}'
                WHEN s.step_type = 'single' THEN pgflow.find_input(run, step)
                WHEN s.deps_count = 0 THEN r.input -> index
                ELSE (SELECT a.output -> index FROM pgflow.deps d
                      JOIN pgflow.step_states a ON a.run_id = run AND a.step_slug = d.dep_slug
                      WHERE d.flow_slug = s.flow_slug AND d.step_slug = step) END
    FROM pgflow.runs r JOIN pgflow.steps s ON s.flow_slug = r.flow_slug AND s.step_slug = step WHERE r.run_id = run
$$;

-- Decides and starts what is ready, one step after the other, and ends the run when all steps have ended.
CREATE FUNCTION pgflow.go_on(run uuid) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    ready record;
    given jsonb;
BEGIN
    LOOP
        SELECT t.*, s.step_type, s.required_input_pattern, s.forbidden_input_pattern, s.when_unmet INTO ready
        FROM pgflow.step_states t JOIN pgflow.steps s USING (flow_slug, step_slug)
        JOIN pgflow.runs r ON r.run_id = t.run_id AND r.status = 'started'
        WHERE t.run_id = run AND t.status = 'created' AND t.remaining_deps = 0 ORDER BY s.step_index LIMIT 1;
        EXIT WHEN NOT FOUND;
        given := pgflow.find_input(run, ready.step_slug);
        IF NOT (given @> coalesce(ready.required_input_pattern, '{}') OR ready.required_input_pattern IS NULL)
           OR given @> ready.forbidden_input_pattern THEN
            IF ready.when_unmet = 'fail' THEN
                UPDATE pgflow.step_states SET status = 'failed', failed_at = now(), error_message = 'Condition not met'
                WHERE (run_id, step_slug) = (run, ready.step_slug);
                UPDATE pgflow.runs SET status = 'failed', failed_at = now() WHERE run_id = run;
            ELSE
                PERFORM pgflow.skip_step(run, ready.step_slug, 'condition_unmet', ready.when_unmet = 'skip-cascade');
            END IF;
        ELSIF ready.initial_tasks = 0 THEN
            PERFORM pgflow.end_step(run, ready.step_slug, '[]');
        ELSE
            UPDATE pgflow.step_states SET status = 'started', started_at = now(), remaining_tasks = initial_tasks
            WHERE (run_id, step_slug) = (run, ready.step_slug);
            INSERT INTO pgflow.step_tasks (flow_slug, run_id, step_slug, task_index, message_id)
            SELECT ready.flow_slug, run, ready.step_slug, i,
                   pgmq.send(ready.flow_slug, jsonb_build_object('run_id', run, 'step_slug', ready.step_slug, 'task_index', i))
            FROM generate_series(0, ready.initial_tasks - 1) i;
        END IF;
    END LOOP;
    UPDATE pgflow.runs r SET status = 'completed', completed_at = now(), output = (
        SELECT coalesce(jsonb_object_agg(t.step_slug, t.output), '{}') FROM pgflow.step_states t
        WHERE t.run_id = run AND t.status = 'completed'
          AND NOT EXISTS (SELECT FROM pgflow.deps d WHERE d.flow_slug = t.flow_slug AND d.dep_slug = t.step_slug))
    WHERE r.run_id = run AND r.status = 'started' AND r.remaining_steps = 0;
END
$$;

CREATE FUNCTION pgflow.release_children(run uuid, step text, result jsonb) RETURNS void LANGUAGE sql AS $$
    UPDATE pgflow.runs SET remaining_steps = remaining_steps - 1 WHERE run_id = run;
    UPDATE pgflow.step_states c SET remaining_deps = c.remaining_deps - 1,
        initial_tasks = CASE WHEN s.step_type = 'map' THEN jsonb_array_length(result) ELSE c.initial_tasks END
    FROM pgflow.deps d JOIN pgflow.steps s USING (flow_slug, step_slug)
    WHERE c.run_id = run AND d.flow_slug = c.flow_slug AND d.dep_slug = step AND c.step_slug = d.step_slug
$$;

CREATE FUNCTION pgflow.end_step(run uuid, step text, result jsonb) RETURNS void LANGUAGE sql AS $$
    UPDATE pgflow.step_states SET status = 'completed', started_at = coalesce(started_at, now()), completed_at = now(),
        remaining_tasks = 0, output = result WHERE (run_id, step_slug) = (run, step);
    SELECT pgflow.release_children(run, step, CASE WHEN jsonb_typeof(result) = 'array' THEN result ELSE '[]' END)
$$;

CREATE FUNCTION pgflow.skip_step(run uuid, step text, reason text, is_cascade boolean) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    below text;
BEGIN
    UPDATE pgflow.step_states SET status = 'skipped', skip_reason = reason, skipped_at = now(), remaining_tasks = NULL
    WHERE (run_id, step_slug) = (run, step) AND status IN ('created', 'started');
    IF NOT FOUND THEN
        RETURN;
    END IF;
    PERFORM pgflow.release_children(run, step, '[]');
    IF is_cascade THEN
        FOR below IN SELECT d.step_slug FROM pgflow.deps d JOIN pgflow.runs r ON r.run_id = run AND r.flow_slug = d.flow_slug
                     WHERE d.dep_slug = step ORDER BY 1 LOOP
            PERFORM pgflow.skip_step(run, below, 'dependency_skipped', true);
        END LOOP;
    END IF;
END
$$;

CREATE FUNCTION pgflow.start_tasks(flow_slug text, msg_ids bigint[], worker_id uuid)
RETURNS TABLE (flow text, run_id uuid, step_slug text, input jsonb, msg_id bigint, task_index int, flow_input jsonb)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        WITH begun AS (
            UPDATE pgflow.step_tasks t SET status = 'started', attempts_count = attempts_count + 1, started_at = now(),
                last_worker_id = start_tasks.worker_id
            FROM pgflow.runs r, pgflow.step_states s
            WHERE t.flow_slug = start_tasks.flow_slug AND t.message_id = ANY (msg_ids) AND t.status = 'queued'
              AND r.run_id = t.run_id AND r.status = 'started'
              AND (s.run_id, s.step_slug, s.status) = (t.run_id, t.step_slug, 'started')
            RETURNING t.*)
        SELECT b.flow_slug, b.run_id, b.step_slug, pgflow.find_task_input(b.run_id, b.step_slug, b.task_index),
               b.message_id, b.task_index,
               CASE WHEN s.step_type = 'single' AND s.deps_count = 0 THEN r.input END
        FROM begun b
        JOIN pgflow.runs r ON r.run_id = b.run_id
        JOIN pgflow.steps s ON (s.flow_slug, s.step_slug) = (b.flow_slug, b.step_slug)
        JOIN pgflow.flows f ON f.flow_slug = b.flow_slug
        -- Hidden until the task has taken too long.
        CROSS JOIN LATERAL (SELECT count(*) FROM pgmq.set_vt(b.flow_slug, b.message_id,
                                                             coalesce(s.opt_timeout, f.opt_timeout) + 2)) hidden;
END
$$;

CREATE FUNCTION pgflow.complete_task(run_id uuid, step_slug text, task_index int, output jsonb)
RETURNS SETOF pgflow.step_tasks LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    done pgflow.step_tasks;
    left_over int;
    kind text;
BEGIN
    PERFORM FROM pgflow.runs r WHERE r.run_id = complete_task.run_id FOR UPDATE;
    UPDATE pgflow.step_tasks t SET status = 'completed', completed_at = now(), output = complete_task.output
    FROM pgflow.runs r
    WHERE (t.run_id, t.step_slug, t.task_index) = (complete_task.run_id, complete_task.step_slug, complete_task.task_index)
      AND t.status = 'started' AND r.run_id = t.run_id AND r.status = 'started' RETURNING t.* INTO done;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    PERFORM pgmq.archive(done.flow_slug, done.message_id);
    UPDATE pgflow.step_states s SET remaining_tasks = remaining_tasks - 1
    WHERE (s.run_id, s.step_slug) = (done.run_id, done.step_slug) RETURNING s.remaining_tasks INTO left_over;
    IF left_over = 0 THEN
        SELECT s.step_type INTO kind FROM pgflow.steps s
        WHERE (s.flow_slug, s.step_slug) = (done.flow_slug, done.step_slug);
        PERFORM pgflow.end_step(done.run_id, done.step_slug, CASE WHEN kind = 'single' THEN done.output ELSE (
            SELECT jsonb_agg(t.output ORDER BY t.task_index) FROM pgflow.step_tasks t
            WHERE (t.run_id, t.step_slug) = (done.run_id, done.step_slug)) END);
        PERFORM pgflow.go_on(done.run_id);
    END IF;
    RETURN NEXT done;
END
$$;

CREATE FUNCTION pgflow.fail_task(run_id uuid, step_slug text, task_index int, error_message text)
RETURNS SETOF pgflow.step_tasks LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    failed pgflow.step_tasks;
    said record;
BEGIN
    PERFORM FROM pgflow.runs r WHERE r.run_id = fail_task.run_id FOR UPDATE;
    SELECT coalesce(s.opt_max_attempts, f.opt_max_attempts) AS attempts,
           coalesce(s.opt_base_delay, f.opt_base_delay) AS delay, s.when_exhausted INTO said
    FROM pgflow.runs r JOIN pgflow.steps s ON s.flow_slug = r.flow_slug JOIN pgflow.flows f ON f.flow_slug = r.flow_slug
    WHERE r.run_id = fail_task.run_id AND s.step_slug = fail_task.step_slug;
    UPDATE pgflow.step_tasks t SET error_message = fail_task.error_message,
        status = CASE WHEN t.attempts_count < said.attempts THEN 'queued' ELSE 'failed' END,
        started_at = CASE WHEN t.attempts_count < said.attempts THEN NULL ELSE t.started_at END,
        failed_at = CASE WHEN t.attempts_count < said.attempts THEN NULL ELSE now() END
    WHERE (t.run_id, t.step_slug, t.task_index) = (fail_task.run_id, fail_task.step_slug, fail_task.task_index)
      AND t.status = 'started' RETURNING t.* INTO failed;
    IF NOT FOUND THEN
        RETURN;
    ELSIF failed.status = 'queued' THEN
        PERFORM pgmq.set_vt(failed.flow_slug, failed.message_id, (said.delay * 2 ^ failed.attempts_count)::int);
    ELSIF said.when_exhausted = 'fail' THEN
        UPDATE pgflow.step_states s SET status = 'failed', failed_at = now(), error_message = failed.error_message
        WHERE (s.run_id, s.step_slug) = (failed.run_id, failed.step_slug);
        UPDATE pgflow.runs r SET status = 'failed', failed_at = now() WHERE r.run_id = failed.run_id;
    ELSE
        UPDATE pgflow.step_states s SET error_message = failed.error_message
        WHERE (s.run_id, s.step_slug) = (failed.run_id, failed.step_slug);
        PERFORM pgflow.skip_step(failed.run_id, failed.step_slug, 'handler_failed', said.when_exhausted = 'skip-cascade');
        PERFORM pgflow.go_on(failed.run_id);
    END IF;
    IF failed.status = 'failed' THEN
        PERFORM pgmq.archive(failed.flow_slug, failed.message_id);
    END IF;
    RETURN NEXT failed;
END
$$;

CREATE FUNCTION pgflow.requeue_stalled_tasks() RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    stalled record;
    done int := 0;
BEGIN
    FOR stalled IN
        SELECT t.* FROM pgflow.step_tasks t JOIN pgflow.flows f USING (flow_slug)
        WHERE t.status = 'started' AND t.permanently_stalled_at IS NULL
          AND t.started_at < now() - make_interval(secs => f.opt_timeout + 30) FOR UPDATE OF t SKIP LOCKED
    LOOP
        IF stalled.requeued_count < 3 THEN
            UPDATE pgflow.step_tasks t SET status = 'queued', started_at = NULL, last_worker_id = NULL,
                requeued_count = t.requeued_count + 1, last_requeued_at = now()
            WHERE (t.run_id, t.step_slug, t.task_index) = (stalled.run_id, stalled.step_slug, stalled.task_index);
            PERFORM pgmq.set_vt(stalled.flow_slug, stalled.message_id, 0);
            done := done + 1;
        ELSE
            UPDATE pgflow.step_tasks t SET permanently_stalled_at = now()
            WHERE (t.run_id, t.step_slug, t.task_index) = (stalled.run_id, stalled.step_slug, stalled.task_index);
            PERFORM pgmq.archive(stalled.flow_slug, stalled.message_id);
        END IF;
    END LOOP;
    RETURN done;
END
$$;
